"""Execute the notebooks from top to bottom, each in a fresh kernel and a folder of its own.

    python notebooks/run.py                  all of them; any error stops
    python notebooks/run.py 02 05 --write    those whose names begin so; saves their outputs

Needs notebooks/requirements.txt.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbclient
import nbformat

HERE = Path(__file__).parent
BESIDE = ("dualenc.py", "train.py", "eval.py", "pyproject.toml", "tests")  # one folder up
# Replaces what a notebook says of the machine that executed it.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path, folder):
    """The notebook after a run in folder/notebooks; raises CellExecutionError if a cell fails."""
    working = folder / "notebooks"
    working.mkdir()
    for name in BESIDE:
        source = HERE.parent / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook,
        timeout=600,  # seconds a cell
        kernel_name="python3",
        resources={"metadata": {"path": str(working)}},
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # of the kernel
    ).execute()
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        if output.output_type == "stream":
            output.text = output.text.replace(f"{working}/", "")
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="beginnings of file names (default: all)")
    parser.add_argument("--write", action="store_true", help="save the outputs in the notebooks")
    args = parser.parse_args(argv)
    begins = tuple(args.names) or ("",)
    chosen = [path for path in sorted(HERE.glob("*.ipynb")) if path.name.startswith(begins)]
    for path in chosen or sys.exit(f"run.py: error: no notebook begins with {args.names}"):
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, Path(folder).resolve())
        print(f"{time.perf_counter() - started:6.0f} s  {path.name}", flush=True)
        if args.write:
            nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
