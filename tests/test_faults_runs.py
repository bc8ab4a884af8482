"""What happens to training runs: kills, signals, full disks, two at once, bad pictures, numbers that break."""

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import dualenc
import eval as evaluation
import train

ROOT = Path(train.__file__).parent
TINY = [
    *("--vision", "test_resnet", "--vision-args", "--image-size", "32", "--projection-dim", "32"),
    *("--text-width", "32", "--text-depth", "1", "--text-heads", "1", "--batch-size", "8", "--steps", "12"),
    *("--eval-every", "5", "--log-every", "4", "--precision", "fp32", "--device", "cpu"),
]
VARIANTS = {
    "plain": [],
    "locked": ["--lock", "vision"],
    "cached": ["--lock", "vision", "--cache-features"],
    "workers": ["--workers", "2"],
    "augmented": ["--crop-scale", "0.5", "--flip"],
    "dropout": ["--vision", "test_vit", "--vision-args", "img_size=32", "--patch-dropout", "0.5", "--image-size", "0"],
    "micro-batched": ["--micro-batch", "3"],
}
VARIANTS["micro-batched, dropout"] = [*VARIANTS["dropout"], *VARIANTS["micro-batched"]]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def write_pictures(folder, count=64, bad=()):
    """Random pictures with a caption each, in captions.csv; those of the numbers in bad are no pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng(0), ["image,caption"]
    for i in range(count):
        path = folder / f"{i:03}.png"
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
        if i in bad:
            path.write_bytes(path.read_bytes()[:200])
        lines.append(f"{path.name},caption number {i} of {rng.integers(100)}")
    (folder / "captions.csv").write_text("\n".join(lines))
    return ["--data", str(folder / "captions.csv"), "--val-fraction", "0.25"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def run(*flags):
    """train.py in this process; its exit status."""
    try:
        train.main([str(flag) for flag in flags])
    except SystemExit as stop:
        return stop.code
    return 0


def script(*flags, name="train.py", **env):
    """train.py in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / name), *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **env},
    )


def finish(process, status=0):
    """(standard output, standard error) of a script that must end with this status."""
    out, error = process.communicate(timeout=300)
    assert process.returncode == status, f"status {process.returncode}\n{out}\n{error}"
    return out, error


def outcome(out):
    """Everything a run leaves that must not depend on its interruptions: weights, optimiser, metrics."""
    state = torch.load(out / "last" / train.STATE_FILE, weights_only=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("pairs_per_s", None), line.pop("data_share", None)
    return {
        "weights": [safetensors.torch.load_file(out / name / "model.safetensors") for name in ("last", "best")],
        "optimizer": state["optimizer"]["state"],
        "state": {name: state[name] for name in ("step", "best", "bad_steps")},
        "metrics": lines,
    }


def assert_same(got, expected, where="run"):
    """Equal to the bit, whatever is inside."""
    if isinstance(expected, dict):
        assert list(got) == list(expected), where
        for name in expected:
            assert_same(got[name], expected[name], f"{where}, {name}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), where
        for i, (one, other) in enumerate(zip(got, expected)):
            assert_same(one, other, f"{where}, {i}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected), where
    else:
        assert got == expected, where


def signal_at(monkeypatch, step, *signals):
    """Send this process signals in the middle of a step, counted from 1 in each run."""
    original, steps = train.train_step, []

    def train_step(*arguments):
        steps.append(1)
        if len(steps) == step:
            for number in signals:
                os.kill(os.getpid(), number)
                time.sleep(0.05)  # two that are not yet handled would count as one
        return original(*arguments)

    monkeypatch.setattr(train, "train_step", train_step)


# ---- Resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_was_stopped_and_resumed_ends_like_one_that_was_not(variant, data, tmp_path, monkeypatch, capsys):
    """SIGTERM in step 7, between two printed lines and between two evaluations: the step is finished and saved."""
    flags = [*data, *TINY, *VARIANTS[variant]]
    assert run(*flags, "--out", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        signal_at(patch, 7, signal.SIGTERM)
        assert run(*flags, "--out", tmp_path / "cut") == 143
    assert f"step 7 is saved; go on with: python train.py --resume {tmp_path / 'cut'}" in capsys.readouterr().out
    assert run("--resume", tmp_path / "cut") == 0
    assert_same(outcome(tmp_path / "cut"), outcome(tmp_path / "whole"))


@pytest.fixture
def sigint_as_in_a_terminal():
    """A shell that starts something in the background has it ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_sigint_stops_after_the_step_and_a_second_one_at_once(data, tmp_path, monkeypatch, sigint_as_in_a_terminal):
    signal_at(monkeypatch, 2, signal.SIGINT)
    assert run(*data, *TINY, "--out", tmp_path / "once") == 130
    assert torch.load(tmp_path / "once" / "last" / train.STATE_FILE, weights_only=True)["step"] == 2
    signal_at(monkeypatch, 2, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(*data, *TINY, "--out", tmp_path / "twice")
    assert not (tmp_path / "twice" / "last").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_killed_before_its_first_checkpoint_starts_again(data, tmp_path, monkeypatch):
    assert run(*data, *TINY, "--out", tmp_path / "whole") == 0
    monkeypatch.setattr(train, "save_checkpoint", lambda *_: sys.exit("killed"))
    assert run(*data, *TINY, "--out", tmp_path / "cut") == "killed"
    monkeypatch.undo()
    assert run("--resume", tmp_path / "cut") == 0
    assert_same(outcome(tmp_path / "cut"), outcome(tmp_path / "whole"))


def test_no_line_of_the_metrics_is_lost_between_an_evaluation_and_its_checkpoint(data, tmp_path, monkeypatch):
    """Killed as it writes the numbers of step 10: the checkpoint must not be ahead of them."""
    assert run(*data, *TINY, "--out", tmp_path / "whole") == 0
    original = train.Run.log

    def log(self, line):
        if line["step"] == 10 and "i2t_r1" in line:
            raise Killed
        original(self, line)

    monkeypatch.setattr(train.Run, "log", log)
    with pytest.raises(Killed):
        run(*data, *TINY, "--out", tmp_path / "cut")
    monkeypatch.undo()
    assert run("--resume", tmp_path / "cut") == 0
    assert_same(outcome(tmp_path / "cut"), outcome(tmp_path / "whole"))


def test_the_order_of_pictures_is_a_function_of_seed_and_step():
    whole = list(train.Batches(50, 8, seed=3, first_step=0, steps=20))
    assert list(train.Batches(50, 8, seed=3, first_step=13, steps=20)) == whole[13:]
    assert list(train.Batches(50, 8, seed=4, first_step=0, steps=20)) != whole


def test_resuming_refuses_flags_that_change_what_is_learned_and_takes_others(data, tmp_path, monkeypatch):
    signal_at(monkeypatch, 3, signal.SIGTERM)
    assert run(*data, *TINY, "--out", tmp_path / "run") == 143
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"keeps its flags.*--lr \(was 0.001\), --batch-size|--batch-size.*--lr"):
        run("--resume", tmp_path / "run", "--lr", "0.1", "--batch-size", "4")
    with pytest.raises(ValueError, match=r"these differ from .*run: --vision-args \(was \{\}\)$"):
        run("--resume", tmp_path / "run", "--vision-args", "layers=[1]")
    harmless = ["--eval-every", "6", "--log-every", "3", "--workers", "1", "--on-bad-picture", "skip"]
    assert run("--resume", tmp_path / "run", *harmless) == 0


def test_resuming_refuses_data_that_changed(tmp_path, monkeypatch):
    data = write_pictures(tmp_path / "data")
    signal_at(monkeypatch, 3, signal.SIGTERM)
    assert run(*data, *TINY, "--out", tmp_path / "run") == 143
    table = tmp_path / "data" / "captions.csv"
    table.write_text(table.read_text().replace("caption number 5", "another caption"))
    with pytest.raises(ValueError, match="has changed since .*run began"):
        run("--resume", tmp_path / "run")


def test_a_flag_that_holds_a_list_is_the_same_when_a_run_is_resumed(data, tmp_path, monkeypatch):
    signal_at(monkeypatch, 3, signal.SIGTERM)
    flags = [*TINY, "--vision", "resnet18", "--vision-args", "layers=[1,1,1,1]", "channels=(4,4,8,8)"]
    assert run(*data, *flags, "--out", tmp_path / "run") == 143
    assert run("--resume", tmp_path / "run", "--vision-args", "layers=[1,1,1,1]", "channels=(4,4,8,8)") == 0


def test_a_run_goes_on_where_the_device_it_was_saved_from_is_missing(data, tmp_path, monkeypatch):
    signal_at(monkeypatch, 3, signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
        assert run(*data, *TINY, "--out", tmp_path / "run") == 143
    with pytest.raises(RuntimeError, match="CUDA|cuda"):
        torch.load(tmp_path / "run" / "last" / train.STATE_FILE, weights_only=True)
    assert run("--resume", tmp_path / "run") == 0


def test_a_broken_training_state_is_refused_by_name_and_nothing_in_it_runs(data, tmp_path, monkeypatch):
    signal_at(monkeypatch, 3, signal.SIGTERM)
    assert run(*data, *TINY, "--out", tmp_path / "run") == 143
    state = tmp_path / "run" / "last" / train.STATE_FILE

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    for broken in ({"step": 3}, Bomb()):
        torch.save(broken, state)
        with pytest.raises(ValueError, match=f"cannot read {re.escape(str(state))}"):
            run("--resume", tmp_path / "run")
    state.write_bytes(b"")
    with pytest.raises(ValueError, match=f"cannot read {re.escape(str(state))}"):
        run("--resume", tmp_path / "run")
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_sigint_to_the_process_group_of_the_real_script_with_workers(data, tmp_path):
    """Ctrl-C in a terminal reaches the workers too; the run still ends in order, and its own advice works."""
    out = tmp_path / "a run"
    flags = [*data, *TINY, "--steps", "100000", "--eval-every", "100000", "--workers", "2", "--out", out]
    process = script(*flags)
    while not process.stdout.readline().startswith("step"):
        assert process.poll() is None, process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)
    said, error = finish(process, status=130)
    assert not error
    advice = shlex.split(re.search(r"go on with: (.*)", said)[1])
    assert advice == ["python", "train.py", "--resume", str(out)]
    step = torch.load(out / "last" / train.STATE_FILE, weights_only=True)["step"]
    resumed = script(*advice[2:])
    while not (line := resumed.stdout.readline()).startswith("step"):
        assert resumed.poll() is None, resumed.stderr.read()
    assert int(re.search(r"[\d,]+", line)[0].replace(",", "")) == (step // 4 + 1) * 4
    os.kill(resumed.pid, signal.SIGTERM)
    finish(resumed, status=143)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "kills"), [("plain", 20), ("micro-batched, dropout", 4), ("locked", 4), ("cached", 6), ("workers", 4)]
)
def test_twenty_kills_at_random_moments_leave_no_trace(variant, kills, data, tmp_path):
    """SIGKILL again and again in one run that writes a checkpoint each step; it ends like one that was left alone.

    A cache is thrown away after each kill, so that every start makes it anew, and some are killed as they do.
    """
    flags = [*data, *TINY, "--steps", "60", "--eval-every", "1", "--log-every", "3", *VARIANTS[variant]]
    finish(script(*flags, "--out", tmp_path / "whole"))
    rng, out, inside_a_write, inside_the_cache = random.Random(f"kills {variant}"), tmp_path / "cut", 0, 0
    command, killed, store = [*flags, "--out", out], 0, Path(data[1]).with_name(".captions.csv.features")
    while killed < kills:
        shutil.rmtree(store, ignore_errors=True)
        process = script(*command)
        # Lines of the printout, four of them before the first step or the cache.
        for _ in range(4 if variant == "cached" and killed < 4 else rng.randint(5, 10)):
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.05))
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)  # until the workers have noticed and ended too
        killed += 1
        inside_a_write += any(out.glob("*.new")) or any(out.glob("*.old")) or any(out.glob("*/*.tmp"))
        inside_the_cache += len([*store.glob("*/*/rows-*.npy")]) > len([*store.glob("*/*/pictures.json")])
        command = ["--resume", out]
    assert killed >= kills // 2
    finish(script("--resume", out))
    assert_same(outcome(out), outcome(tmp_path / "whole"))
    print(f"{killed} kills, {inside_a_write} of them inside a checkpoint write, {inside_the_cache} inside the cache's")


ORPHANS = """
import multiprocessing, os, sys, time, dualenc
run, begun, late = os.getpid(), multiprocessing.Value("i", 0), sys.argv[1] == "before"
def work():
    while late and os.getppid() == run:
        time.sleep(0.01)
    dualenc.start_worker(0)
    with begun:
        begun.value += 1
    time.sleep(600)
for _ in range(2):
    multiprocessing.get_context("fork").Process(target=work).start()
while not late and begun.value < 2:
    time.sleep(0.01)
os._exit(0)
"""


@pytest.mark.parametrize("killed", ["before", "after"])
def test_workers_end_with_their_run_whether_it_was_killed_before_or_after_they_began(killed):
    """Their ends of the run's pipes would stay open for ever: this test would wait for them. Each of two workers holds
    what the other one waits for, so that they must end one after the other."""
    subprocess.run([sys.executable, "-c", ORPHANS, killed], cwd=ROOT, timeout=60, capture_output=True)


SIGNALLED = """
import multiprocessing, os, signal, time, dualenc
begun = multiprocessing.Value("i", 0)
def work():
    dualenc.start_worker(0)
    begun.value = 1
    time.sleep(2)
    print("worked on", flush=True)
worker = multiprocessing.get_context("fork").Process(target=work)
worker.start()
while not begun.value:
    time.sleep(0.01)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.killpg(0, signal.SIGTERM)
os.kill(worker.pid, signal.SIGINT)
worker.join()
"""


def test_stopping_is_left_to_the_run():
    """A terminal and torchrun signal a whole group; a worker that ended would be an error in the run, which wants to
    save."""
    command = [sys.executable, "-c", SIGNALLED]
    ran = subprocess.run(command, cwd=ROOT, timeout=60, capture_output=True, text=True, start_new_session=True)
    assert ran.stdout == "worked on\n"


def test_a_program_ends_though_its_workers_were_never_told_to():
    """As after an error in a loop over pictures: Python then sends its workers SIGTERM, once, and waits for them."""
    code = """
import builtins, dualenc, torch
loader = torch.utils.data.DataLoader(range(80), num_workers=1, worker_init_fn=dualenc.start_worker)
builtins.held = iter(loader)
next(builtins.held)
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("loader", ["steps", "evaluation", "check"])
def test_every_loader_starts_its_workers_in_the_same_way(loader, make_model, monkeypatch, tmp_path):
    monkeypatch.setattr(dualenc, "start_worker", lambda number: (tmp_path / "started").touch())
    pairs, model = dualenc.ShapesPairs(count=8, side=32), make_model()
    if loader == "steps":
        next(
            iter(train.make_loader(pairs, model, train.TrainConfig(batch_size=4, workers=1), torch.device("cpu"), 0, 2))
        )
    elif loader == "evaluation":
        evaluation.embed_pictures(model, pairs.pictures, workers=1)
    else:
        dualenc.drop_unreadable(pairs, workers=1)
    assert (tmp_path / "started").exists()


# ---- Writing --------------------------------------------------------------------------------------------------------


def test_a_kill_at_any_file_operation_of_a_checkpoint_leaves_a_whole_one(make_model, tmp_path, monkeypatch):
    """The old one or the new one, weights and training state belonging together."""
    old, new = make_model(seed=1), make_model(seed=2)
    operations = [(os, "replace"), (os, "fsync"), (Path, "rename"), (Path, "mkdir"), (shutil, "rmtree")]

    def attempt(folder, die_at):
        count = 0

        def deadly(original):
            def operation(*arguments, **more):
                nonlocal count
                count += 1
                if count == die_at:
                    raise Killed
                return original(*arguments, **more)

            return operation

        with monkeypatch.context() as patch:
            for owner, name in operations:
                patch.setattr(owner, name, deadly(getattr(owner, name)))
            train.save_checkpoint(folder, new, {"model": "new"})

    seen, die_at = set(), 0
    while True:
        die_at += 1
        folder = tmp_path / str(die_at) / "last"
        train.save_checkpoint(folder, old, {"model": "old"})
        with contextlib.suppress(Killed):
            attempt(folder, die_at)
            break
        train.finish_swap(folder)
        state = torch.load(folder / train.STATE_FILE, weights_only=True)["model"]
        model = dualenc.DualEncoder.from_pretrained(folder)
        assert torch.equal(model.logit_scale, old.logit_scale)
        expected = {"old": old, "new": new}[state].text_projection.weight
        assert torch.equal(model.text_projection.weight, expected), f"killed at operation {die_at}"
        train.save_checkpoint(folder, new, {"model": "after"})
        assert torch.load(folder / train.STATE_FILE, weights_only=True)["model"] == "after", (
            "what is left is no obstacle"
        )
        seen.add(state)
    assert seen == {"old", "new"} and die_at > 12


def test_an_evaluation_finds_the_best_checkpoint_there_is(tmp_path):
    """Between the two renames it is best.old; before the first evaluation there is only last."""
    for name in ("last", "best.old", "best"):
        (tmp_path / name).mkdir()
        assert evaluation.find_checkpoint(tmp_path)[0] == tmp_path / name


def disk_is_full(*_):
    raise OSError(28, "No space left on device")


def test_a_line_of_the_metrics_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """As a checkpoint is: a full disk leaves the lines before."""
    run, path = types.SimpleNamespace(out=tmp_path), tmp_path / "metrics.jsonl"
    train.drop_metrics_after(tmp_path, 0)  # as every run begins
    train.Run.log(run, {"step": 1})

    monkeypatch.setattr(os, "fsync", disk_is_full)
    with pytest.raises(OSError, match="cannot write .*metrics.jsonl: No space left on device"):
        train.Run.log(run, {"step": 2})
    monkeypatch.undo()
    assert path.read_text() == '{"step": 1}\n' and list(tmp_path.iterdir()) == [path]
    train.Run.log(run, {"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_a_resumed_run_drops_the_lines_after_its_checkpoint_and_names_a_file_it_cannot_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 3}\n')
    train.drop_metrics_after(tmp_path, 2)
    assert path.read_text() == '{"step": 1}\n'
    path.write_text('{"step": 1}\n{"ste')
    with pytest.raises(ValueError, match="cannot read .*metrics.jsonl"):
        train.drop_metrics_after(tmp_path, 2)
    assert path.read_text() == '{"step": 1}\n{"ste'


@contextlib.contextmanager
def small_disk(folder, size, options=""):
    """A file system of this size, as root; else the test is skipped."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_with_a_message_and_the_earlier_checkpoint(data, tmp_path):
    """The disk holds two checkpoints; something else then fills it; with room again, the run goes on."""
    with small_disk(tmp_path / "disk", "20m") as disk:
        process = script(*data, *TINY, "--steps", "10000", "--eval-every", "10", "--out", disk / "run")
        while not process.stdout.readline().startswith("eval"):
            assert process.poll() is None, process.stderr.read()
        with contextlib.suppress(OSError), open(disk / "filler", "wb") as filler:
            while True:
                filler.write(bytes(10_000))
                filler.flush()
        _, error = finish(process, status=1)
        assert "No space left on device" in error and "Traceback" not in error and str(disk / "run") in error
        dualenc.DualEncoder.from_pretrained(disk / "run" / "last")
        assert not list((disk / "run").glob("*.new"))
        (disk / "filler").unlink()
        process = script("--resume", disk / "run")
        while not process.stdout.readline().startswith("eval"):
            assert process.poll() is None, process.stderr.read()
        os.kill(process.pid, signal.SIGTERM)
        finish(process, status=143)


def test_a_failed_write_leaves_the_old_checkpoint_and_no_rubbish(make_model, tmp_path, monkeypatch):
    model, folder = make_model(), tmp_path / "last"

    monkeypatch.setattr(os, "fsync", disk_is_full)
    with pytest.raises(ValueError, match="cannot write .*No space left on device; there is no .*last yet"):
        train.save_checkpoint(folder, model)
    monkeypatch.undo()
    train.save_checkpoint(folder, model)
    monkeypatch.setattr(os, "fsync", disk_is_full)
    with pytest.raises(ValueError, match="No space left on device; .*last is as it was"):
        train.save_checkpoint(folder, model)
    assert [path.name for path in tmp_path.iterdir()] == ["last"] and not list(folder.glob("*.tmp"))


def test_a_folder_that_cannot_be_written_is_named(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(*data, *TINY, "--out", tmp_path / "file" / "run")
    with small_disk(tmp_path / "disk", "1m", ",ro") as disk, pytest.raises(OSError, match="Read-only.*disk"):
        run(*data, *TINY, "--out", disk / "run")


def test_two_runs_into_one_folder_are_refused_until_the_first_ends(data, tmp_path):
    """The lock goes with the process that holds it, even if that is killed."""
    out = tmp_path / "run"
    hold = f"""
import sys, train
held = train.claim_run(train.TrainConfig(out={str(out)!r}))
print("held", flush=True)
sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    holder = subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, **pipes)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="another process trains into"):
        run(*data, *TINY, "--out", out)
    holder.kill()
    holder.communicate()
    assert run(*data, *TINY, "--steps", "1", "--out", out) == 0


def test_a_finished_run_is_overwritten_only_on_request(data, tmp_path):
    flags = [*data, *TINY, "--steps", "1", "--out", tmp_path / "run"]
    assert run(*flags) == 0
    weights = (tmp_path / "run" / "last" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "stale.txt").write_text("")
    with pytest.raises(ValueError, match="already holds a run.*--resume.*--overwrite"):
        run(*flags, "--seed", "1")
    assert (tmp_path / "run" / "last" / "model.safetensors").read_bytes() == weights
    assert run(*flags, "--seed", "1", "--overwrite") == 0
    assert (tmp_path / "run" / "last" / "model.safetensors").read_bytes() != weights
    assert not (tmp_path / "run" / "stale.txt").exists()


# ---- Bad pictures ---------------------------------------------------------------------------------------------------


def test_a_bad_picture_stops_training_by_name_and_nothing_is_lost(tmp_path):
    """File and row are named, the steps before are saved, and the run goes on without the picture."""
    data = write_pictures(tmp_path / "data", 64, bad=range(64))
    with pytest.raises(
        ValueError, match=r"captions.csv, line \d+: cannot read picture .*\.png: .*--on-bad-picture skip"
    ):
        run(*data, *TINY, "--out", tmp_path / "none")
    data = write_pictures(tmp_path / "data", 120, bad=[111])
    for workers in (0, 2):
        out = tmp_path / f"run{workers}"
        flags = [*data, *TINY, "--steps", "15", "--workers", workers, "--out", out]
        with pytest.raises(
            ValueError, match=r"line 113: cannot read picture .*111.png: .*step \d+ is saved; go on with"
        ):
            run(*flags)
        assert run("--resume", out, "--on-bad-picture", "skip") == 0
    assert_same(outcome(tmp_path / "run0"), outcome(tmp_path / "run2"))
    assert run(*flags[:-1], tmp_path / "skip", "--on-bad-picture", "skip") == 0
    assert_same(outcome(tmp_path / "run0"), outcome(tmp_path / "skip"))
    listed = (tmp_path / "skip" / "bad_pictures.txt").read_text().splitlines()
    assert len(listed) == 1 and re.fullmatch(r"111.png\t.*line 113: cannot read picture .*", listed[0])


def test_more_than_one_per_cent_of_bad_pictures_stop_a_run_that_skips_them(tmp_path):
    data = write_pictures(tmp_path / "data", 128, bad=[3, 77])
    with pytest.raises(ValueError, match=r"2 of 128 pictures cannot be read, more than 1%; .*bad_pictures.txt lists"):
        run(*data, *TINY, "--steps", "50", "--on-bad-picture", "skip", "--out", tmp_path / "run")
    assert len((tmp_path / "run" / "bad_pictures.txt").read_text().splitlines()) == 2


def test_a_batch_with_bad_pictures_is_smaller_and_never_repeats_one(tmp_path):
    pairs = dualenc.load_pairs(write_pictures(tmp_path, 64, bad=[5, 9])[1], "train", val_fraction=0)
    transform = dualenc.ImageTransform(resize=32, crop=(32, 32))
    items = train.TrainingPairs(pairs, transform, train.TrainConfig())
    images, captions, numbers, bad = train.stack_batch([items[0, i] for i in (4, 5, 6, 9)])
    assert images.shape == (2, 3, 32, 32) and numbers == [4, 6] and list(bad) == [5, 9] and len(captions) == 2
    notes = train.BadPictures(tmp_path, "skip", 1000)
    with pytest.raises(train.DataFault, match="fewer than two pictures of this batch"):
        notes.check(train.stack_batch([items[0, i] for i in (4, 5)]), pairs.names)
    assert train.stack_batch([items[0, 5]])[0] is None


def test_bad_pictures_that_were_mended_are_no_longer_counted(tmp_path):
    bad = {"a.png": "cut", "b.png": "cut"}
    with pytest.raises(train.DataFault, match="2 of 128 pictures cannot be read"):
        train.BadPictures(tmp_path, "skip", 128).add(bad)
    resumed = train.BadPictures(tmp_path, "skip", 128)
    resumed.add({})
    resumed.add({"a.png": "cut"})
    assert resumed.found == bad
    with pytest.raises(train.DataFault, match="2 of 128 pictures cannot be read"):
        resumed.add({"b.png": "cut"})


def test_the_list_of_bad_pictures_survives_strange_names(tmp_path):
    """Line ends, tabs, and bytes that are no UTF-8, as old disks have them."""
    bad = {"a\nb\tc.png": "two\nlines", os.fsdecode(b"caf\xe9.png"): "no picture", "d\x85.png": "empty"}
    train.BadPictures(tmp_path, "skip", 1000).add(bad)
    found = train.BadPictures(tmp_path, "skip", 1000).found
    assert found == {"a b c.png": "two lines", os.fsdecode(b"caf\xe9.png"): "no picture", "d .png": "empty"}


def test_bad_held_out_pictures_are_named_or_left_out_by_both_scripts(tmp_path, capsys):
    data = write_pictures(tmp_path / "data", 200)
    name = dualenc.load_pairs(data[1], "val", val_fraction=0.25).names[0]
    (tmp_path / "data" / name).write_bytes(b"not a picture")
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=rf"cannot evaluate: .*{name}.*step 5 is saved; go on with"):
        run(*data, *TINY, "--out", out)
    assert run("--resume", out, "--on-bad-picture", "skip") == 0
    late = tmp_path / "late"
    with pytest.raises(ValueError, match=rf"cannot evaluate: .*{name}.*step 12 is saved; go on with"):
        run(*data, *TINY, "--eval-every", "100", "--out", late)
    assert run("--resume", late, "--on-bad-picture", "skip") == 0
    assert run(*data, *TINY, "--on-bad-picture", "skip", "--out", tmp_path / "skip") == 0
    assert_same(outcome(out), outcome(tmp_path / "skip"))
    assert outcome(late)["metrics"][-1] == outcome(out)["metrics"][-1]
    capsys.readouterr()
    with pytest.raises(ValueError, match=rf"line \d+: cannot read picture .*{name}"):
        evaluation.main([str(out)])
    skipping = evaluation.main([str(out), "--on-bad-picture", "skip"])
    assert f"skipped     {name}: " in capsys.readouterr().out
    assert skipping["retrieval"]["n_images"] == len(dualenc.load_pairs(data[1], "val", val_fraction=0.25)) - 1


class Deadly(list):
    """Pictures whose reader dies, as the system kills one that takes too much memory."""

    def __getitem__(self, i):
        os._exit(1)


def test_a_worker_that_dies_in_an_evaluation_is_reported_and_the_steps_before_are_saved(data, tmp_path, monkeypatch):
    evaluate = evaluation.evaluate

    def with_deadly_pictures(model, pairs, **options):
        pairs.pictures = Deadly(pairs.pictures)
        return evaluate(model, pairs, **options)

    monkeypatch.setattr(evaluation, "evaluate", with_deadly_pictures)
    with pytest.raises(ValueError, match="cannot evaluate: a worker that reads pictures ended.*step 5 is saved; go on"):
        run(*data, *TINY, "--workers", "1", "--out", tmp_path / "run")
    dualenc.DualEncoder.from_pretrained(tmp_path / "run" / "last")
    pairs = dualenc.load_pairs(data[1], val_fraction=0)
    pairs.pictures = Deadly(pairs.pictures)
    with pytest.raises(ValueError, match="a worker that reads pictures ended"):
        dualenc.drop_unreadable(pairs, workers=1)


@pytest.mark.slow
def test_a_worker_that_dies_is_reported_and_the_steps_before_are_saved(data, tmp_path):
    flags = [*data, *TINY, "--steps", "100000", "--eval-every", "100000", "--workers", "1"]
    process = script(*flags, "--out", tmp_path / "run")
    while not process.stdout.readline().startswith("step"):
        assert process.poll() is None, process.stderr.read()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        pytest.skip("needs /proc to find the worker")
    for child in children.read_text().split():
        os.kill(int(child), signal.SIGKILL)
    _, error = finish(process, status=1)
    assert "a worker that reads pictures ended" in error and "is saved; go on with" in error
    assert "Traceback" not in error.splitlines()[-1]
    dualenc.DualEncoder.from_pretrained(tmp_path / "run" / "last")


# ---- Numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_or_is_skipped_and_counted(broken, data, tmp_path, monkeypatch):
    original, calls = train.compute_loss, []

    def compute_loss(*arguments):
        calls.append(1)
        loss = original(*arguments)
        if len(calls) != 7:
            return loss
        # Infinity added leaves the slope as it is; the square root is finite at 0, its slope is not.
        return loss + float("inf") if broken == "loss" else loss + (loss - loss.detach()).abs().sqrt()

    monkeypatch.setattr(train, "compute_loss", compute_loss)
    with pytest.raises(
        ValueError, match=r"step 7: .*no longer finite.*learning rate .*e-\d+, scale 14.*last, of step 5"
    ):
        run(*data, *TINY, "--out", tmp_path / "stop")
    calls.clear()
    add, timed = train.Meter.add, []
    monkeypatch.setattr(train.Meter, "add", lambda self, *what: timed.append(what) or add(self, *what))
    assert run(*data, *TINY, "--on-bad-step", "skip", "--out", tmp_path / "skip") == 0
    assert len(timed) == 12 and timed[6] == (None, False), "the time of a step that is skipped counts"
    result = outcome(tmp_path / "skip")
    assert result["state"]["bad_steps"] == 1 and result["metrics"][-2]["bad_steps"] == 1
    assert all(weight.isfinite().all() for weight in result["weights"][0].values())
    assert next(iter(result["optimizer"].values()))["step"] == 11  # of 12 steps, one was no update


def test_ten_bad_steps_in_a_row_stop_a_run_that_skips_them(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "compute_loss", lambda name, model, *_: model.logit_scale * float("inf"))
    with pytest.raises(ValueError, match="step 10: .*10 in a row.*no checkpoint was saved yet"):
        run(*data, *TINY, "--eval-every", "100", "--on-bad-step", "skip", "--out", tmp_path / "run")


def test_bad_steps_with_good_ones_between_them_are_skipped_however_many_there_are(data, tmp_path, monkeypatch):
    original, calls = train.compute_loss, []

    def compute_loss(*arguments):
        calls.append(1)
        return original(*arguments) * (float("inf") if len(calls) % 2 else 1)

    monkeypatch.setattr(train, "compute_loss", compute_loss)
    flags = ["--steps", str(2 * train.BAD_STEPS_IN_A_ROW + 2), "--eval-every", "100", "--on-bad-step", "skip"]
    assert run(*data, *TINY, *flags, "--out", tmp_path / "run") == 0
    assert outcome(tmp_path / "run")["state"]["bad_steps"] == train.BAD_STEPS_IN_A_ROW + 1


def test_weights_that_break_in_an_update_never_become_a_checkpoint(data, tmp_path):
    """A learning rate beyond reason: the loss was finite, the weights after it are not, and R@1 would read 100%."""
    with pytest.raises(ValueError, match="step .*finite numbers.*learning rate .*no checkpoint was saved yet"):
        run(*data, *TINY, "--lr", "1e38", "--eval-every", "1", "--clip-grad", "0", "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "last").exists()


def with_captions(folder, captions):
    """Training pairs of random pictures with these captions, all of them for training but a few."""
    write_pictures(folder, len(captions))
    lines = ["image,caption", *(f"{i:03}.png,{caption}" for i, caption in enumerate(captions))]
    (folder / "captions.csv").write_text("\n".join(lines))
    return ["--data", str(folder / "captions.csv"), "--val-fraction", "0.2"]


def test_data_without_differences_are_refused_with_the_floor(tmp_path):
    chance = f"{np.log(8):.3f}"
    constant = with_captions(tmp_path / "captions", ["a photo"] * 40)
    for loss, floor in (("clip", chance), ("siglip", r"\d\.\d+"), ("multi-positive", "0.000")):
        with pytest.raises(ValueError, match=f"share their caption or class.*floor of {floor}, which is chance"):
            run(*constant, *TINY, "--loss", loss, "--out", tmp_path / "run")
    data = with_captions(tmp_path / "pictures", [f"photo number {i}" for i in range(40)])
    for path in (tmp_path / "pictures").glob("*.png"):
        Image.new("RGB", (32, 32), "teal").save(path)
    with pytest.raises(ValueError, match=f"look the same, pixel for pixel.*floor of {chance}, which is chance"):
        run(*data, *TINY, "--out", tmp_path / "run")
    for part in ("train", "val"):
        write_pictures(tmp_path / "rare" / part / "cat", 2)
        write_pictures(tmp_path / "rare" / part / "dog", 98)
    rare = train.TrainConfig(data=tmp_path / "rare", batch_size=2)
    pairs, held_out, _ = train.load_data(rare)
    train.check_recipe(rare, pairs, held_out)  # though few batches show anything to tell apart
    for part in ("train", "val"):
        write_pictures(tmp_path / "classes" / part / "dog", 20)
    with pytest.raises(ValueError, match=f"share their caption or class.*floor of {chance}"):
        run("--data", tmp_path / "classes", *TINY, "--out", tmp_path / "run")


def test_a_bad_picture_does_not_hide_that_all_others_are_the_same(tmp_path):
    write_pictures(tmp_path, 20)
    for path in tmp_path.glob("*.png"):
        Image.new("RGB", (32, 32), "teal").save(path)
    (tmp_path / "003.png").write_bytes(b"")
    pairs = dualenc.load_pairs(tmp_path / "captions.csv", "train", val_fraction=0)
    assert train.same_pictures(pairs)


def test_half_of_the_captions_alike_train_and_the_floor_is_reported(tmp_path, capsys):
    """Half of a batch of 8 are alike, about 4: their loss cannot fall below ln 4, the others' can reach 0."""
    captions = ["a photo"] * 50 + [f"photo number {i}" for i in range(50)]
    assert run(*with_captions(tmp_path / "data", captions), *TINY, "--out", tmp_path / "run") == 0
    head = re.search(r"loss     chance 2\.079, floor (\d\.\d+): pairs of one caption", capsys.readouterr().out)
    assert abs(float(head[1]) - np.log(4) / 2) < 0.25
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0.2 < line["floor_loss"] < 1.5


@pytest.mark.parametrize("name", ["clip", "siglip", "multi-positive"])
def test_the_floor_is_the_best_loss_that_any_logits_reach(name):
    """Pairs that look alike share their logits: the best such logits, found by gradient descent, stop at the floor."""
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 3, 4])
    chance, floor = train.reference_losses(name, groups)
    free = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=0.1)
    same = (groups[:, None] == groups[None, :]).double()
    for _ in range(3000):
        logits = free[groups][:, groups]
        if name == "siglip":
            eye = torch.eye(8, dtype=torch.float64)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, eye, reduction="sum") / 8
        else:
            target = torch.arange(8) if name == "clip" else same / same.sum(1, keepdim=True)
            both = [torch.nn.functional.cross_entropy(side, target) for side in (logits, logits.T)]
            loss = sum(both) / 2 - (same.sum(1).log().mean() if name == "multi-positive" else 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert floor - 1e-6 <= loss.item() < floor + 0.01 and floor < chance


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--log-every", "0"], "--log-every is 0, expected at least 1"),
        (["--lr", "nan"], "--lr is nan"),
        (["--steps", "-1"], "--steps is -1"),
        (["--val-fraction", "0"], "no pictures are held out"),
    ],
)
def test_flags_without_sense_are_refused(flags, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(*data, *TINY, *flags, "--out", tmp_path / "run")


# ---- Environment ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_hash_seed_locale_home_and_spaces_change_nothing(tmp_path):
    """Two runs of the real script in different surroundings: the same weights to the bit."""
    data = write_pictures(tmp_path / "my data é")
    plain = {"PYTHONHASHSEED": "1", "LC_ALL": "C.UTF-8"}
    strange = {
        "PYTHONHASHSEED": "2",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
        "HOME": "/proc/no home",
        "HF_HOME": "/proc/no home/hf",
    }
    finish(script(*data, *TINY, "--out", tmp_path / "one", **plain))
    out = tmp_path / "a run with spaces ü"
    said, _ = finish(script(*data, *TINY, "--out", out, **strange))
    assert_same(outcome(out), outcome(tmp_path / "one"))
    finish(script(out, name="eval.py", **strange))
    assert "python eval.py '" in said


def test_cuda_asked_for_but_absent_and_unknown_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="device cuda was asked for, but torch sees no CUDA device"):
        dualenc.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert dualenc.pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device cuda:2 was asked for"):
        dualenc.pick_device("cuda:2")
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        dualenc.pick_device("gpu")


def test_errors_end_a_script_with_one_line_and_status_1(monkeypatch, capsys):
    def fails(error):
        def main():
            raise error

        return main

    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    for error in (ValueError("no such thing"), PermissionError(13, "denied", "file")):
        with pytest.raises(SystemExit) as stop:
            dualenc.run_script(fails(error))
        assert stop.value.code == f"train.py: error: {error}"
    with pytest.raises(SystemExit) as stop:
        dualenc.run_script(fails(KeyboardInterrupt()))
    assert stop.value.code == 130


@pytest.mark.slow
def test_a_hub_id_out_of_reach_is_one_clear_line(tmp_path):
    """Neither offline mode nor a network that refuses ends in a stack trace."""
    nowhere = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    for env in ({"HF_HUB_OFFLINE": "1"}, {}):
        _, error = finish(script("nobody/nothing", "--data", "shapes", name="eval.py", **nowhere, **env), status=1)
        assert "nobody/nothing is neither a folder nor a hub id within reach" in error and "Traceback" not in error
        flags = ["--vision", "test_vit", "--vision-args", "--pretrained", "--out", tmp_path / "run"]
        _, error = finish(script(*flags, **nowhere, **env), status=1)
        assert "with the weights of test_vit" in error and "Traceback" not in error
