"""Every bench runs at its smallest size, and the README beside it names its command."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SMALLEST = {
    "locked": "--preset smoke --images 20 --epochs 2",
    "loss": "--sizes 64",
    "micro_batch": "--preset smoke --pairs 16 --micro-batch 4",
    "retrieval": "--images 20",
    "train_step": "--preset smoke",
}


def test_every_bench_is_run_and_explained():
    assert {path.stem for path in HERE.glob("*.py")} == {*SMALLEST, "common", Path(__file__).stem}
    for name in SMALLEST:
        assert f"python tests/bench/{name}.py" in (HERE / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_a_bench_runs_at_its_smallest_size(name):
    command = [sys.executable, HERE / f"{name}.py", "--rounds", "1", *SMALLEST[name].split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "times that of" in done.stdout, done.stderr[-2000:]
