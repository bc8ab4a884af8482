"""Two processes of one thread against one process of two: train.py under torchrun and alone, and the bytes they move.

    python tests/bench/processes.py
    python tests/bench/processes.py --flags --vision vit_tiny_patch16_224 --vision-args patch_size=4 depth=6 \\
        --image-size 32 --data data/cifar10

Runs alternate; each is train.py as the command line starts it, on the shapes unless --flags say otherwise. The rate is
the median of the lines it prints, first line left out, so start, compilation and evaluation do not count. Bytes are
what the network devices of this machine received meanwhile, the loopback included, over the steps; next to them what
theory expects per step, all processes together: gradients by a ring all-reduce, 2 (N - 1) x 4 bytes a weight, and
embeddings gathered, 2 x 4 x B x E bytes to each other process, with their gradients back.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import common

import dualenc

ROOT = Path(__file__).parents[2]


def received_bytes():
    """Bytes that all network devices have received, or 0 where the system does not say."""
    path = Path("/proc/net/dev")
    lines = path.read_text().splitlines()[2:] if path.exists() else []
    return sum(int(line.partition(":")[2].split()[0]) for line in lines)


def run(processes, args, out):
    """(pairs a second, bytes a step, weights that learn, embedding width) of one training run."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    flags = ["--steps", args.steps, "--log-every", max(1, args.steps // 10), "--eval-every", 10**9]
    flags += ["--batch-size", args.batch_size, "--out", out, *args.flags]
    command = [sys.executable, *(launcher if processes > 1 else []), "train.py", *map(str, flags)]
    before = received_bytes()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    moved = (received_bytes() - before) / args.steps
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    rates = [line["pairs_per_s"] for line in lines if "pairs_per_s" in line]
    model = dualenc.DualEncoder.from_pretrained(out / "last")
    weights = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return statistics.median(rates[1:] or rates), moved, weights, model.config.projection_dim


def expected_bytes(processes, batch, weights, width):
    """Bytes a step that all processes together receive."""
    gradients = 2 * (processes - 1) * 4 * weights
    rows = 2 * (processes - 1) * 4 * batch * width  # pictures and captions, each row to every other process
    # The gradient of all gathered rows is summed by a ring all-reduce.
    return gradients + rows + 2 * rows


def main(argv=None):
    parser = common.flag_parser(__doc__, rounds=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=256, help="pairs of all processes together")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of train.py; give it last")
    args = parser.parse_args(argv)
    common.print_head(args, rates=False)
    counts = (1, args.processes)
    runs = {count: [] for count in counts}
    for number in range(args.rounds):
        for count in counts[:: 1 if number % 2 else -1]:
            with tempfile.TemporaryDirectory() as scratch:
                runs[count].append(run(count, args, Path(scratch) / "run"))
    rates = {count: [rate for rate, *_ in found] for count, found in runs.items()}
    rows = []
    for count, found in runs.items():
        _, _, weights, width = found[0]
        moved = statistics.median(moved for _, moved, *_ in found)
        expected = expected_bytes(count, args.batch_size, weights, width)
        ratio = f"{common.times_faster(rates[count], rates[1]):.3f}" if count > 1 else ""
        rows.append([f"{count}", f"{common.spread(rates[count]):,.0f}", ratio, f"{moved / 1e6:.2f}",
                     f"{expected / 1e6:.2f}"])  # fmt: skip
    print(f"model    {weights:,} weights, embeddings of {width}")
    common.print_table(["processes", "pairs/s", "of one process", "MB a step, measured", "expected"], rows)


if __name__ == "__main__":
    sys.exit(main())
