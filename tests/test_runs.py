"""Claims about runs: resuming, signals, kills, full disks, bad images, moved data, processes."""

import contextlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import safetensors.torch
import support
import torch
from PIL import Image

import dualenc
import train

ROOT = Path(train.__file__).parent
TINY = "--vision test_resnet --vision-args --image-size 32 --projection-dim 32 --text-width 32 "
TINY += "--text-depth 1 --text-heads 1 --batch-size 8 --steps 12 --eval-every 5 --log-every 4 "
TINY = (TINY + "--precision fp32 --device cpu --workers 0").split()
VIT = ["--vision", "test_vit"]  # no batch norm: N processes compute what one does
DROPOUT = [*VIT, "--patch-dropout", "0.5"]
VARIANTS = {
    "plain": [],
    "cached": ["--lock", "both", "--cache-features"],
    "workers": ["--workers", "2", "--crop-scale", "0.5", "--flip"],
    "dropout, pieces": [*DROPOUT, "--micro-batch", "3"],
    "fp16": [*VIT, "--precision", "fp16"],
}


class Killed(GeneratorExit):
    """Stands for SIGKILL: nothing catches it."""


def write_images(folder, count=64, bad=()):
    """Random images, two captions each, in captions.csv; those of the indices in bad are torn."""
    noise = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    captions = ([f"caption number {i} of {31 * i % 100}", f"image {i}"] for i in range(count))
    table = support.write_table(folder, zip(map(Image.fromarray, noise), captions))
    for path in (folder / f"{i}.png" for i in bad):
        path.write_bytes(path.read_bytes()[:200])
    return ["--data", str(table), "--val-fraction", "0.25"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def run(*flags):
    """train.py in this process; its exit status."""
    try:
        train.main([str(flag) for flag in flags])
    except SystemExit as stop:
        return stop.code
    return 0


def forked(processes, *flags):
    """(process, its printout) of train.py, forked from one that has imported what takes seconds."""
    printed, end = support.FORKSERVER.Pipe(duplex=False)
    arguments = (processes, end, [*map(str, flags)])
    process = support.FORKSERVER.Process(target=train_forked, args=arguments)
    process.start(), end.close()
    return process, os.fdopen(os.dup(printed.fileno()))


def train_forked(processes, pipe, flags):
    """Its ranks get the variables that torchrun would set."""
    os.setsid()
    os.dup2(pipe.fileno(), 1)
    multiprocessing.set_start_method("fork", force=True)  # of workers, as in a script
    port = socket.create_server(("localhost", 0)).getsockname()[1]
    rank = next((rank for rank in range(1, processes) if not os.fork()), 0)
    names = f"MASTER_ADDR=localhost MASTER_PORT={port} RANK={rank} WORLD_SIZE={processes}"
    os.environ |= dict(name.split("=") for name in names.split())
    if processes > 1:
        torch.set_num_threads(1)
    train.main(flags)


def finish(process, printed):
    said = printed.read()  # to its end: other ranks and workers have ended too
    process.join()
    assert process.exitcode == 0, said


def state_of(out):
    return torch.load(out / "last" / train.STATE_FILE, weights_only=True)


def outcome(out):
    """All that a run leaves and that must not depend on its interruptions."""
    files = [out / name / "model.safetensors" for name in ("last", "best")]
    state = {name: value for name, value in state_of(out).items() if name != "sums"}
    return [support.log_of(out), state, [safetensors.torch.load_file(file) for file in files]]


def assert_same(got, expected, where="run"):
    """Equal to the bit, whatever is inside."""
    if isinstance(expected, (dict, list, tuple)):
        assert len(got) == len(expected), where
        for name in expected if isinstance(expected, dict) else range(len(expected)):
            assert_same(got[name], expected[name], f"{where}, {name}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected), where
    else:
        assert got == expected, where


@contextlib.contextmanager
def signal_at(step, *signals):
    """Send this process signals in the middle of a step, counted from 1."""
    original, steps = train.compute_loss, []

    def compute_loss(*arguments):
        steps.append(1)
        for number in signals if len(steps) == step else ():
            os.kill(os.getpid(), number)
            time.sleep(0.02)  # two that are not yet handled would count as one
        return original(*arguments)

    train.compute_loss = compute_loss
    yield
    train.compute_loss = original


@pytest.fixture
def stopped(data, tmp_path):
    """The folder of a run that SIGTERM ended in its third step."""
    with signal_at(3, signal.SIGTERM):
        assert run(*data, *TINY, "--out", tmp_path / "stopped") == 143
    return tmp_path / "stopped"


# ---- Resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stopped_and_resumed_run_ends_like_one_that_was_not(variant, data, tmp_path, capsys):
    """SIGTERM in step 7, between two printed lines and two evaluations: to the bit."""
    flags, cut = [*data, *TINY, *VARIANTS[variant]], tmp_path / "cut"
    assert run(*flags, "--out", tmp_path / "whole") == 0
    with signal_at(7, signal.SIGTERM):
        assert run(*flags, "--out", cut) == 143
    said = f"stopped  SIGTERM; step 7 is saved; go on with --resume {cut}\n"
    assert capsys.readouterr().out.endswith(said)
    assert run("--resume", cut) == 0
    assert_same(outcome(cut), outcome(tmp_path / "whole"))


def test_a_run_from_init_goes_on_with_its_own_learning_rates(stopped, data, tmp_path):
    flags = ["--steps", "4", "--batch-size", "8", "--precision", "fp32", "--device", "cpu"]
    flags = [*data, *flags, "--workers", "0", "--init", stopped]
    assert run(*flags, "--out", tmp_path / "whole") == 0
    with signal_at(3, signal.SIGTERM):
        assert run(*flags, "--out", tmp_path / "cut") == 143
    assert run("--resume", tmp_path / "cut") == 0
    assert_same(outcome(tmp_path / "cut"), outcome(tmp_path / "whole"))


def test_sigint_stops_after_the_step_and_a_second_one_at_once(data, tmp_path):
    # A shell that starts something in the background has it ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with signal_at(2, signal.SIGINT):
        assert run(*data, *TINY, "--out", tmp_path / "once") == 130
    assert state_of(tmp_path / "once")["step"] == 2
    with pytest.raises(KeyboardInterrupt), signal_at(2, signal.SIGINT, signal.SIGINT):
        run(*data, *TINY, "--out", tmp_path / "twice")
    assert not (tmp_path / "twice" / "last").exists()
    with signal_at(12, signal.SIGINT):
        assert run(*data, *TINY, "--out", tmp_path / "end") == 0, "nothing is left to stop"
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("moment", [("last", 5), ("metrics", 10)], ids=str)
def test_a_kill_around_an_evaluation_leaves_no_trace(moment, data, tmp_path, monkeypatch):
    """Before the first checkpoint; and between the metrics of step 10 and its checkpoint."""
    assert run(*data, *TINY, "--out", tmp_path / "whole") == 0
    save, log = train.save_checkpoint, train.log

    def dying_save(folder, model, state=None):
        if (folder.name, (state or {}).get("step")) == moment:
            raise Killed
        save(folder, model, state)

    def dying_log(out, line, text):
        log(out, line, text)
        if ("metrics", line["step"]) == moment and "i2t_r1" in line:
            (out / "metrics.jsonl").open("a").write('{"ste')  # a line that was cut
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "save_checkpoint", dying_save)
        patch.setattr(train, "log", dying_log)
        run(*data, *TINY, "--out", tmp_path / "cut")
    assert run("--resume", tmp_path / "cut") == 0
    assert_same(outcome(tmp_path / "cut"), outcome(tmp_path / "whole"))


def test_resuming_refuses_flags_that_change_what_is_learned(stopped, data, tmp_path):
    with pytest.raises(ValueError, match="a resumed run keeps --batch-size, --lr, --out; --init"):
        run("--resume", stopped, "--lr", "0.1", "--batch-size", "4", "--out", tmp_path)
    with pytest.raises(ValueError, match=r"keeps --vision-args; --init"):
        run("--resume", stopped, "--vision-args", "layers=[1]")
    harmless = ["--eval-every", "6", "--log-every", "3", "--workers", "1"]
    assert run("--resume", stopped, *harmless, "--on-bad-image", "skip") == 0
    assert run("--resume", stopped) == 0, "nothing is left to do"
    args = ["--vision-args", "layers=(1,1,1,1)", "channels=(4,4,8,8)"]  # tuples, which json lacks
    assert run(*data, *TINY, "--vision", "resnet18", *args, "--out", tmp_path / "args") == 0
    assert run("--resume", tmp_path / "args", *args) == 0


@pytest.mark.parametrize("place", ["data", "{}/data", "{}/data/../data"])
def test_a_moved_run_goes_on_with_moved_data(place, stopped, data, tmp_path, monkeypatch):
    """Data is known by the names of its images, wherever it lies and however that is spelled."""
    home = tmp_path / "another place"
    shutil.copytree(Path(data[1]).parent, home / "data")
    stopped.rename(home / "run")
    monkeypatch.chdir(home)
    table = Path(f"{place.format(home)}/captions.csv")
    assert run("--resume", "run", "--data", table) == 0
    flags = json.loads(Path("run/train_config.json").read_text())["flags"]
    assert flags["data"] == str(table), "where eval.py finds it"
    table.write_text(table.read_text().replace("\n5.png", "\n6.png"))
    with pytest.raises(ValueError, match="began with other images: .*--data"):
        run("--resume", "run", "--data", table)


def test_a_run_goes_on_where_its_device_is_missing(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, signal_at(3, signal.SIGTERM):
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
        assert run(*data, *TINY, "--out", tmp_path / "run") == 143
    monkeypatch.setattr(dualenc, "pick_precision", lambda *_: "fp16")  # by auto, on another device
    assert run("--resume", tmp_path / "run") == 0


def test_a_broken_training_state_is_refused_by_name_and_nothing_in_it_runs(stopped, tmp_path):
    state = stopped / "last" / train.STATE_FILE

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    for broken in (b"", {"step": 3}, Bomb()):
        state.write_bytes(b"") if broken == b"" else torch.save(broken, state)
        with pytest.raises(ValueError, match=f"cannot read {re.escape(str(state))}"):
            run("--resume", stopped)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "processes", "kills"),
    [("plain", 1, 20), ("cached", 1, 4), ("workers", 1, 4), ("dropout, pieces", 2, 6)],
)
def test_kills_at_random_moments_leave_no_trace(variant, processes, kills, data, tmp_path):
    """SIGKILL to all processes of a run that writes a checkpoint each step."""
    flags = [*data, *TINY, "--steps", 20 + 2 * kills, "--eval-every", "1", *VARIANTS[variant]]
    finish(*forked(processes, *flags, "--out", tmp_path / "whole"))
    rng, command, killed = random.Random(variant), [*flags, "--out", tmp_path / "cut"], 0
    for _ in range(kills):
        process, printed = forked(processes, *command)
        for _ in range(rng.randint(8, 13)):  # lines of the printout, seven before the first step
            printed.readline()
        time.sleep(rng.uniform(0, 0.05))
        killed += process.is_alive()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        printed.read(), process.join()
        command = ["--resume", tmp_path / "cut"]
    assert killed >= kills // 2
    finish(*forked(processes, *command))
    assert_same(outcome(tmp_path / "cut"), outcome(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_to_the_script_saves_and_resuming_ends_the_same(processes, number, data, tmp_path):
    """Ctrl-C reaches the workers too; torchrun hands SIGTERM on, and fails by its own status."""
    flags = [*data, *TINY, *DROPOUT, "--steps", "60", "--eval-every", "60", "--workers", "1"]
    finish(*forked(processes, *flags, "--out", tmp_path / "whole"))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun * (processes > 1), ROOT / "train.py", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command += ["--out", tmp_path / "cut"]
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    while not process.stdout.readline().startswith("step"):
        assert process.poll() is None, process.stderr.read()
    send = os.killpg if processes == 1 else os.kill
    send(process.pid, number)
    said, error = process.communicate(timeout=300)
    assert process.returncode == (130 if processes == 1 else 1), error
    assert "is saved; go on with --resume" in said
    finish(*forked(processes, "--resume", tmp_path / "cut"))
    assert_same(outcome(tmp_path / "cut"), outcome(tmp_path / "whole"))


# ---- Writing -------------------------------------------------------------------------------------


def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(make_model, tmp_path, monkeypatch):
    """The old one or the new one, weights and training state belonging together."""
    models = {"old": make_model(seed=1), "new": make_model(seed=2)}
    names = {os: ("replace", "fsync"), Path: ("rename", "mkdir"), shutil: ("rmtree",)}
    operations = [(owner, name) for owner in names for name in names[owner]]

    def attempt(folder, die_at):
        count = iter(range(1, 1000))

        def perform(original, *arguments, **more):
            if next(count) == die_at:
                raise Killed
            return original(*arguments, **more)

        with monkeypatch.context() as patch:
            for owner, name in operations:
                original = getattr(owner, name)
                patch.setattr(owner, name, lambda *a, f=original, **more: perform(f, *a, **more))
            train.save_checkpoint(folder, models["new"], {"model": "new"})

    seen = set()
    for die_at in range(1, 1000):
        out = tmp_path / str(die_at)
        train.save_checkpoint(out / "last", models["old"], {"model": "old"})
        (out / "train_config.json").write_text("{}")
        with contextlib.suppress(Killed):
            attempt(out / "last", die_at)
            break
        with train.claim_run(train.TrainConfig(resume=str(out))):
            found = state_of(out)["model"]
        weights = dualenc.DualEncoder.from_pretrained(out / "last").text_projection.weight
        assert torch.equal(weights, models[found].text_projection.weight), f"killed at {die_at}"
        train.save_checkpoint(out / "last", models["new"], {"model": "after"})
        assert state_of(out)["model"] == "after", "what is left is no obstacle"
        seen.add(found)
    assert seen == {"old", "new"} and die_at > 12


def test_a_full_disk_keeps_the_last_checkpoint(make_model, tmp_path, monkeypatch):
    full = Mock(side_effect=OSError(28, "No space left on device"))
    model, folder, calls, fsync = make_model(), tmp_path / "last", [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(file) or fsync(file))
    train.save_checkpoint(folder, model, {"step": 1})
    assert len(calls) == len([*folder.iterdir()]), "each file is on the disk before the swap"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch, pytest.raises((OSError, ValueError), match="No space"):
        patch.setattr(os, "fsync", full)
        train.save_checkpoint(folder, model, {"step": 2})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    train.save_checkpoint(folder, model, {"step": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["last"], "no rubbish stays"


def hold(out, is_held):
    with train.claim_run(train.TrainConfig(out=str(out))):
        is_held.set()
        time.sleep(999)


def test_a_folder_is_for_one_run_at_a_time_and_overwritten_only_on_request(data, tmp_path):
    """The lock goes with the process that holds it, even if that is killed."""
    out, is_held = tmp_path / "run", support.FORKSERVER.Event()
    holder = support.FORKSERVER.Process(target=hold, args=(out, is_held), daemon=True)
    holder.start()
    assert is_held.wait(60)
    flags = [*data, *TINY, "--steps", "1", "--out", out]
    with pytest.raises(ValueError, match="another process is using"):
        run(*flags)
    assert (out / train.LOCK_FILE).exists(), "a refused run removed another's folder"
    holder.kill(), holder.join()
    assert run(*flags) == 0
    before = outcome(out)
    with pytest.raises(ValueError, match="run holds a run: --resume .*, or --overwrite"):
        run(*flags, "--seed", "1")
    assert_same(outcome(out), before)
    assert run(*flags, "--seed", "1", "--overwrite") == 0
    assert support.log_of(out, "loss")[0] != before[0][0] and len(support.log_of(out)) == 2
    with pytest.raises(ValueError), patch.object(train, "introduce", side_effect=ValueError):
        run(*flags, "--overwrite")
    assert not (out / "best").exists(), "a run that saved nothing has no model"


@pytest.mark.parametrize("variant", ["plain", "cached"])
def test_a_bad_image_stops_training_or_is_skipped_by_name(variant, tmp_path, capsys):
    data = write_images(tmp_path / "data", 160, bad=[111])
    flags = [*data, *TINY, "--steps", "30", "--log-every", "30", *VARIANTS[variant]]
    with pytest.raises(ValueError, match=r"111.png.*\(--on-bad-image; 1 of 1\d\d images"):
        run(*flags, "--out", tmp_path / "run")
    for workers in (0, 2):
        skip = ["--on-bad-image", "skip", "--workers", workers]
        assert run(*flags, *skip, "--out", tmp_path / f"run{workers}") == 0
        assert re.findall(r"skipped  .*/(\w+.png)", capsys.readouterr().out) == ["111.png"]
    found = outcome(tmp_path / "run0")
    assert_same(outcome(tmp_path / "run2"), found)
    assert [line["bad_images"] for line in found[0] if "loss" in line] == [0, 1]
    if variant == "plain":
        write_images(tmp_path / "data", 160, bad=range(111, 116))  # more than 1% of 120
        with pytest.raises(ValueError, match=r"[2-5] of 1\d\d images; skip allows 1%"):
            run(*flags, *skip, "--out", tmp_path / "run", "--overwrite")


# ---- Several processes ---------------------------------------------------------------------------

CASES = [
    {},
    {"tiled": True},
    {"micro_batch": 2, "tiled": True},
    {"lock": "vision", "micro_batch": 3},
    {"lock": "text", "tiled": True},
    {"lock": "both"},
    {"loss": "siglip", "micro_batch": 2},
    {"loss": "siglip", "tiled": True},
    {"loss": "multi-positive"},
    {"loss": "multi-positive", "micro_batch": 2, "tiled": True},
    {"batch": 6},
]


def take_step(loss="clip", tiled=False, micro_batch=0, lock="", batch=12):
    """The loss and the gradients of this rank's share of a batch, in float64."""
    words = [f"{word} {i % 7}" for i, word in enumerate(("ant", "bee", "cat", "dog") * 3)]
    tokenizer = dualenc.train_tokenizer(words, vocab_size=300, max_length=32)
    model = support.build_model(tokenizer, logit_bias_init=-2.0 if loss == "siglip" else None)
    model = (model.lock(lock) if lock else model).double().train()
    train.TILED_FROM = 1 if tiled else 10_000
    embed, own = dualenc.MicroBatches(model, micro_batch), dualenc.share(batch)
    if dualenc.world_size() > 1:
        embed = torch.nn.parallel.DistributedDataParallel(embed)
    pixels = torch.randint(0, 256, (batch, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    groups, texts = torch.arange(batch) % 7, model.processor(text=words[:batch][own])
    images, texts = embed(pixels[own].to(torch.uint8), texts)
    value = train.compute_loss(loss, model, images, texts, groups)
    value.backward()
    results = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    results["loss"] = dualenc.gather_embeds(value.detach()[None]).mean()
    results["accuracy"] = torch.tensor(train.in_batch_accuracy(images, texts, groups))
    return results


def take_steps(rank, **plain):
    config = train.TrainConfig(batch_size=6, steps=14, seed=3, neighbours=1)
    return list(train.batch_keys(config, range(50), 2)), [
        take_step(**case | plain) for case in CASES
    ]


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_step_of_several_processes_is_that_of_one_on_the_whole_batch(count, monkeypatch):
    """Every gradient, logit_scale's and logit_bias's too, the loss, the accuracy, the batches."""
    monkeypatch.setattr(train, "TILED_FROM", train.TILED_FROM)
    keys, results = zip(*support.in_processes(count, take_steps))
    whole, expected = take_steps(0, tiled=False, micro_batch=0)
    assert [sum(shares, []) for shares in zip(*keys)] == whole
    for rank, steps in enumerate(results):
        for case, got, wanted in zip(CASES, steps, expected):
            assert got.keys() == wanted.keys(), case
            for name, value in wanted.items():
                said = f"{case}, rank {rank}, {name}: {{}}".format
                torch.testing.assert_close(got[name], value, rtol=1e-7, atol=1e-11, msg=said)


def train_here(rank, flags, happening=None):
    """The best metrics, or the exit status and the last line; "signal" or "nan" meets rank 1."""
    loss, steps = train.compute_loss, []

    def compute_loss(*arguments):
        steps.append(torch.initial_seed())
        if happening == "signal" and rank == 1 and len(steps) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        broken = happening == "nan" and rank == 1 and len(steps) == 7
        return loss(*arguments) + (float("nan") if broken else 0.0)

    train.compute_loss, printed = compute_loss, io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            return train.main([str(flag) for flag in flags]), steps
    except SystemExit as stop:
        return stop.code, printed.getvalue().splitlines()[-1]
    except ValueError as error:
        return str(error)


def test_two_processes_stop_together_and_resume_to_the_bit(data, tmp_path):
    """Dropout differs between ranks and is replayed; SIGTERM to one of them stops both."""
    flags, cut = [*data, *TINY, *DROPOUT, "--micro-batch", "3"], tmp_path / "cut"
    one, other = support.in_processes(2, train_here, [*flags, "--out", tmp_path / "whole"])
    assert one[0] == other[0] and len(set(one[1] + other[1])) == 24
    stopped = support.in_processes(2, train_here, [*flags, "--out", cut], "signal")
    said = f"stopped  SIGTERM; step 7 is saved; go on with --resume {cut}"
    assert stopped == [(143, said)] * 2
    with pytest.raises(ValueError, match="began with 2 processes, not 1"):
        train.main(["--resume", str(cut)])
    support.in_processes(2, train_here, ["--resume", cut])
    assert_same(outcome(cut), outcome(tmp_path / "whole"))


def test_a_run_of_two_processes_is_that_of_one_and_nan_stops_both(data, tmp_path):
    flags, two = [*data, *TINY, *VIT], tmp_path / "two"
    assert run(*flags, "--out", tmp_path / "one") == 0
    support.in_processes(2, train_here, [*flags, "--out", two])
    for line, other in zip(outcome(tmp_path / "one")[0], outcome(two)[0], strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-4)
    out = tmp_path / "nan"  # with batch norm, of which each rank has statistics of its own
    errors = support.in_processes(2, train_here, [*data, *TINY, "--out", out], "nan")
    assert errors[0] == errors[1] and "step 7: loss or gradient is not finite" in errors[0]
    assert state_of(out)["step"] == 5
    model, pairs = dualenc.DualEncoder.from_pretrained(out / "best"), data[1]
    pairs = dualenc.load_pairs(pairs, "val", val_fraction=0.25)
    measured = train.evaluation.evaluate(model, pairs)["retrieval"]["i2t_mrr"]
    assert measured == pytest.approx(state_of(out)["best"]["i2t_mrr"], abs=1e-5)
