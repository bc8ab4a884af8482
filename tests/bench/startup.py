"""How long `python train.py` takes to its first training line, beyond the imports of torch and timm.

python tests/bench/startup.py
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def seconds_to_line(command, start):
    """Seconds until a command prints a line that begins like this; the command ends there."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for line in process.stdout:
            if line.startswith(start):
                break
        else:
            raise ValueError(f"{command} printed no line that begins with {start!r}")
        seconds = time.perf_counter() - began
        process.terminate()
        process.stdout.read()
    return seconds


def main(repeats=3):
    rows = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as out:
            imports = seconds_to_line([sys.executable, "-c", "import torch, timm; print('done')"], "done")
            first = seconds_to_line([sys.executable, "-u", "train.py", "--out", f"{out}/run"], "step")
        rows.append((imports, first - imports))
    imports, beyond = (statistics.median(column) for column in zip(*rows))
    print(f"import torch, timm   {imports:.1f} s")
    print(f"first training line  {beyond:.1f} s later   ({', '.join(f'{row[1]:.1f}' for row in rows)})")


if __name__ == "__main__":
    main()
