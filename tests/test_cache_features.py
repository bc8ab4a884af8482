"""Claims about --cache-features: the locked tower runs once a picture, and nothing else changes, to the bit."""

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_VIT
from PIL import Image
from test_faults_runs import Killed, assert_same, outcome, small_disk, write_pictures
from test_processes import in_processes, train_here

import dualenc
import eval as evaluation
import train

TINY = [
    *("--lock", "vision", "--projection-dim", "16", "--text-width", "16", "--text-depth", "1", "--text-heads", "1"),
    *("--batch-size", "16", "--steps", "10", "--eval-every", "4", "--log-every", "2", "--device", "cpu"),
]
TOWERS = {
    "batch-norm": ["--vision", "test_resnet", "--image-size", "32"],
    "vit": ["--vision", "test_vit", "--vision-args", "img_size=32"],
    "micro-batches": ["--vision", "test_vit", "--vision-args", "img_size=32", "--micro-batch", "8"],
    "patch-dropout": ["--vision", "test_vit", "--vision-args", "img_size=32", "--patch-dropout", "0.5"],
}
RESNET = TOWERS["batch-norm"]
# Threads that share a product round a row by its place, which is all that may part a cached run from another.
pytestmark = [
    pytest.mark.filterwarnings("ignore:--lock vision freezes random weights"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture
def run(tmp_path):
    """A function that trains: run("name", *flags) returns the run folder."""

    def go(name, *flags, precision="fp32", workers=0):
        out = tmp_path / name
        flags = [*TINY, "--precision", precision, "--workers", workers, "--out", out, *flags]
        train.main([str(flag) for flag in flags])
        return out

    return go


@pytest.fixture
def counted(monkeypatch):
    """The number of pictures in each call of a vision tower."""
    calls, forward = [], dualenc.VisionEncoder.forward

    def count(self, pixel_values, *rest, **more):
        calls.append(len(pixel_values))
        return forward(self, pixel_values, *rest, **more)

    monkeypatch.setattr(dualenc.VisionEncoder, "forward", count)
    return calls


def captions_of(folder, **settings):
    return write_pictures(folder, count=53, **settings)


def classes_of(folder):
    """Class folders with a training and a test part whose pictures have the same names."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 5)):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return ["--data", folder]


def photographs_of(folder):
    """JPEGs so large that they are decoded at a part of their size."""
    rng, lines = np.random.default_rng(0), ["image,caption"]
    folder.mkdir()
    for i in range(53):
        pixels = rng.integers(0, 256, (12, 18, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((360, 240)).save(folder / f"{i}.jpg")
        lines.append(f"{i}.jpg,photograph {i}")
    (folder / "captions.csv").write_text("\n".join(lines))
    return ["--data", folder / "captions.csv", "--val-fraction", "0.25"]


def texts_of(folder):
    captions_of(folder)
    for i in range(53):
        (folder / f"{i:03}.txt").write_text(f"picture {i}\nanother word for {i}")
    (folder / "captions.csv").unlink()
    return ["--data", folder, "--val-fraction", "0.25"]


def head_of(text):
    """(where, embedded, there already) of the printed line."""
    line = re.search(r"^cache    (.+)   ([\d,]+) pictures embedded, ([\d,]+) there already, [\d.]+ s$", text, re.M)
    return Path(line[1]), int(line[2]), int(line[3])


# ---- The same run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tower", TOWERS)
def test_a_cached_run_is_the_locked_run_to_the_bit(tower, precision, run, counted, tmp_path, capsys):
    """Weights, optimiser and metrics, over two epochs whose batches mix the pictures anew."""
    data = captions_of(tmp_path / "data")
    plain = outcome(run("plain", *data, *TOWERS[tower], precision=precision))
    counted.clear()
    cached = outcome(run("cached", *data, *TOWERS[tower], "--cache-features", precision=precision))
    assert_same(cached, plain)
    _, embedded, there = head_of(capsys.readouterr().out)
    assert (embedded, there) == (53, 0)
    at_once = 8 if tower == "micro-batches" else 16
    assert set(counted[:-1]) == {at_once}, "batches of one size, filled up at the end, round alike"
    assert sum(counted) < 53 + 16, "once a picture: neither steps nor evaluations run the tower again"


def test_with_several_threads_a_cached_vit_differs_by_rounding_only(run, tmp_path):
    """The place of a picture in its batch decides how its row is rounded, and nothing else."""
    data = captions_of(tmp_path / "data")
    torch.set_num_threads(2)
    plain, cached = (
        outcome(run(name, *data, *TOWERS["vit"], *flags, "--steps", "1", "--eval-every", "1"))
        for name, flags in (("plain", []), ("cached", ["--cache-features"]))
    )
    for one, other in zip(plain["optimizer"].values(), cached["optimizer"].values(), strict=True):
        torch.testing.assert_close(one["exp_avg"], other["exp_avg"], rtol=1e-4, atol=1e-6)
    assert plain["metrics"][0]["loss"] == pytest.approx(cached["metrics"][0]["loss"], abs=1e-5)


@pytest.mark.parametrize("write", [captions_of, classes_of, texts_of, photographs_of])
def test_every_kind_of_data_is_cached_and_a_second_run_embeds_nothing(write, run, counted, tmp_path, capsys):
    data = write(tmp_path / "data")
    plain = outcome(run("plain", *data, *RESNET))
    first = outcome(run("first", *data, *RESNET, "--cache-features", workers=1))
    capsys.readouterr()
    counted.clear()
    second = outcome(run("second", *data, *RESNET, "--cache-features"))
    assert_same([first, second], [plain, plain])
    where, embedded, there = head_of(capsys.readouterr().out)
    assert not counted and embedded == 0 and there == (34 if write is classes_of else 53)
    name = "data/.captions.csv.features" if write in (captions_of, photographs_of) else ".data.features"
    assert where.parent == tmp_path / name


def test_drawn_shapes_are_cached_below_the_data_root(run, counted, tmp_path, monkeypatch):
    shapes = dualenc.ShapesPairs
    monkeypatch.setattr(dualenc, "ShapesPairs", lambda split, seed: shapes(split, seed, count=40, side=32))
    data = ["--data", "shapes", "--data-root", tmp_path / "root"]
    plain = outcome(run("plain", *data, *RESNET))
    first = outcome(run("first", *data, *RESNET, "--cache-features"))
    counted.clear()
    second = outcome(run("second", *data, *RESNET, "--cache-features"))
    assert_same([first, second], [plain, plain])
    assert not counted and (tmp_path / "root" / ".shapes.features").is_dir()


def test_evaluation_of_features_is_that_of_the_pictures(make_model, pictures):
    """To the bit, and without a call of the tower: the pictures given with the features cannot be read."""
    model = make_model()
    pairs = dualenc.Pairs(["a", "b", "c", "d"], pictures, [["two dogs"], ["a fox"], ["a star"], ["dogs"]])
    features = evaluation.picture_features(model, pictures, batch_size=3)
    expected = evaluation.evaluate(model, pairs, batch_size=3)
    unseen = dualenc.Pairs(pairs.names, dualenc.PictureFiles(["none.png"] * 4), pairs.captions)
    assert evaluation.evaluate(model, unseen, batch_size=3, features=features) == expected
    embeds = evaluation.embed_features(model, features, batch_size=3)
    assert torch.equal(embeds, evaluation.embed_pictures(model, pictures, batch_size=3))
    with pytest.raises(evaluation.NotFinite):
        evaluation.embed_features(model, features / 0)


# ---- The store ------------------------------------------------------------------------------------------------------


def test_only_what_changed_is_embedded_again(run, tmp_path, capsys):
    """A picture written anew, a new one, one that is gone; then other weights, another transform, other arithmetic."""
    data = captions_of(tmp_path / "data")

    def embedded(*flags, **more):
        run("run", *data, *(flags or RESNET), "--cache-features", "--overwrite", **more)
        return head_of(capsys.readouterr().out)[1:]

    assert embedded() == (53, 0)
    before = {path.name: path for path in (tmp_path / "data").glob("*.png")}
    Image.new("RGB", (32, 32), "red").save(before["005.png"])
    assert embedded() == (1, 52)
    os.utime(before["006.png"], (1, 1))
    assert embedded() == (1, 52)
    table = tmp_path / "data" / "captions.csv"
    table.write_text(table.read_text().replace("007.png", "new.png"))
    before["007.png"].rename(tmp_path / "data" / "new.png")
    assert embedded() == (1, 52)
    assert embedded(*RESNET, "--seed", "1") == (53, 0)
    assert embedded(*RESNET[:3], "40") == (53, 0)
    assert embedded(precision="bf16") == (53, 0)
    assert embedded(*RESNET, "--batch-size", "8", "--lr", "1e-4", "--projection-dim", "8") == (0, 53)
    assert len(list((tmp_path / "data").glob(".captions.csv.features/*/train/rows-*.npy"))) == 4, "older rows are gone"


def test_the_key_changes_with_what_decides_a_feature_and_with_nothing_else(make_model):
    """Weights and build of the tower (the number of heads is in no weight), transform, arithmetic."""

    def key(precision="fp32", vision=(), mean=(0.5, 0.5, 0.5), weights=(), **built):
        model = make_model(**built)
        model.config = dataclasses.replace(
            model.config, vision=dataclasses.replace(model.config.vision, **dict(vision))
        )
        model.processor.image_transform = dataclasses.replace(model.processor.image_transform, mean=mean)
        for name in weights:
            model.get_parameter(name).data.view(-1)[0] += 1e-3
        return evaluation.index_key(model, precision, ("vision_model.",))

    projections = ["visual_projection.weight", "text_projection.weight", "logit_scale"]
    assert key() == key(vision={"patch_dropout": 0.5}) == key(weights=projections)
    others = [
        key(weights=["vision_model.trunk.norm.weight"]),
        key(vision_args={**TINY_VIT, "num_heads": 2}),
        key(mean=(0.1, 0.2, 0.3)),
        key("bf16"),
    ]
    assert len({key(), *others}) == 5


@pytest.fixture
def album(make_model):
    """A function: names of pictures, one letter each, to (what stored_rows gives, features computed at once)."""
    model, rng = make_model("test_resnet"), np.random.default_rng(0)
    pictures = {name: Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for name in "abcdefghi"}

    def go(folder, names, stop_at=None):
        listed = [pictures[name] for name in names]

        def embed(batches):
            encode = partial(evaluation.pooled, model)
            for number, found in enumerate(evaluation.run_batches(model, encode, listed, batches, "fp32", 0)):
                if number == stop_at:
                    raise Killed
                yield found

        stored = evaluation.stored_rows(folder, list(names), model.vision_model.width, embed, 4, whole_batches=True)
        return stored, evaluation.picture_features(model, listed)

    return go


def test_rows_follow_their_pictures_when_the_list_changes(album, tmp_path):
    """Against features computed at once, for lists that lose, gain and exchange pictures."""
    for names, new in (("abcde", 5), ("gcbahi", 3), ("cg", 0), ("gc", 0), ("abcdefghi", 7)):
        (rows, embedded, unreadable), expected = album(tmp_path / "store", names)
        assert embedded == new and not unreadable
        assert torch.allclose(rows, expected, atol=1e-5)


def test_rows_stay_on_the_disk_and_are_written_as_they_come(album, tmp_path, monkeypatch):
    sizes, fill = [], evaluation.finite
    monkeypatch.setattr(evaluation, "finite", lambda rows: (sizes.append(len(rows)), fill(rows))[1])
    rows = album(tmp_path / "store", "abcdefghi")[0][0]
    assert sizes[:3] == [4, 4, 4]
    (file,) = (tmp_path / "store").glob("*.npy")
    assert str(file) in Path("/proc/self/maps").read_text(), "rows were read into memory"
    assert isinstance(np.load(file, mmap_mode="r"), np.memmap) and np.load(file).dtype == np.float32
    rows[0] = 0
    assert np.load(file)[0].any(), "what a run does to its rows must not reach the file"


@pytest.mark.parametrize("stop_at", [0, 1])
def test_a_store_killed_halfway_is_what_it_was(album, tmp_path, stop_at):
    with pytest.raises(Killed):
        album(tmp_path / "store", "abcdefghi", stop_at)
    (rows, new, _), expected = album(tmp_path / "store", "abc")
    assert new == 3 and torch.allclose(rows, expected, atol=1e-5)
    with pytest.raises(Killed):
        album(tmp_path / "store", "abcdefghi", stop_at)
    assert album(tmp_path / "store", "abc")[0][1] == 0
    (rows, new, _), expected = album(tmp_path / "store", "abcdefghi")
    assert new == 6 and torch.allclose(rows, expected, atol=1e-5)


@pytest.mark.parametrize("owner_and_name", [(os, "replace"), (os, "fsync"), (Path, "unlink")], ids=lambda pair: pair[1])
def test_a_store_killed_as_it_is_finished_is_whole(album, tmp_path, monkeypatch, owner_and_name):
    """At each call of the operation in turn: the old rows are there or the new ones, each with its own table."""
    owner, name = owner_and_name
    original, killed = getattr(owner, name), 0
    while True:
        folder, calls = tmp_path / str(killed), []
        album(folder, "abc")

        def deadly(*arguments, calls=calls, last=killed, **more):
            calls.append(1)
            if len(calls) > last:
                raise Killed
            return original(*arguments, **more)

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(owner, name, deadly)
            album(folder, "gcbahi")
            break
        killed += 1
        (rows, new, _), expected = album(folder, "gcbahi")
        assert new in (0, 3) and torch.allclose(rows, expected, atol=1e-5)
    assert killed >= 1 and len(list(folder.glob("*.npy"))) == 1


def test_a_second_run_waits_for_the_first(album, tmp_path):
    """The lock goes with its process; until then nobody else writes."""
    hold = f"""
import sys, pathlib, eval
with eval.alone_in(pathlib.Path({str(tmp_path / "store")!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    holder = subprocess.Popen([sys.executable, "-c", hold], cwd=Path(train.__file__).parent, **pipes)
    assert holder.stdout.readline() == "held\n"
    let_go = threading.Timer(0.5, holder.kill)
    let_go.start()
    album(tmp_path / "store", "abc")
    assert not let_go.is_alive(), "it did not wait"
    holder.communicate()


def share_of_the_work(folder):
    """What one of several processes gets; the rows say which process made them, and that of picture 3 cannot be."""

    def embed(batches):
        for numbers in batches:
            errors = [ValueError("torn") if i == 3 else None for i in numbers]
            yield torch.tensor([[i, dualenc.process_rank() + 1.0] for i in numbers]), errors

    def store(names):
        rows, new, unreadable = evaluation.stored_rows(folder / "store", list(names), 2, embed, 2)
        return rows.tolist(), new, unreadable

    return [store(names) for names in ("abcde", "abcdefghi", "abcdefghi")]


def test_the_processes_of_a_job_share_the_work_and_all_read_the_whole(tmp_path):
    makers = [1, 1, 2, 0, 2, 1, 2, 2, 2]  # of batches 01 23 4, then 35 67 8: picture 3 is tried again
    rows = [[i, maker] if maker else [0, 0] for i, maker in enumerate(makers)]
    expected = [(rows[:5], 5, {"d": "torn"}), (rows, 5, {"d": "torn"}), (rows, 1, {"d": "torn"})]
    assert in_processes(2, share_of_the_work, tmp_path) == [expected] * 2


def fail_in_the_second(folder):
    def embed(batches):
        for numbers in batches:
            yield torch.full((len(numbers), 2), torch.nan if dualenc.process_rank() else 1.0), [None] * len(numbers)

    try:
        evaluation.stored_rows(folder / "store", list("abcde"), 2, embed, 2)
    except evaluation.NotFinite as error:
        return str(error)


@pytest.mark.parametrize("micro", [(), ("--micro-batch", "4")], ids=["whole", "pieces"])
def test_a_cached_run_of_two_processes_is_the_locked_run_of_two(micro, tmp_path, capsys):
    """To the bit; and a second one, of one process, embeds nothing."""
    flags = [*captions_of(tmp_path / "data"), *TINY, *TOWERS["vit"], *micro, "--precision", "fp32", "--workers", "0"]
    cached = [*flags, "--cache-features", "--out"]
    in_processes(2, train_here, [*flags, "--out", tmp_path / "plain"])
    in_processes(2, train_here, [*cached, tmp_path / "cached"])
    assert_same(outcome(tmp_path / "cached"), outcome(tmp_path / "plain"))
    train.main([str(flag) for flag in [*cached, tmp_path / "again"]])
    assert head_of(capsys.readouterr().out)[1:] == (0, 53)


def test_an_error_in_one_process_of_a_job_is_raised_in_all(tmp_path):
    one, other = in_processes(2, fail_in_the_second, tmp_path)
    assert "not finite" in one and one == other


# ---- What goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lock", ""], "does not learn: add --lock vision .--lock is ''"),
        (["--lock", "text"], "does not learn: add --lock vision .--lock is 'text'"),
        (["--crop-scale", "0.5"], "one view of each picture.*--crop-scale .it is 0.5"),
        (["--flip"], "one view of each picture.*--flip .it is True"),
    ],
)
def test_what_would_make_cached_features_wrong_is_refused(flags, message, run, tmp_path):
    with pytest.raises(ValueError, match=message):
        run("run", *captions_of(tmp_path / "data"), *RESNET, "--cache-features", *flags)


def test_unreadable_pictures_are_skipped_or_stop_as_without_a_cache(run, tmp_path):
    """With a tower that rounds alike in a batch of 15, where a picture is missing."""
    data = captions_of(tmp_path / "data", bad=(7,))
    skip = [*data, "--image-size", "32", "--on-bad-picture", "skip", "--steps", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "BAD_SHARE", 0.5)
        plain, first, second = (
            run(n, *skip, *f) for n, f in zip("abc", [[], ["--cache-features"], ["--cache-features"]])
        )
    assert_same([outcome(first), outcome(second)], [outcome(plain)] * 2)
    listed = [(out / train.BAD_PICTURES).read_text() for out in (plain, first, second)]
    assert "007.png" in listed[0] and listed[0] == listed[1] == listed[2]
    with pytest.raises(ValueError, match="more than 1%"):
        run("too many", *skip, "--cache-features")
    with pytest.raises(ValueError, match="line 9: cannot read picture.*007.png.*--on-bad-picture skip"):
        run("strict", *data, *RESNET, "--cache-features")


def test_a_file_that_vanished_is_an_unreadable_picture(run, tmp_path):
    data = classes_of(tmp_path / "data")
    (tmp_path / "data" / "train" / "cat" / "link.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cannot read picture .*link.png"):
        run("run", *data, *RESNET, "--cache-features")


def test_weights_that_are_not_finite_are_named_before_the_first_step(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "pooled", lambda model, pixels: model.vision_model(pixels).pooler_output / 0)
    with pytest.raises(ValueError, match="not finite numbers: the weights"):
        run("run", *captions_of(tmp_path / "data"), *RESNET, "--cache-features")
    assert not list((tmp_path / "data").glob(".*/*/*/pictures.json"))


def test_where_the_data_cannot_be_written_the_run_folder_serves(run, tmp_path, capsys):
    data = captions_of(tmp_path / "data")
    (tmp_path / "data" / ".captions.csv.features").write_text("in the way")
    out = run("run", *data, *RESNET, "--cache-features")
    assert head_of(capsys.readouterr().out)[0].parent == out / "features"
    run("run", *data, *RESNET, "--cache-features", "--overwrite")
    assert head_of(capsys.readouterr().out)[1] == 53, "a new run clears its folder"


def test_a_disk_that_can_be_read_only_is_noticed_before_anything_is_computed(tmp_path):
    assert train.can_write(tmp_path / "new")
    with small_disk(tmp_path / "disk", "100k", ",ro") as disk:
        assert not train.can_write(disk)


def test_where_another_process_cannot_write_beside_the_data_all_use_the_run_folder(run, tmp_path, capsys, monkeypatch):
    """Processes on two machines may see one disk with different rights; they must look for rows in one place."""
    asked, tell_all = [], dualenc.tell_all

    def said_by_another(news):
        return ["read only"] if asked and asked.pop() else tell_all(news)

    monkeypatch.setattr(train, "can_write", lambda folder: asked.append(True) or True)
    monkeypatch.setattr(dualenc, "tell_all", said_by_another)
    out = run("run", *captions_of(tmp_path / "data"), *RESNET, "--cache-features")
    assert head_of(capsys.readouterr().out)[0].parent == out / "features"


def test_a_full_disk_is_named_before_the_tower_runs(album, tmp_path):
    with small_disk(tmp_path / "disk", "100k") as disk:
        model_width, calls = 4096, []
        with pytest.raises(ValueError, match=r"cannot write .*rows-\w+.npy: .*No space left"):
            evaluation.stored_rows(disk / "store", list("abcdefghi"), model_width, calls.append, 4)
        assert not calls and not list((disk / "store").glob("*.npy*"))
