"""Execute the notebooks from top to bottom, each in a fresh kernel and a working folder that is thrown away.

    python notebooks/run.py                  all of them: any error stops, and the seconds of each are printed
    python notebooks/run.py 02 05 --write    those whose names begin so; the outputs are saved in the notebooks

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
BESIDE = ("dualenc.py", "train.py", "eval.py", "pyproject.toml", "tests")  # what notebooks find one folder up
SECONDS_A_CELL = 600  # a cell that takes longer hangs
# What a notebook says of the machine that executed it is replaced by this.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path, folder):
    """The notebook with the outputs of a run in folder/notebooks, BESIDE one folder up as in the repository.

    raises  nbclient.exceptions.CellExecutionError for the first cell that fails
    """
    working = folder / "notebooks"
    working.mkdir()
    for name in BESIDE:
        source = HERE.parent / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=SECONDS_A_CELL,
        kernel_name="python3",
        resources={"metadata": {"path": str(working)}},
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # of the kernel
    )
    client.execute()
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        if output.output_type == "stream":
            output.text = output.text.replace(f"{working}/", "")
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("names", nargs="*", help="beginnings of file names; all notebooks unless given")
    parser.add_argument("--write", action="store_true", help="save the outputs in the notebooks")
    parser.add_argument("--folder", type=Path, default=HERE, help="where the notebooks lie")
    args = parser.parse_args(argv)

    chosen = [path for path in sorted(args.folder.glob("*.ipynb")) if path.name.startswith(tuple(args.names) or "")]
    if not chosen:
        raise ValueError(f"no notebook in {args.folder} begins with {' or '.join(args.names) or 'anything'}")
    started = time.perf_counter()
    for path in chosen:
        before = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, Path(folder).resolve())
        print(f"{time.perf_counter() - before:6.0f} s  {path.name}", flush=True)
        if args.write:
            nbformat.write(notebook, path)
    print(f"{time.perf_counter() - started:6.0f} s  in all")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, nbclient.exceptions.CellControlSignal, nbclient.exceptions.DeadKernelError) as error:
        sys.exit(f"run.py: error: {error}")
