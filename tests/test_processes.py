"""Claims about several processes: together they compute what one would, and they stop together."""

import contextlib
import functools
import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import conftest
import pytest
import torch
from test_faults_runs import ROOT, TINY, assert_same, finish, outcome, run, write_pictures

import dualenc
import eval as evaluation
import train

CAPTIONS = ["two dogs", "fox", "a small red circle left of a large blue star", "star", "two dogs", "a photo", "the fox"]
SMALL = [*TINY, "--workers", "0"]  # workers of a process that came from a forkserver would take seconds to start
DROPOUT = ["--vision", "test_vit", "--vision-args", "img_size=32", "--patch-dropout", "0.5", "--image-size", "0"]
VIT = [*DROPOUT[:4], "--image-size", "0"]  # no batch norm: N processes compute what one does


def in_processes(count, work, *arguments):
    """What work(*arguments) returns in each of so many gloo processes, in the order of their ranks."""
    return conftest.in_processes(count, without_rank, work, *arguments)


def without_rank(rank, work, *arguments):
    return work(*arguments)


# ---- One step -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def pixels_in_float64():
    normalize = dualenc.ImageTransform.normalize
    dualenc.ImageTransform.normalize = lambda self, image: normalize(self, image).double()
    try:
        yield
    finally:
        dualenc.ImageTransform.normalize = normalize


def make_model(vision, lock="", bias=None):
    torch.manual_seed(0)
    tokenizer = dualenc.train_tokenizer(CAPTIONS, vocab_size=200, max_length=32)
    model = dualenc.DualEncoder.from_vision_text_pretrained(
        vision,
        "scratch",
        projection_dim=16,
        pretrained=False,
        vision_args={"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8} if vision.startswith("vit") else {},
        vision_image_size=32,
        text_vocab_size=tokenizer.get_vocab_size(),
        text_width=32,
        text_depth=2,
        text_heads=4,
        text_pooling="mean",
        text_max_positions=32,
        logit_bias_init=bias,
    )
    for weight in model.text_model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    model.processor = dualenc.Processor(model.vision_model.image_transform(), tokenizer)
    if lock:
        model.lock(lock)
    return model.double().train()


def take_step(case, part):
    """A step with the pairs of this part of a batch of case["batch"]: (values, gradients, buffers)."""
    loss, bias = case.get("loss", "clip"), -2.0 if case.get("loss") == "siglip" else None
    model = make_model(case.get("vision", "vit_tiny_patch16_224"), case.get("lock", ""), bias)
    train.TILED_FROM = 1 if case.get("tiled") else 10_000
    config = train.TrainConfig(
        loss=loss, batch_size=case["batch"], micro_batch=case.get("micro_batch", 0), clip_grad=0.0
    )
    numbers = range(case["batch"])[part]
    images = torch.randint(0, 256, (case["batch"], 3, 32, 32), generator=torch.Generator().manual_seed(1))
    captions = [CAPTIONS[i % 7] for i in numbers]
    batch = train.Batch(images[part].to(torch.uint8), captions, list(numbers), {})
    groups = train.pair_groups(dualenc.Pairs([], None, []), captions, numbers)
    optimizer = train.make_optimizer(model, config)
    with pixels_in_float64():
        embed = train.make_embedder(model, config, "fp32")
        values = train.train_step(model, optimizer, config, batch, groups, "fp32", embed)
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return values, gradients, dict(model.named_buffers())


def take_steps(cases):
    """take_step with this process's part for each case."""
    rank, results = dualenc.process_rank(), {}
    for name, case in cases.items():
        ends = [0, *itertools.accumulate(case["shares"])] if "shares" in case else None
        part = slice(*ends[rank : rank + 2]) if ends else dualenc.share(case["batch"])
        results[name] = take_step(case, part)
    return results


CASES = {
    "clip": {"batch": 12},
    "clip, uneven shares": {"batch": 11},
    "clip, tiled": {"batch": 12, "tiled": True},
    "clip, tiled, uneven shares": {"batch": 11, "tiled": True},
    "clip, pieces": {"batch": 12, "micro_batch": 2},
    "clip, pieces, tiled, uneven shares": {"batch": 11, "micro_batch": 3, "tiled": True},
    "vision locked": {"batch": 11, "lock": "vision"},
    "vision locked, pieces": {"batch": 11, "lock": "vision", "micro_batch": 2},
    "text locked, tiled": {"batch": 11, "lock": "text", "tiled": True},
    "text locked, pieces": {"batch": 11, "lock": "text", "micro_batch": 2},
    "siglip": {"batch": 11, "loss": "siglip"},
    "siglip, pieces, tiled": {"batch": 11, "loss": "siglip", "micro_batch": 2, "tiled": True},
    "multi-positive": {"batch": 11, "loss": "multi-positive"},
    "multi-positive, pieces, tiled": {"batch": 11, "loss": "multi-positive", "micro_batch": 2, "tiled": True},
    "a pair each": {"batch": 3},
    "bad pictures": {"batch": 8, "shares": [5, 1, 2]},
    "bad pictures, pieces": {"batch": 8, "shares": [1, 6, 1], "micro_batch": 2},
    "no readable picture here": {"batch": 8, "shares": [5, 0, 3]},
    "all readable pictures in one process, tiled": {"batch": 8, "shares": [8, 0], "tiled": True},
    "no readable picture here, pieces, tiled": {"batch": 8, "shares": [0, 6, 2], "micro_batch": 2, "tiled": True},
}


@functools.cache
def expected_step(name):
    """The same batch in this one process, at once, with the textbook loss."""
    plain = {key: value for key, value in CASES[name].items() if key in ("batch", "loss", "lock", "vision")}
    tiled_from = train.TILED_FROM
    try:
        return take_step(plain, slice(None))
    finally:
        train.TILED_FROM = tiled_from


@pytest.fixture(scope="module", params=[2, 3])
def steps_of_processes(request):
    cases = {name: case for name, case in CASES.items() if len(case.get("shares", [])) in (0, request.param)}
    return in_processes(request.param, take_steps, cases)


def test_the_step_of_several_processes_is_that_of_one_on_the_whole_batch(steps_of_processes):
    """Every parameter's gradient, logit_scale's and logit_bias's too, and all that is logged, in each process."""
    for name in steps_of_processes[0]:
        values, gradients, _ = expected_step(name)
        for rank, results in enumerate(steps_of_processes):
            got_values, got_gradients, _ = results[name]
            where = f"{name}, process {rank} of {len(steps_of_processes)}"
            assert got_values == pytest.approx(values, rel=1e-9, abs=1e-12), where
            assert got_gradients.keys() == gradients.keys(), where
            for weight, gradient in gradients.items():
                torch.testing.assert_close(
                    got_gradients[weight],
                    gradient,
                    rtol=1e-7,
                    atol=1e-11,
                    msg=lambda m, at=f"{where}, {weight}": f"{at}: {m}",
                )


def statistics_of_an_empty_share():
    """Batch norm's buffers after a step in which the first process has no pictures."""
    case = {"batch": 4, "vision": "test_resnet"}
    return take_step(case, slice(0, 0) if dualenc.process_rank() == 0 else slice(0, 4))[2]


def test_a_process_without_readable_pictures_leaves_batch_norm_alone(one_thread):
    none, all_four = in_processes(2, statistics_of_an_empty_share)
    start = dict(make_model("test_resnet").named_buffers())
    assert_same(none, start)
    assert_same(all_four, take_step({"batch": 4, "vision": "test_resnet"}, slice(0, 4))[2])


# ---- Telling each other ---------------------------------------------------------------------------------------------


def batches_of_this_process():
    return list(train.Batches(50, 8, seed=3, first_step=2, steps=14))


def test_the_shares_of_a_batch_make_up_the_batch_of_one_process():
    shares = in_processes(3, batches_of_this_process)
    assert [sum(parts, []) for parts in zip(*shares)] == batches_of_this_process()
    assert {len(part) for parts in shares for part in parts} == {2, 3}


def tell_and_fail(out):
    rank, seen = dualenc.process_rank(), {}
    seen["nothing"] = dualenc.tell_all(None)
    seen["some"] = dualenc.tell_all({"rank": rank} if rank else None)
    for name, failing in (("none", ()), ("last", (2,)), ("two", (1, 2))):
        try:
            with dualenc.together():
                if rank in failing:
                    raise train.DataFault(f"broken in {rank}")
            seen[name] = None
        except ValueError as error:
            seen[name] = f"{type(error).__name__} {error}"
    notes, names = train.BadPictures(out, "skip", 300), [f"{i}.png" for i in range(20)]
    notes.check(train.Batch(None, ["one"], [], {4 + rank: "torn"} if rank else {}), names)  # three in all are enough
    seen["found"] = dict(notes.found)
    try:
        notes.check(train.Batch(None, ["one"] * (rank == 2), [], {7: "torn"} if rank == 2 else {}), names)
    except train.DataFault as fault:
        seen["too few"] = str(fault)
    try:
        notes.check(train.Batch(None, ["one"] * 3, [], {8 + rank: "torn"}), names)
    except train.DataFault as fault:
        seen["too many"] = str(fault)
    return seen


def test_what_one_process_finds_all_know(tmp_path):
    """News, errors, and bad pictures, which are counted and listed once."""
    results = in_processes(3, tell_and_fail, tmp_path)
    assert results[0] == results[1] == results[2]
    seen = results[0]
    assert seen["nothing"] == [] and seen["some"] == [{"rank": 1}, {"rank": 2}]
    assert seen["none"] is None and seen["last"] == "DataFault broken in 2" and seen["two"] == "DataFault broken in 1"
    assert seen["found"] == {"5.png": "torn", "6.png": "torn"}
    assert "fewer than two pictures" in seen["too few"] and "6 of 300 pictures" in seen["too many"]
    assert len((tmp_path / train.BAD_PICTURES).read_text().splitlines()) == 6


@pytest.mark.parametrize("processes, expected", [(1, ["fork"]), (2, ["pause", "fork"])])
def test_processes_that_have_just_talked_wait_before_they_start_workers(processes, expected, monkeypatch):
    """On Python 3.11.7, 3 of 5,000 processes that were forked right after a broadcast hung; none after 20 ms."""
    happened = []

    class Loader:
        def __iter__(self):
            happened.append("fork")
            return iter([1, 2])

    monkeypatch.setattr(dualenc, "process_count", lambda: processes)
    monkeypatch.setattr(time, "sleep", lambda seconds: happened.append("pause" if seconds >= 0.02 else "too short"))
    batches = dualenc.from_workers(Loader())
    assert happened == expected and list(batches) == [1, 2]


@pytest.mark.parametrize("kind", [RuntimeError, OSError, EOFError])
def test_whatever_a_dead_worker_looks_like_is_reported(kind):
    class Loader:
        def __iter__(self):
            yield 1
            raise kind("gone")

    batches = dualenc.from_workers(Loader())
    assert next(batches) == 1
    with pytest.raises(ValueError, match="a worker that reads pictures ended .gone."):
        next(batches)


@pytest.mark.parametrize("kind", [ValueError, OSError])
def test_what_goes_wrong_here_is_told_to_the_others_and_what_they_say_first_is_raised(kind, monkeypatch):
    """Also a full disk, which is an OSError: else the others would wait for this process."""
    told = []
    monkeypatch.setattr(dualenc, "tell_all", lambda news: told.append(news) or [ValueError("of the first"), news])
    mine = kind("mine")
    with pytest.raises(ValueError, match="of the first"), dualenc.together():
        raise mine
    assert told == [mine]


# ---- Evaluation -----------------------------------------------------------------------------------------------------


def evaluate_shapes(counts, bad):
    """Embeddings and numbers for so many drawn pictures; the message if one of them cannot be read."""
    model, results = make_model("vit_tiny_patch16_224").float(), []
    for count in counts:
        pairs = dualenc.ShapesPairs("test", count=count, side=32)
        embeds = evaluation.embed_pictures(model, pairs.pictures, batch_size=8)
        texts = evaluation.embed_captions(model, [caption for (caption,) in pairs.captions], batch_size=8)
        results.append([embeds, texts, evaluation.evaluate(model, pairs, batch_size=8)])
    files = [str(Path(bad).with_name("000.png"))] * 20 + [bad] + [str(Path(bad).with_name("001.png"))] * 3
    try:
        evaluation.embed_pictures(model, dualenc.PictureFiles(files), batch_size=8)
    except ValueError as error:
        results.append(str(error))
    return results


def test_a_shared_evaluation_is_that_of_one_process_to_the_bit(one_thread, tmp_path):
    """Also where there are fewer batches than processes, and where one process meets a broken picture."""
    write_pictures(tmp_path / "data", 5, bad=[4])
    arguments = (30, 12), str(tmp_path / "data" / "004.png")
    expected = evaluate_shapes(*arguments)
    assert "cannot read picture" in expected[-1]
    for results in in_processes(3, evaluate_shapes, *arguments):
        assert_same(results, expected)


# ---- Whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def train_here(flags, happening=None, at=7, rank=1):
    """What train.main in this process returns, or its error, or its exit status and the last line it printed.

    happening  "signal", "worker" or "loss": what befalls one process in step `at`
    """
    step, steps, loss, original = train.train_step, [], train.compute_loss, train.TrainingPairs.__getitem__

    def train_step(*arguments):
        steps.append(1)
        if happening == "signal" and len(steps) == at and dualenc.process_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    def compute_loss(*arguments):
        broken = happening == "loss" and len(steps) == at and dualenc.process_rank() == rank
        return loss(*arguments) + (float("inf") if broken else 0.0)

    def fetch(self, key):
        if happening == "worker" and len(steps) == at - 1 and dualenc.process_rank() == rank:
            raise RuntimeError("killed by signal: Killed")
        return original(self, key)

    train.train_step, train.compute_loss, train.TrainingPairs.__getitem__ = train_step, compute_loss, fetch
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            return train.main([str(flag) for flag in flags])
    except SystemExit as stop:
        return stop.code, printed.getvalue().splitlines()[-1]
    except ValueError as error:
        return str(error)


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("count", "more"),
    [
        pytest.param(2, ["--loss", "siglip", "--batch-size", "9", "--lock", "text"], id="uneven"),
        pytest.param(3, ["--micro-batch", "2"], id="pieces", marks=pytest.mark.slow),
    ],
)
def test_a_run_of_several_processes_is_the_run_of_one(count, more, data, tmp_path):
    """Weights, optimiser and every logged number to 1e-5; the evaluations come out the same."""
    flags = [*data, *SMALL, *VIT, *more]
    one, several = tmp_path / "one", tmp_path / "several"
    assert run(*flags, "--out", one) == 0
    best = in_processes(count, train_here, [*flags, "--out", several])
    assert best[0] == best[-1] == json.loads(json.dumps(best[0]))
    got, expected = outcome(several), outcome(one)
    assert json.loads((several / "train_config.json").read_text())["processes"] == count
    for weights, others in zip(got["weights"], expected["weights"]):
        for name, weight in weights.items():
            torch.testing.assert_close(weight, others[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert len(got["metrics"]) == len(expected["metrics"])
    for line, other in zip(got["metrics"], expected["metrics"]):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_class_folders_and_drawn_shapes_train_in_several_processes(tmp_path):
    for name in ("dog", "fox"):
        for split in ("train", "test"):
            write_pictures(tmp_path / "classes" / split / name, 12)
            (tmp_path / "classes" / split / name / "captions.csv").unlink()
    flags = ["--data", tmp_path / "classes", "--loss", "multi-positive", *SMALL, *VIT, "--steps", "3"]
    best = in_processes(2, train_here, [*flags, "--out", tmp_path / "classes run"])
    assert best[0] == best[1] and best[0]["n_classes"] == 2
    flags = ["--data", "shapes", *SMALL, "--steps", "2"]
    best = in_processes(2, train_here, [*flags, "--out", tmp_path / "shapes run"])
    assert best[0] == best[1] and best[0]["n_images"] == 512
    # Each process embedded half of them, and its batch norm had seen pictures of its own.
    again = evaluation.main([str(tmp_path / "shapes run"), "--precision", "fp32"])["retrieval"]
    assert again == {name: best[0][name] for name in again}, "the model that was measured is the one that was saved"


@pytest.mark.parametrize(
    ("count", "more"),
    [
        pytest.param(2, [*DROPOUT, "--micro-batch", "3"], id="pieces"),
        pytest.param(3, DROPOUT, id="three", marks=pytest.mark.slow),
        pytest.param(2, [], id="norm", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_process_stops_all_and_resuming_leaves_no_trace(count, more, data, tmp_path):
    """SIGTERM to the second one in step 7; dropout differs between processes and is replayed; to the bit."""
    flags = [*data, *SMALL, *more]
    in_processes(count, train_here, [*flags, "--out", tmp_path / "whole"])
    cut = tmp_path / "cut"
    stopped = in_processes(count, train_here, [*flags, "--out", cut], "signal")
    said = f"stopped  SIGTERM; step 7 is saved; go on with: torchrun --nproc-per-node {count} train.py --resume {cut}"
    assert stopped == [(143, said)] * count
    with pytest.raises(
        ValueError, match=rf"began with {count} processes and would go on with 1.*--nproc-per-node {count} "
    ):
        train.main(["--resume", str(cut)])
    in_processes(count, train_here, ["--resume", cut])
    assert_same(outcome(cut), outcome(tmp_path / "whole"))


def test_dropout_differs_between_processes(data, tmp_path):
    """Two processes with the same pictures and dropout would be one process with half the batch."""
    seeds = in_processes(2, seeds_of_steps, [*data, *SMALL, "--out", tmp_path / "run"])
    assert len(set(seeds[0])) == len(seeds[0]) == 12 and not set(seeds[0]) & set(seeds[1])


def seeds_of_steps(flags):
    seeds, step = [], train.train_step

    def train_step(*arguments):
        seeds.append(torch.initial_seed())
        return step(*arguments)

    train.train_step = train_step
    train.main([str(flag) for flag in flags])
    return seeds


def test_a_resumed_run_of_one_process_refuses_several(data, tmp_path):
    assert run(*data, *SMALL, "--steps", "2", "--out", tmp_path / "run") == 0
    refused = in_processes(2, train_here, ["--resume", tmp_path / "run"])
    assert refused[0] == refused[1] and re.search(r"began with 1 .*go on with: python train.py --resume", refused[0])


@pytest.mark.parametrize(
    ("happening", "message"),
    [
        ("worker", r"a worker that reads pictures ended \(killed by signal.*step 6 is saved; go on with: torchrun"),
        ("loss", r"step 7: loss or gradient are no longer finite.*last, of step 5"),
    ],
)
def test_a_fault_in_one_process_stops_all_with_its_message(happening, message, data, tmp_path):
    flags = [*data, *SMALL, *VIT, "--out", tmp_path / "run"]
    one, other = in_processes(2, train_here, flags, happening)
    assert one == other and re.search(message, one)
    step = torch.load(tmp_path / "run" / "last" / train.STATE_FILE, weights_only=True)["step"]
    assert step == {"worker": 6, "loss": 5}[happening]


def test_a_step_that_breaks_in_one_process_is_skipped_in_all(data, tmp_path):
    flags = [*data, *SMALL, *VIT, "--on-bad-step", "skip", "--out", tmp_path / "run"]
    in_processes(2, train_here, flags, "loss")
    assert outcome(tmp_path / "run")["state"]["bad_steps"] == 1


@pytest.mark.slow
def test_bad_pictures_stop_or_are_skipped_and_counted_once(tmp_path):
    data = write_pictures(tmp_path / "data", 120, bad=[111])
    flags, out = [*data, *SMALL, *VIT, "--steps", "15"], tmp_path / "run"
    one, other = in_processes(2, train_here, [*flags, "--out", out])
    assert one == other and re.search(r"line 113: cannot read picture .*step \d+ is saved; go on with: torchrun", one)
    in_processes(2, train_here, ["--resume", out, "--on-bad-picture", "skip"])
    assert run(*flags, "--on-bad-picture", "skip", "--out", tmp_path / "alone") == 0
    assert (out / train.BAD_PICTURES).read_text() == (tmp_path / "alone" / train.BAD_PICTURES).read_text()
    for line, other in zip(lines_of(out), lines_of(tmp_path / "alone")):
        assert line["step"] == other["step"] and line.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-4)


def test_a_checkpoint_that_cannot_be_written_stops_all_processes(data, tmp_path):
    flags = [*data, *SMALL, "--out", tmp_path / "run"]
    errors = in_processes(2, train_with_a_full_disk, flags)
    assert errors[0] == errors[1] and re.search("No space left on device.*there is no", errors[0])


def train_with_a_full_disk(flags):
    def full(*_):
        raise OSError(28, "No space left on device")

    train.dualenc.save_dual_encoder = full
    return train_here(flags)


def wait_for_downloads(marker):
    def load_data(config):
        if dualenc.process_rank() == 0:
            time.sleep(0.5)
            marker.touch()
        if not marker.exists():
            raise ValueError("came before the download was done")
        raise ValueError("all is there")

    train.load_data = load_data
    return train_here(["--download", "--out", marker.with_name("run")])


def test_one_process_downloads_and_the_others_wait_for_it(tmp_path):
    assert in_processes(2, wait_for_downloads, tmp_path / "marker") == ["all is there"] * 2


@pytest.mark.parametrize("resize", [(24, 32), 32])
def test_a_blank_piece_has_the_shape_of_the_pictures_cropped_or_not(resize, make_model):
    processor = make_model().processor
    for crop in (None, (24, 32)):
        processor.image_transform = dualenc.ImageTransform(resize, crop)
        expected = processor(images=torch.zeros(3, 40, 40, dtype=torch.uint8))["pixel_values"].shape[1:]
        assert train.blank_piece(processor, 2).images.shape == (2, *expected)


def test_a_folder_that_holds_a_run_is_refused_in_all_processes(data, tmp_path):
    """Only the first one looks at it; the others would wait for it for ever."""
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "train_config.json").write_text("{}")
    errors = in_processes(2, train_here, [*data, *SMALL, "--out", tmp_path / "r"])
    assert errors[0] == errors[1] and "r already holds a run: go on with --resume" in errors[0]


def test_a_batch_smaller_than_the_job_is_refused(data, tmp_path, monkeypatch):
    errors = in_processes(3, train_here, [*data, *SMALL, "--batch-size", "2", "--out", tmp_path / "r"])
    assert all("batch_size is 2, less than a pair for each of 3 processes" in error for error in errors)
    monkeypatch.setattr(dualenc, "process_count", lambda: 2)
    pairs = dualenc.ShapesPairs(count=8, side=32)
    train.check_recipe(train.TrainConfig(batch_size=2), pairs, pairs)  # a pair for each is enough


def test_each_process_of_a_machine_takes_its_own_card_and_its_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert dualenc.own_cores() == 8 and dualenc.pick_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert dualenc.own_cores() == 2 and dualenc.pick_workers(-1, torch.device("cpu")) == 1
    assert dualenc.pick_device("auto") == dualenc.pick_device("cuda") == torch.device("cuda:2")
    assert dualenc.pick_device("cuda:1") == torch.device("cuda:1") and dualenc.pick_device("cpu").type == "cpu"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert dualenc.own_cores() == 1 and dualenc.pick_workers(-1, torch.device("cuda")) == 0


# ---- torchrun -------------------------------------------------------------------------------------------------------


def torchrun(count, *flags, script=ROOT / "train.py", **env):
    """torchrun in a process group of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.Popen(
        [*command, str(script), *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(process, word):
    """Read the printout up to the first line that begins with this word."""
    while not (line := process.stdout.readline()).startswith(word):
        assert process.poll() is None, process.stderr.read()
    return line


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find the processes")


@pytest.mark.slow
def test_torchrun_trains_like_one_process_and_only_the_first_one_prints(data, tmp_path):
    flags = [*data, *SMALL, *VIT]
    out, error = finish(torchrun(2, *flags, "--out", tmp_path / "two"))
    assert [line.split()[0] for line in out.splitlines()] == [
        *("data", "model", "run", "flags", "step", "step", "eval", "step", "eval", "step", "eval", "done")
    ]
    assert "2 processes" in out and "Traceback" not in error and "destroy_process_group" not in error
    assert run(*flags, "--out", tmp_path / "one") == 0
    for line, other in zip(lines_of(tmp_path / "two"), lines_of(tmp_path / "one")):
        line.pop("pairs_per_s", 0), other.pop("pairs_per_s", 0), line.pop("data_share", 0), other.pop("data_share", 0)
        assert line == pytest.approx(other, rel=1e-4, abs=1e-4)


def test_a_signal_that_comes_while_processes_talk_is_not_lost(monkeypatch):
    def told(value):
        os.kill(os.getpid(), signal.SIGTERM)
        return [value] if value else []

    with train.StopSignals() as stop:
        with monkeypatch.context() as patched:
            patched.setattr(dualenc, "tell_all", told)
            assert stop.received_anywhere() is None
        assert stop.received_anywhere() == signal.SIGTERM


@pytest.mark.slow
@needs_proc
def test_sigterm_to_torchrun_saves_and_what_it_prints_goes_on_to_the_same_end(data, tmp_path):
    # One evaluation only: each starts workers, which in older Pythons can hang in fork (README.md, Reliability).
    flags = [*data, *SMALL, *DROPOUT, "--steps", "40", "--eval-every", "40", "--workers", "1"]
    finish(torchrun(2, *flags, "--out", tmp_path / "whole"))
    process = torchrun(2, *flags, "--out", tmp_path / "cut")
    wait_for(process, "step")
    os.kill(process.pid, signal.SIGTERM)
    out, _ = finish(process, status=1)  # torchrun's own status for any failure
    step = re.search(r"stopped  SIGTERM; step (\d+) is saved; go on with: torchrun --nproc-per-node 2 train.py", out)
    assert torch.load(tmp_path / "cut" / "last" / train.STATE_FILE, weights_only=True)["step"] == int(step[1])
    finish(torchrun(2, "--resume", tmp_path / "cut"))
    assert_same(outcome(tmp_path / "cut"), outcome(tmp_path / "whole"))


@pytest.mark.slow
@needs_proc
def test_one_process_killed_ends_the_job(data, tmp_path):
    flags = [*data, *SMALL, "--steps", "100000", "--eval-every", "100", "--out", tmp_path / "run"]
    process = torchrun(2, *flags)
    wait_for(process, "step")
    os.kill(children(process.pid)[1], signal.SIGKILL)
    _, error = finish(process, status=1)
    assert "Signal 9 (SIGKILL)" in error


@pytest.mark.slow
def test_an_exception_in_one_process_ends_the_job_with_its_message(data, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("""
import dualenc, train

step = train.train_step

def train_step(*arguments):
    if dualenc.process_rank() == 1:
        raise ZeroDivisionError("a bug in one process")
    return step(*arguments)

train.train_step = train_step
dualenc.run_script(train.main)
""")
    _, error = finish(torchrun(2, *data, *SMALL, "--out", tmp_path / "run", script=script), status=1)
    assert "ZeroDivisionError: a bug in one process" in error


@pytest.mark.slow
def test_what_all_processes_refuse_is_said_once(tmp_path):
    _, error = finish(torchrun(2, "--data", "nowhere.csv", "--out", tmp_path / "run"), status=1)
    assert error.count("train.py: error: no caption file nowhere.csv") == 1
    assert "Traceback" not in error.split("train.py: error")[0]


@pytest.mark.slow
@needs_proc
def test_a_job_killed_at_random_moments_and_resumed_leaves_no_trace(data, tmp_path):
    """SIGKILL to torchrun and all its processes, some of them inside a checkpoint write."""
    flags = [*data, *SMALL, *DROPOUT, "--steps", "40", "--eval-every", "1", "--log-every", "3"]
    finish(torchrun(2, *flags, "--out", tmp_path / "whole"))
    rng, out = random.Random("kills of a job"), tmp_path / "cut"
    command, killed = [*flags, "--out", out], 0
    while killed < 6:
        process = torchrun(2, *command)
        for _ in range(rng.randint(5, 10)):
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))
        if process.poll() is not None:
            break
        job = [process.pid, *children(process.pid)]
        for pid in job:
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        killed += 1
        command = ["--resume", out]
    assert killed >= 3
    finish(torchrun(2, "--resume", out))
    assert_same(outcome(out), outcome(tmp_path / "whole"))
