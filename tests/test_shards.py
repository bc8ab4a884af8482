"""Claims about tar shards: they are read like the same pictures in files, and what is wrong with them is named."""

import io
import json
import os
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import dualenc
import eval as evaluation
import train


def picture_bytes(i, kind="PNG", size=(12, 10)):
    values = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


def write_shard(path, members):
    """A tar file of {member name: bytes}, written by the standard library."""
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("folder.jpg")  # not a picture, whatever its name
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def numbered(first, last):
    """{member: bytes} of samples: PNG and JPEG in turn, one or two captions."""
    members = {}
    for i in range(first, last):
        kind = "jpg" if i % 2 else "png"
        members[f"{i:05d}.{kind}"] = picture_bytes(i, {"jpg": "JPEG"}.get(kind, "PNG"))
        members[f"{i:05d}.txt"] = f"drawing {i}\nnumber {i}\n".encode() if i % 3 else f"drawing {i}".encode()
        members[f"{i:05d}.cls"] = b"7"
    return members


@pytest.fixture
def shards(tmp_path):
    """The spec of three shards of 14, 13 and 13 samples."""
    for number, (first, last) in enumerate([(0, 14), (14, 27), (27, 40)]):
        write_shard(tmp_path / f"shard-{number:03d}.tar", numbered(first, last))
    return str(tmp_path / "shard-{000..002}.tar")


# ---- What is read ---------------------------------------------------------------------------------------------------


def test_shards_hold_what_the_same_pictures_in_files_hold(shards, tmp_path):
    pairs = dualenc.load_pairs(shards, val_fraction=0.0)
    assert len(pairs) == 40 and pairs.names[0] == "shard-000.tar/00000" and pairs.names[39] == "shard-002.tar/00039"
    for i in range(40):
        content = numbered(i, i + 1)
        suffix = "jpg" if i % 2 else "png"
        with Image.open(io.BytesIO(content[f"{i:05d}.{suffix}"])) as picture:
            assert np.array_equal(np.asarray(pairs[i][0]), np.asarray(picture)), i
        assert pairs[i][1] == content[f"{i:05d}.txt"].decode().splitlines()
    parts = {split: dualenc.load_pairs(shards, split, val_fraction=0.3) for split in dualenc.SPLITS}
    assert sorted(parts["train"].names + parts["test"].names) == sorted(pairs.names) and 0 < len(parts["test"]) < 40


@pytest.mark.parametrize(
    ("spec", "paths"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..10}.tar", ["a-08.tar", "a-09.tar", "a-10.tar"]),
        ("a-{9..11}.tar", ["a-9.tar", "a-10.tar", "a-11.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
    ],
)
def test_braces_stand_for_every_number_and_word(spec, paths):
    assert dualenc.expand_braces(spec) == paths


@pytest.mark.parametrize("spec", ["a-{3..1}.tar", "a-{}.tar", "a-{x}.tar"])
def test_braces_that_stand_for_nothing_are_refused(spec):
    with pytest.raises(ValueError, match=r"names no shards; expected \{0000..0099\} or \{a,b\}"):
        dualenc.load_pairs(spec)


def test_captions_come_from_text_else_from_json_and_other_members_are_left_alone(tmp_path):
    members = {
        "dir/a.PNG": picture_bytes(0),
        "dir/a.json": b'{"caption": "not this", "width": 3}',
        "dir/a.txt": "\ufeff one \r\n\r\ntwo\rone\n".encode(),
        "dir/b.json": json.dumps({"key": 1, "caption": "", "text": ["three", "vier \u00fc"]}).encode(),
        "dir/b.seg.png": picture_bytes(8),
        "dir/b.webp": picture_bytes(1, "WEBP"),
        "dir/.hidden.png": picture_bytes(1),
        "dir/.png": picture_bytes(1),
        "README": b"words",
    }
    pairs = dualenc.load_pairs(write_shard(tmp_path / "a.tar", members), val_fraction=0.0)
    assert pairs.names == ["a.tar/dir/a", "a.tar/dir/b"]
    assert pairs.captions == [["one", "two"], ["three", "vier ü"]]
    assert np.array_equal(np.asarray(pairs[0][0]), np.asarray(Image.open(io.BytesIO(picture_bytes(0)))))


def test_names_tell_shards_of_one_name_apart(tmp_path):
    for folder in "xy":
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "0.tar", numbered(0, 1))
    pairs = dualenc.load_pairs(f"{tmp_path}/{{x,y}}/0.tar", val_fraction=0.0)
    assert pairs.names == ["x/0.tar/00000", "y/0.tar/00000"]


def test_webdatasets_writer_and_reader_agree_with_ours(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    for number in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{number}.tar")) as writer:
            for i in range(3):
                key = f"{3 * number + i:04d}"
                writer.write({"__key__": key, "png": picture_bytes(3 * number + i), "txt": f"caption {key}"})
    pairs = dualenc.load_pairs(str(tmp_path / "{0..1}.tar"), val_fraction=0.0)
    theirs = list(webdataset.WebDataset(str(tmp_path / "{0..1}.tar"), shardshuffle=False).decode("pil"))
    assert [name.rsplit("/", 1)[1] for name in pairs.names] == [sample["__key__"] for sample in theirs]
    assert [captions for captions in pairs.captions] == [[sample["txt"]] for sample in theirs]
    for i, sample in enumerate(theirs):
        assert np.array_equal(np.asarray(pairs[i][0]), np.asarray(sample["png"]))


# ---- In training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_every_pair_is_seen_once_an_epoch_by_two_workers(shards, make_model, context):
    """Each with its own picture and caption, whichever worker read it, however the worker was started."""
    pairs, model = dualenc.load_pairs(shards, val_fraction=0.0), make_model()
    loader = torch.utils.data.DataLoader(
        train.TrainingPairs(pairs, model.processor.image_transform, train.TrainConfig(batch_size=8)),
        batch_sampler=train.Batches(len(pairs), 8, 0, 0, 5),
        num_workers=2,
        collate_fn=train.stack_batch,
        multiprocessing_context=context,
    )
    seen = Counter()
    for batch in loader:
        for image, caption, i in zip(batch.images, batch.captions, batch.numbers):
            picture = dualenc.to_pixels(pairs.pictures[i])
            assert torch.equal(image, model.processor.image_transform.resize_and_crop(picture))
            assert caption in (f"drawing {i}", f"number {i}")
            seen[i] += 1
    assert seen == Counter(range(40))


def flags_of(shards, out, *more):
    sizes = "--vision test_resnet --image-size 32 --text-width 16 --text-depth 1 --text-heads 2 --projection-dim 8"
    rest = "--batch-size 8 --precision fp32 --workers 0 --log-every 1 --eval-every 3 --val-fraction 0.2"
    return ["--data", shards, "--out", str(out), *sizes.split(), *rest.split(), *more]


def test_runs_on_shards_train_measure_resume_and_search(shards, tmp_path, monkeypatch, capsys):
    metrics = train.main(flags_of(shards, tmp_path / "whole", "--steps", "6"))
    assert evaluation.main([str(tmp_path / "whole"), "--precision", "fp32"])["retrieval"]["i2t_r1"] == metrics["i2t_r1"]
    take_step, steps = train.take_step, []

    def stop_at_four(run, batch, first):
        take_step(run, batch, first)
        steps.append(run.state["step"])
        if steps == [1, 2, 3, 4]:
            os.kill(os.getpid(), 15)

    monkeypatch.setattr(train, "take_step", stop_at_four)
    with pytest.raises(SystemExit):
        train.main(flags_of(shards, tmp_path / "cut", "--steps", "6"))
    train.main(["--resume", str(tmp_path / "cut")])
    one, two = (dualenc.DualEncoder.from_pretrained(tmp_path / name / "last").state_dict() for name in ("whole", "cut"))
    assert steps == [1, 2, 3, 4, 5, 6] and all(torch.equal(one[name], two[name]) for name in one)

    search = [str(tmp_path / "whole"), "--data", shards, "--task", "search", "--query", "drawing 3", "--top", "40"]
    first, again = (evaluation.main(search)["search"] for _ in range(2))
    assert first["n_indexed"] == 40 and again["n_indexed"] == 0 and first["found"] == again["found"]
    assert (tmp_path / ".shard-{000..002}.tar.test.index").is_dir(), "beside the shards"
    write_shard(tmp_path / "shard-001.tar", numbered(14, 26))
    assert evaluation.main(search)["search"]["n_indexed"] == 12, "a shard that was written anew is read anew"


def test_a_bad_picture_in_a_shard_is_skipped_and_listed_or_stops(tmp_path):
    members = numbered(0, 150)
    members["00003.jpg"] = b"no picture"
    members["00004.png"] = members["00004.png"][:100]
    spec = str(write_shard(tmp_path / "bad.tar", members))
    with pytest.raises(ValueError, match=r"cannot read picture .*bad.tar at byte [\d,]+: "):
        train.main(flags_of(spec, tmp_path / "a", "--steps", "15"))
    with pytest.raises(ValueError, match="2 of 150 pictures cannot be read, more than 1%"):
        train.main(flags_of(spec, tmp_path / "b", "--steps", "30", "--on-bad-picture", "skip"))
    assert (tmp_path / "b" / "bad_pictures.txt").read_text().count("bad.tar/0000") == 2


def test_large_jpegs_in_shards_are_decoded_smaller(tmp_path):
    members = {"a.jpg": picture_bytes(0, "JPEG", (512, 640)), "a.txt": b"a"}
    pairs = dualenc.load_pairs(write_shard(tmp_path / "a.tar", members), val_fraction=0.0)
    transform = dualenc.ImageTransform(resize=32, crop=(32, 32))
    assert evaluation.ReadyPictures(pairs.pictures, transform).pictures[0].size == (80, 64)
    assert pairs[0][0].size == (640, 512)


# ---- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"a.png": b"x"},
            r"sample a has no caption: neither lines in a.txt nor caption, captions, text, title in a.json",
        ),
        ({"a.png": b"x", "a.txt": b" \n"}, "sample a has no caption"),
        ({"a.png": b"x", "a.json": b'{"url": "x"}'}, "sample a has no caption"),
        ({"a.txt": b"x"}, r"sample a has no picture \(.bmp, .gif, .jpeg"),
        ({"a.png": b"x", "a.jpg": b"y", "a.txt": b"x"}, "sample a comes twice: a.jpg"),
        ({"a.png": b"x", "./a.txt": b"x", "a.txt": b"x"}, "sample a comes twice: a.txt"),
        ({"a.png": b"x", "a.txt": b"\xff\xfa"}, "cannot read a.txt: 'utf-8' codec"),
        ({"a.png": b"x", "a.json": b"{bad"}, "cannot read a.json: Expecting"),
        ({"a.png": b"x", "a.json": b"[1]"}, "cannot read a.json: "),
        ({"a.png": b"x", "a.json": b'{"caption": "\\ud83d"}'}, "cannot read a.json: .*surrogates"),
        ({"a.cls": b"1"}, "holds no pictures"),
    ],
)
def test_samples_that_are_no_pairs_are_named_with_their_shard(members, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        dualenc.load_pairs(write_shard(tmp_path / "s.tar", members))
    assert "s.tar" in str(error.value)


def test_a_key_that_comes_twice_is_refused(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("a.png", "a.txt", "a.txt"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(ValueError, match=r"s.tar: sample a comes twice: a.txt"):
        dualenc.load_pairs(tmp_path / "s.tar")


def test_shards_cut_anywhere_are_refused_by_name(tmp_path):
    """Inside a header, a picture or a caption, or between two members: also where it would look whole to tarfile."""
    path = write_shard(tmp_path / "s.tar", numbered(0, 3))
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        header, end = tar.getmembers()[4].offset, tar.getmembers()[-1].offset_data + 512
    for length in (0, 100, 512, 700, 1024, 1600, 2500, end // 2, end - 1024, end - 512, end - 100, end, end + 300):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cannot read .*s.tar: "):
            dualenc.load_pairs(path)
    path.write_bytes(content[:header] + b"x" * 512 + content[header + 512 :])
    with pytest.raises(ValueError, match="cannot read .*s.tar: "):
        dualenc.load_pairs(path)
    path.write_bytes(content[: end + 512])
    assert len(dualenc.load_pairs(path, val_fraction=0.0)) == 3


def test_shards_that_are_missing_compressed_remote_or_named_twice_are_refused(shards, tmp_path):
    with pytest.raises(ValueError, match=r"2 of 5 shards are missing: .*shard-003.tar, .*shard-004.tar"):
        dualenc.load_pairs(shards.replace("002}", "004}"))
    with pytest.raises(ValueError, match="names a shard twice"):
        dualenc.load_pairs(str(tmp_path / "shard-{000,001,000}.tar"))
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    with pytest.raises(ValueError, match="cannot read .*z.tar: "):
        dualenc.load_pairs(tmp_path / "z.tar")
    for spec in ("pipe:cat x.tar | tee y", "https://host/{0..3}.tar", "s3://bucket/x.tar"):
        with pytest.raises(ValueError, match="shards are read from disk, so fetch "):
            dualenc.load_pairs(spec)
