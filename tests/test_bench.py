"""Claims about tests/bench: every bench says what it does and runs small, and the statistics are right."""

import importlib
import importlib.util
import statistics
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent / "bench"
STANDALONE = {"load_checkpoint", "startup"}  # scripts without flags, of some minutes
NAMES = sorted(path.stem for path in BENCH.glob("*.py") if path.stem not in {"common", *STANDALONE})
PEERS = ("transformers", "open_clip")
SMALLEST = {
    "captions": ["--preset", "smoke", "--rounds", "1"],
    "embed": ["--preset", "smoke", "--rounds", "1", "--pictures", "8", "--captions", "20"],
    "locked": ["--preset", "smoke", "--pictures", "20", "--epochs", "2", "--peer-epochs", "1"],
    "loss": ["--sizes", "64", "--others-up-to", "64", "--width", "16", "--rounds", "1", "--no-memory"],
    "micro_batch": ["--preset", "smoke", "--pairs", "16", "--micro-batch", "4", "--rounds", "1", "--no-memory"],
    "processes": None,  # starts whole runs
    "retrieval": ["--images", "20", "--captions", "100", "--width", "16", "--rounds", "1", "--no-memory"],
    "train_step": ["--preset", "smoke", "--rounds", "1"],
}
pytestmark = pytest.mark.filterwarnings("ignore")
peers_only = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, PEERS)), reason="needs tests/requirements-parity.txt"
)


@pytest.fixture
def bench(monkeypatch):
    """A function that imports a bench by name; its own folder is on the path only meanwhile."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module
    for name in (*NAMES, "common"):
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_bench_is_known_here_and_in_the_readme():
    assert set(SMALLEST) == set(NAMES)
    readme = (BENCH / "README.md").read_text()
    for name in {path.stem for path in BENCH.glob("*.py")} - {"common"}:
        assert f"python tests/bench/{name}.py" in readme


@pytest.mark.parametrize("name", NAMES)
def test_every_bench_explains_itself_without_the_peers(name, bench, monkeypatch, capsys):
    for peer in PEERS:
        monkeypatch.setitem(sys.modules, peer, None)  # importing it fails
    module = bench(name)
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    assert " ".join(module.__doc__.split())[:200] in " ".join(capsys.readouterr().out.split())


@peers_only
@pytest.mark.parametrize("name", [name for name in NAMES if SMALLEST[name]])
def test_every_bench_runs_at_its_smallest_size(name, bench, monkeypatch, capsys):
    monkeypatch.setattr(bench("common"), "matmul_rate", lambda dtype: 1e11)  # seconds, else
    bench(name).main(SMALLEST[name])
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__.partition('+')[0]}" in printed
    assert "as fast" in printed or "time" in printed


def test_alternating_rounds_run_every_way_once_in_turning_order(bench):
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = bench("common").alternate(ways, rounds=3, warmup=1)
    rounds = ["".join(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert rounds[1:] == ["abc", "bca", "cab"]  # the first one is the warm-up
    assert sorted(rounds[0]) == list("abc")
    assert {name: len(took) for name, took in seconds.items()} == dict.fromkeys("abc", 3)


def test_ratios_are_taken_round_by_round(bench):
    """A slow spell of the machine meets one round of both: it must not show in their ratio."""
    common = bench("common")
    slower, faster = [2.0, 20.0, 2.2, 4.0], [1.0, 10.0, 1.0, 1.0]
    ratio = common.times_faster(slower, faster)
    low, median, high = statistics.quantiles([2.0, 2.0, 2.2, 4.0], n=4, method="inclusive")
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((low, median, high))
    assert f"{ratio:.2f}" == f"{median:.2f} [{low:.2f}, {high:.2f}]"
    assert common.spread([3.0]) == common.Spread(3.0, 3.0, 3.0)
    assert common.fastest([1, 5], [2, 4]) == [1, 4]


def test_flops_are_those_of_the_products(bench):
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert bench("common").count_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    query = torch.ones(1, 2, 4, 8)  # two products of 2 x B x H x T x T x W/H each
    attention = torch.nn.functional.scaled_dot_product_attention
    assert bench("common").count_flops(lambda: attention(query, query, query)) == 2 * (2 * 2 * 4 * 4 * 8)


def test_time_is_counted_by_kind_of_operation(bench):
    a = torch.randn(500, 500)
    model = torch.nn.Linear(500, 500)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(a).sum().backward()
    for expected, step in {
        "products": lambda: a @ a,
        "copies and casts": lambda: a.t().contiguous(),
        "norms, softmax, GELU": lambda: torch.nn.functional.gelu(a).softmax(dim=-1),
        "optimiser, clipping": optimizer.step,
        "the rest": lambda: a + a,
    }.items():
        spent = bench("train_step").where(step, rounds=3)
        assert max(spent, key=spent.get) == expected, spent


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_is_what_a_call_adds_even_after_a_larger_one(bench):
    common, megabytes = bench("common"), 2**20 // 4
    for size in (64, 24, 16, 12):
        found = common.peak_of(lambda size=size: torch.ones(size * megabytes)) / 2**20
        assert size - 1 < found < size + 8


@peers_only
def test_the_three_libraries_build_towers_of_one_size(bench):
    """As many products in forward and backward; training leaves some of ours out, so the model's forward is counted."""
    common, steps = bench("common"), bench("train_step")
    preset = common.PRESETS["smoke"]
    pixels, inputs = steps.ready_batch(preset)
    model = common.ours(preset)
    counts = {name: common.count_flops(steps.make_step(name, "smoke", "fp32")) for name in PEERS}
    counts["ours"] = common.count_flops(lambda: model(pixel_values=pixels, **inputs, return_loss=True).loss.backward())
    assert max(counts.values()) < 1.02 * min(counts.values()), counts
