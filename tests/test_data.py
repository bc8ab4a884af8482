"""What each data spec reads, how it is split, and what a user is told about mistakes."""

import csv
import io
import itertools
import json
import os
import re
import shutil
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import dualenc


def save_image(path, colour="red", size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        save_image(tmp_path / name)
    return tmp_path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def load_all(spec, **options):
    """{image: captions} of the whole data."""
    pairs = dualenc.load_pairs(spec, "all", **options)
    return dict(zip(pairs.names, pairs.captions))


def names_by_split(spec, **options):
    return {split: dualenc.load_pairs(spec, split, **options).names for split in dualenc.SPLITS}


# ---- Pairs


def test_pairs_of_an_image_a_class_or_a_text_are_positives():
    """Also by way of a third pair; computed by comparing all with all."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 30).tolist()
    for own in (None, labels):
        pairs = dualenc.Pairs([str(i) for i in range(30)], [None] * 30, [["x"]] * 30, own)
        indices = rng.integers(0, 30, 12).tolist()
        captions = list(map(str, rng.integers(0, 9, 12)))
        images = [labels[i] if own else i for i in indices]
        same = np.array([[a == b or c == d for b, d in zip(images, captions)]
                         for a, c in zip(images, captions)])  # fmt: skip
        for _ in range(12):
            same = (same.astype(int) @ same) > 0
        groups = dualenc.positive_groups(pairs.pair_ids(indices, captions))
        assert ((groups[:, None] == groups).numpy() == same).all()


def test_the_caption_table_has_each_text_once():
    captions, right = dualenc.Pairs("ab", [0, 1], [["x", "y", "x"], ["y"]]).caption_table()
    assert captions == ["x", "y"] and right.tolist() == [[0, 0], [0, 1], [1, 1]]


def test_stamps_change_with_the_image(folder):
    write(folder / "c.csv", "image,caption\na.png,x\nb.png,y\n")
    before = dualenc.load_pairs(folder / "c.csv", "all").stamps()
    save_image(folder / "b.png", size=(9, 9))
    after = dualenc.load_pairs(folder / "c.csv", "all").stamps()
    assert before[0] == after[0] and before[1] != after[1]
    with pytest.raises(ValueError, match="Pairs.stamps has no stamp"):
        dualenc.Pairs(["a"], [Image.new("RGB", (2, 2))], [["x"]]).stamps()


# ---- One dataset that opens images


def test_an_unreadable_image_gives_its_place_to_the_next(folder):
    images = dualenc.Lazy([str(folder / f"{name}.png") for name in "abc"], dualenc.open_image)
    transform = dualenc.ImageTransform(resize=4, crop=4)
    dataset = dualenc.ImageDataset(images, transform, lambda pixels, key: pixels + key[0])
    right = transform.resize_and_crop(dualenc.to_pixels(images[2])) + 5
    for broken, used in (("b", [0, 2, 2]), ("c", [0, 0, 0]), ("a", [0, 1, 2])):
        write(folder / f"{broken}.png", "no image")
        found = [dataset[5, i] for i in range(3)]
        assert [index for _, index, _ in found] == used
        assert re.search("cannot read image .*b.png", found[1][2]), "the image that was asked for"
        if broken == "b":
            assert torch.equal(found[1][0], right) and found[0][2] == found[2][2] == ""
    assert found[0][0].shape == (3, 4, 4), "a black image, for want of any"


@pytest.mark.parametrize("context", ["fork", "forkserver"])
@pytest.mark.parametrize("kind", ["shapes", "shards", "set"])
def test_workers_read_what_one_process_reads(kind, context, tmp_path):
    state = torch.get_rng_state()
    countries(tmp_path, 20)
    shard = write_shard(tmp_path / "s.tar", samples(0, 20))
    spec = {"shapes": "shapes", "shards": shard, "set": "country211"}[kind]
    pairs = dualenc.load_pairs(spec, data_root=tmp_path, val_fraction=0)
    transform = dualenc.ImageTransform(resize=8, crop=8)
    dataset = dualenc.ImageDataset(pairs.images, transform)
    batches = [[(0, i) for i in batch] for batch in ([3, 1], [19, 0], [7, 7])]
    loader = dualenc.image_loader(dataset, batches, 2, torch.device("cpu"))
    loader.multiprocessing_context = context
    picked = dualenc.image_loader(dataset, batches, -1, torch.device("cpu")).num_workers
    assert picked == min(1, os.cpu_count() - 1)
    for (pixels, indices, errors), batch in zip(loader, batches):
        assert indices.tolist() == [i for _, i in batch] and errors == ("", "")
        here = [transform.resize_and_crop(dualenc.to_pixels(pairs[i][0])) for i in indices]
        assert torch.equal(pixels, torch.stack(here))
    assert torch.equal(torch.get_rng_state(), state), "the run's own generator was used"


def test_large_jpegs_are_decoded_smaller_wherever_they_lie(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    large = Image.fromarray(noise).resize((640, 640), Image.Resampling.BICUBIC)
    large.save(buffer := io.BytesIO(), "JPEG")
    for name in ("large", "same"):
        write(tmp_path / name / "a.jpg", buffer.getvalue())
    shard = write_shard(tmp_path / "s.tar", {"a.jpg": buffer.getvalue(), "a.txt": b"x"})
    transform = dualenc.ImageTransform(resize=64, crop=64)
    for spec in (tmp_path, shard):
        images = dualenc.load_pairs(spec, "all").images
        dataset = dualenc.ImageDataset(images, transform)
        assert images[0].size == (640, 640) and dataset.images[0].size == (160, 160)
        full = transform.resize_and_crop(dualenc.to_pixels(images[0])).float()
        assert 0 < (dataset[0, 0][0] - full).abs().mean() < 1


# ---- Drawn shapes


def test_shapes_come_from_the_seed_alone():
    one, two, other = (dualenc.ShapesPairs(seed=s, count=20).select(range(20)) for s in (0, 0, 1))
    assert one.captions == two.captions != other.captions and one.stamps() == two.stamps()
    assert all(np.array_equal(one[i][0], two[i][0]) for i in range(20))
    assert not {*one.stamps()} & {*dualenc.ShapesPairs("train", count=20, side=32).stamps()}


def test_held_out_shapes_are_never_seen_in_training():
    train, test = dualenc.load_pairs("shapes"), dualenc.load_pairs("shapes", "test")
    assert len(train) == 10_000 and len(dualenc.ShapesPairs(count=3)) == 3
    assert len(test) == len({captions[0] for captions in test.captions}) == 512
    assert not {tuple(c) for c in train.captions} & {tuple(c) for c in test.captions}
    assert not set(test.scenes) & set(train.scenes)
    objects = {thing[1:] for scene in train.scenes for thing in (scene[0], scene[2])}
    assert not objects & dualenc.HELD_OUT_OBJECTS
    assert {c for c, _ in objects} == {*dualenc.COLOURS}
    assert {s for _, s in objects} == {*dualenc.SHAPES}
    new = [any(t[1:] in dualenc.HELD_OUT_OBJECTS for t in (a, b)) for a, _, b in test.scenes]
    assert Counter(new) == {True: 256, False: 256}
    for scenes in (test.scenes, train.scenes):
        mirrors = zip(scenes[::2], scenes[1::2])
        assert all(mirror == (b, r, a) for (a, r, b), mirror in mirrors), "its mirror is next"
    assert dualenc.load_pairs("shapes", "all").names == train.names + test.names
    with pytest.raises(ValueError, match="3185 held-out images, expected at most 3184"):
        dualenc.ShapesPairs("test", count=3185)


def test_shapes_look_like_their_captions():
    """Where the caption says, in the colour it says, is a thing of about the size it says."""
    pairs = dualenc.ShapesPairs("test", count=64)
    for i, (first, relation, second) in enumerate(pairs.scenes):
        image = np.asarray(pairs[i][0], dtype=int)
        image = image if relation == "left of" else image.transpose(1, 0, 2)
        for (size, colour, _), half in ((first, image[:, :32]), (second, image[:, 32:])):
            near = (np.abs(half - dualenc.COLOURS[colour]).max(-1) <= 20).sum()
            smallest, largest = {"small": (30, 190), "large": (130, 640)}[size]
            assert smallest <= near <= largest, (pairs.captions[i], size, colour, near)


def test_an_image_does_not_give_its_wording_away():
    """The background must not say which of the two wordings was drawn."""
    pairs = dualenc.ShapesPairs("train", count=400)
    told = [wording[1] for wording in pairs.wordings]
    as_drawn = torch.tensor([relation in ("left of", "above") for relation in told]).float()
    assert {*told} == {*dualenc.OPPOSITE} and 0.4 < as_drawn.mean() < 0.6
    backgrounds = torch.tensor([image.getpixel((0, 0)) for image in pairs.images]).float()
    assert torch.corrcoef(torch.cat([as_drawn[None], backgrounds.T]))[0, 1:].abs().max() < 0.2


def test_hard_negatives_differ_in_one_thing():
    pairs = dualenc.ShapesPairs("test", count=64)
    for i, (one, _, two) in enumerate(pairs.wordings):
        assert pairs.hard_negatives(i)["replaced"].split()[2] not in (one[1], two[1])
    pairs.wordings[0] = ("small", "red", "star"), "above", ("large", "blue", "cross")
    wrong = pairs.hard_negatives(0)
    assert wrong.pop("replaced").endswith("a large blue cross")
    assert wrong == {
        "relation": "a small red star below a large blue cross",
        "order": "a large blue cross above a small red star",
        "attributes": "a small blue star above a large red cross",
    }
    pairs.wordings[0] = ("small", "red", "star"), "above", ("large", "red", "cross")
    assert "attributes" not in pairs.hard_negatives(0)


# ---- Splits


def test_an_images_captions_never_straddle_the_split(tmp_path):
    """Split by the image's name: new images never move old ones, and order does not matter."""
    rows = [(f"{i}.png", f"caption {j} of {i}") for i in range(60) for j in range(3)]
    for i in range(60):
        save_image(tmp_path / f"{i}.png")

    def splits(rows):
        with open(tmp_path / "c.csv", "w", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), *rows])
        return names_by_split(tmp_path / "c.csv", val_fraction=0.3)

    whole, half = splits(rows), splits(rows[:90][::-1])
    assert sorted(whole["train"] + whole["test"]) == sorted(whole["all"])
    assert 8 <= len(whole["test"]) <= 28 and len(whole["all"]) == 60
    assert whole["val"] == whole["test"] and {*half["test"]} == {*whole["test"]} & {*half["all"]}
    captions = load_all(tmp_path / "c.csv")
    assert sorted(captions["7.png"]) == [f"caption {j} of 7" for j in range(3)]
    assert names_by_split(tmp_path / "c.csv", val_fraction=0)["test"] == []


def test_a_split_column_is_followed(folder):
    path = write(folder / "c.tsv", "image\tcaption\tSplit\n")
    with open(path, "a") as file:
        file.writelines(["a.png\tx\tTraining\n", "b.png\tx\tvalid\n", "c.png\tx\tTEST \n"])
    a, b, c = "a.png", "b.png", "c.png"
    assert names_by_split(path) == {"train": [a], "val": [b], "test": [c], "all": [a, b, c]}
    start = "image,caption,split\na.png,x,train\nb.png,y,"
    assert names_by_split(write(path, start + "dev"))["test"] == [b], "val stands in for test"
    assert names_by_split(write(path, start + "train"), val_fraction=1)["test"] == [a, b], "hashed"
    rows = [{"image": n, "caption": "x", "split": s} for n, s in ((a, "test"), (c, "train"))]
    rows = "\n".join(map(json.dumps, [{"image": b, "caption": "x", "split": None}, *rows]))
    assert names_by_split(write(folder / "c.jsonl", rows))["train"] == [b, c], "no word is train"
    alone = names_by_split(write(path, "image,caption,split\na.png,x,test"))
    assert alone == {"train": [], "val": [a], "test": [a], "all": [a]}


def test_a_group_stays_on_one_side(tmp_path):
    rows = [{"image": f"{i}.png", "caption": "x", "group": i // 4} for i in range(40)]
    for row in rows:
        save_image(tmp_path / row["image"])
    path = write(tmp_path / "c.jsonl", "\n".join(map(json.dumps, rows)))
    splits = names_by_split(path, val_fraction=0.5)
    train, test = ({int(name[:-4]) // 4 for name in splits[part]} for part in ("train", "test"))
    assert train and test and not train & test


# ---- Tables


@pytest.mark.parametrize("header", ["image caption", "filepath title", "Path TEXT"])
@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_columns_are_found_by_name_and_separators_sniffed(tmp_path, header, separator):
    save_image(tmp_path / "sub" / "a.png", "blue")
    cells = [*header.split(), " id"], ["sub/a.png", '"a, b; c | d"', "1"]
    lines = [separator.join(row) for row in cells]
    path = write(tmp_path / "c.txt", "\r\n".join(lines).encode("utf-8-sig"))
    pairs = dualenc.load_pairs(path, "all")
    assert pairs[0][1] == ["a, b; c | d"] and pairs[0][0].getpixel((0, 0)) == (0, 0, 255)
    assert pairs.names == ["sub/a.png"]


def test_captions_are_text_whatever_they_look_like(folder):
    captions = ["None", "NA", "0", 'say "hi", twice', "two\nlines", "piñata 日本 🎉", "a\u2028b"]
    with open(folder / "c.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *(("a.png", text) for text in captions)])
    assert load_all(folder / "c.csv") == {"a.png": captions}
    (folder / "d.jsonl").write_text(json.dumps({"path": "a.png", "text": captions}) + "\n\n")
    assert load_all(folder / "d.jsonl") == {"a.png": captions}


def test_spellings_of_a_path_are_one_image_and_equal_rows_one(folder):
    text = "image,caption,,\na.png,a dog,,\n./a.png,a dog,,\nb.png,a dog\nx/../a.png, a cat \n"
    found = load_all(write(folder / "c.csv", text))
    assert found == {"a.png": ["a dog", "a cat"], "b.png": ["a dog"]}
    path = write(folder / "sub" / "c.csv", f"image,caption\n../a.png,x\n{folder / 'b.png'},y\n")
    assert load_all(path) == {"../a.png": ["x"], "../b.png": ["y"]}
    assert load_all(write(folder / "sub" / "c.csv", "image,caption\na.png,x"), images=folder)


START = "image,caption\na.png,a dog\n"
SPLIT = "image,caption,split\na.png,x,train\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", START + "b.png,\n", "c.csv, line 3: caption is '', expected one caption"),
        ("c.csv", START + 'b.png,"[""it\'s"", \'a\']"\n', "line 3: caption is .*one caption"),
        ("c.csv", START + "d.png,a dog\n", "line 3: missing image .*d.png"),
        ("c.csv", START + 'b.png,"[""it\'s"", \'a\']"\n', "line 3: caption is .*one caption"),
        ("c.csv", START + "b.png,a dog, running\n", "line 3: more cells than the header .*; quote"),
        ("c.csv", START + 'b.png,"a dog\nb.png,a cat\n', "line 3: .*; quote captions"),
        ("c.csv", SPLIT + "b.png,y,fold1", "line 3: split is 'fold1', expected train, val or test"),
        ("c.csv", SPLIT + "a.png,y,test", "line 3: split is test, but train above"),
        ("c.csv", "image,words\na.png,x", "columns are image, words; .* one of caption"),
        ("c.csv", "photo,caption\na.png,x", "line 2: the columns are photo, caption; expected one"),
        ("c.csv", "", "no images with captions below"),
        ("c.csv", START.encode("utf-16"), "cannot read UTF-8 text from .*c.csv: 'utf-8"),
        ("c.jsonl", '{"image": "a.png", "caption": []}', r"line 1: caption is \[\]"),
        ("c.jsonl", "[" * 100_000, "no json object in .*line 1: RecursionError"),
    ],
)
def test_mistakes_in_tables_are_named_with_file_and_line(name, content, message, folder):
    with pytest.raises(ValueError, match=message) as caught:
        dualenc.load_pairs(write(folder / name, content))
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spec": "cifar11"}, "set or kind of file 'cifar11'; expected cifar10, "),
        ({"spec": "missing.csv"}, "cannot read UTF-8 text from missing.csv: .*No such file"),
        ({"spec": "https://host/{08..9}.tar"}, "cannot read https://host/08.tar: .*No such file"),
        ({"spec": "shapes", "split": "valid"}, "unknown split 'valid'; expected val, train, test"),
        ({"spec": "shapes", "val_fraction": 5}, "val_fraction is 5, expected a share from 0 to 1"),
    ],
)
def test_unknown_data_is_refused_with_what_there_is(options, message):
    with pytest.raises((ValueError, OSError), match=message):
        dualenc.load_pairs(**options)


def test_a_reader_is_one_row_and_one_function(monkeypatch, tmp_path):
    """Here of a file whose images come from a data set of its own."""

    class Gray(torch.utils.data.Dataset):
        def __getitem__(self, i):
            return Image.new("L", (8, 8)), "whatever else"

    def read_parquet(path, **_):
        image = Gray(), 3
        for row, caption in enumerate(("x", "y")):
            yield dualenc.Row(f"{path}, row {row}", image, caption, split="test")

    monkeypatch.setitem(dualenc.DATA_READERS, ".parquet", read_parquet)
    monkeypatch.chdir(write(tmp_path / "data.parquet", "").parent)
    pairs = dualenc.load_pairs("data.parquet", "val")
    assert pairs.captions == [["x", "y"]] and pairs[0][0].size == (8, 8)
    assert pairs.names == ["data.parquet, row 0"]


# ---- Folders


def test_class_folders_become_captions_through_templates(tmp_path, capsys):
    found = ["big_dog/0.jpg", "big_dog/part.2/1.JPEG", "cat/0.jfif", "cat/1.avif", "cat/2.ppm"]
    hidden = ["cat/.2.png", ".thumbs/cat/3.png", "__MACOSX/cat/._4.png", "cat/._0.jpg"]
    for name in (*found, *hidden, "top.png", "up.png"):
        save_image(tmp_path / name)
    write(tmp_path / "cat" / "film.mpg", ""), write(tmp_path / "cat" / "film", "")
    (tmp_path / "cat").symlink_to((tmp_path / "cat").rename(tmp_path / ".cat"))
    pairs = dualenc.load_pairs(tmp_path, "all", templates=("a {}.", "one {}"))
    assert pairs.classes == ["big dog", "cat"] and pairs.labels == [0, 0, 1, 1, 1]
    assert pairs.names == found and pairs.captions[0] == ["a big dog.", "one big dog"]
    notes = capsys.readouterr().out
    assert f"ignored in {tmp_path}: files with .mpg, no suffix\n" in notes
    assert f"ignored: images of {tmp_path} outside of its class folders" in notes
    names = {"cat": "tom_cat", "big_dog": "big_dog", "zebra": "more names than classes"}
    new = dualenc.load_pairs(tmp_path, "all", class_names=names, templates=("a {}",))
    assert new.classes == ["big dog", "tom cat"] and new.captions[-1] == ["a tom cat"]
    with pytest.raises(ValueError, match="unknown class to rename 'cats'; expected cat"):
        dualenc.load_pairs(tmp_path, class_names={"cats": "tom"})
    with pytest.raises(ValueError, match="template 'a photo' has no {} for the class name"):
        dualenc.load_pairs(tmp_path, templates=("a photo",))
    table = write(tmp_path / "c.csv", "image,caption\ntop.png,a dog")
    with pytest.raises(ValueError, match="class names given, but .* has captions, not classes"):
        dualenc.load_pairs(table, class_names=names)


@pytest.mark.parametrize(
    "words", [("train", "val", "test"), ("Training", "Validation", "Testing"), ("Train", "valid")]
)
def test_own_splits_of_a_folder_are_used(words, tmp_path):
    for word, name in itertools.product(words, ("cat", "dog")):
        save_image(tmp_path / word / name / "0.png")
    for split, word in (("train", words[0]), ("val", words[1]), ("test", words[-1])):
        pairs = dualenc.load_pairs(tmp_path, split)
        assert pairs.names == [f"{word}/{name}/0.png" for name in ("cat", "dog")]
    save_image(tmp_path / "extra" / "dog" / "0.png")
    with pytest.raises(ValueError, match=f"has .*{words[0]}.*, but also extra"):
        dualenc.load_pairs(tmp_path)
    for word in words[1:]:
        shutil.rmtree(tmp_path / word)
    assert len(dualenc.load_pairs(tmp_path, "all").classes) == 2, "a class may be called train"


def test_images_with_text_files_have_a_caption_a_line(tmp_path, capsys):
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "sub" / "b.jpg")
    write(tmp_path / "a.txt", "one\n\n two \n")
    with pytest.raises(ValueError, match="cannot read .*b.txt: .*No such file"):
        dualenc.load_pairs(tmp_path)
    write(tmp_path / "sub" / "b.txt", "three")
    assert load_all(tmp_path) == {"a.png": ["one", "two"], "sub/b.jpg": ["three"]}
    assert "ignored" not in capsys.readouterr().out


# ---- COCO, Karpathy, torchvision


def test_coco_captions_are_joined_by_image_id(tmp_path):
    save_image(tmp_path / "images" / "x.jpg")
    notes = [{"id": i, "image_id": 7, "caption": text} for i, text in enumerate(("one ", "two"))]
    data = {"images": [{"id": 7, "file_name": "x.jpg"}], "annotations": notes}
    path = write(tmp_path / "captions.json", json.dumps(data))
    assert load_all(path, images=tmp_path / "images") == {"x.jpg": ["one", "two"]}
    notes[1]["image_id"] = 8
    with pytest.raises(ValueError, match="annotation 1: missing image"):
        load_all(write(path, json.dumps(data)), images=tmp_path / "images")
    for wrong, message in (({"info": 1}, "it has info; expected"), ({"images": 5}, "TypeError")):
        with pytest.raises(ValueError, match=f"cannot read .*captions.json: {message}"):
            load_all(write(path, json.dumps(wrong)))


def test_karpathys_splits_are_the_datas_own(tmp_path):
    entries = []
    for i, split in enumerate(["train", "restval", "val", "test"]):
        save_image(tmp_path / "part" / f"{i}.jpg")
        entry = {"filepath": "part", "filename": f"{i}.jpg", "split": split}
        entries.append({**entry, "sentences": [{"raw": f"caption {i}"}]})
    splits = names_by_split(write(tmp_path / "d.json", json.dumps({"images": entries})))
    assert splits["train"] == ["part/0.jpg", "part/1.jpg"]
    assert (splits["val"], splits["test"]) == (["part/2.jpg"], ["part/3.jpg"])


def countries(root, count):
    """Country211's folders."""
    for part, n in (("train", count), ("valid", 2), ("test", 3)):
        for i in range(n):
            path = root / "country211" / part / f"land {i % 3}" / f"{i:02}.png"
            save_image(path, (9 * i, 0, 0))


def test_torchvision_sets_are_read_by_name(tmp_path):
    countries(tmp_path, 6)
    splits = names_by_split("country211", data_root=tmp_path)
    assert [len(names) for names in splits.values()] == [6, 2, 3, 11]
    test = dualenc.load_pairs("country211", "test", data_root=tmp_path, templates=("a {}",))
    assert test.captions == [["a land 0"], ["a land 1"], ["a land 2"]]
    assert test[1][0].getpixel((0, 0)) == (9, 0, 0) and splits["val"][0] == "country211/val/0"
    for i in range(40):
        save_image(tmp_path / "eurosat" / "2750" / f"land {i % 2}" / f"{i}.jpg")
    splits = names_by_split("eurosat", data_root=tmp_path, val_fraction=0.3)
    assert {*splits["train"]}.isdisjoint(splits["val"]) and 0 < len(splits["val"]) < 40


@pytest.mark.parametrize("name", dualenc.TORCHVISION_SETS)
def test_every_torchvision_set_exists_and_takes_its_arguments(name, tmp_path):
    """Absent data is the only complaint."""
    with pytest.raises(ValueError, match=f"cannot read {name} below .*; --download fetches it"):
        dualenc.load_pairs(name, data_root=tmp_path)


# ---- Shards


def write_shard(path, members):
    """A tar file of {member name: bytes}."""
    with tarfile.open(path, "w") as tar:
        directory = tarfile.TarInfo("folder.jpg")  # no image, whatever its name
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(first, last):
    """{member: bytes} of samples with one caption or two."""
    members = {}
    for i in range(first, last):
        values = np.random.default_rng(i).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(values).save(buffer := io.BytesIO(), "PNG")
        members |= {f"{i:05d}.png": buffer.getvalue(), f"{i:05d}.cls": b"7"}
        members[f"{i:05d}.txt"] = f"image {i}\n\nagain {i}\n".encode() if i % 3 else b"one"
    return members


def test_shards_hold_what_the_same_images_in_files_hold(tmp_path):
    for shard, (first, last) in enumerate([(0, 7), (7, 9), (9, 12)]):
        write_shard(tmp_path / f"s-{shard + 8:02}.tar", samples(first, last))
    pairs = dualenc.load_pairs(tmp_path / "s-{08..10}.tar", "all")
    assert pairs.names[0] == "s-08.tar/00000" and pairs.names[11] == "s-10.tar/00011"
    for i in range(12):
        content = samples(i, i + 1)
        with Image.open(io.BytesIO(content[f"{i:05d}.png"])) as image:
            assert np.array_equal(np.asarray(pairs[i][0]), np.asarray(image)), i
        assert pairs[i][1] == content[f"{i:05d}.txt"].decode().replace("\n\n", "\n").splitlines()


def test_other_members_of_a_shard_are_left_alone(tmp_path):
    png = samples(0, 1)["00000.png"]
    members = {"d/a.PNG": png, "d/a.json": b"{", "./d/a.txt": "\ufeff one\r\n".encode()}
    members |= {"d/b.seg.png": png, "d/.hidden.png": png, "README": b"words"}
    members |= {"broken.png": b"x", "broken.txt": b"x"}
    pairs = dualenc.load_pairs(write_shard(tmp_path / "a.tar", members), "all")
    assert pairs.names == ["a.tar/d/a", "a.tar/broken"] and pairs.captions == [["one"], ["x"]]
    with pytest.raises(ValueError, match=r"cannot read image .*a.tar', \d+, 1\): cannot identify"):
        pairs[1]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"x"}, "s.tar/a: caption is '', expected one caption"),
        ({"a.png": b"x", "a.txt": b"\n"}, "s.tar/a: caption is ''"),
        ({"a.txt": b"x"}, "s.tar/a: missing image"),
        ({"a.png": b"x", "a.txt": b"\xff\xfa"}, "cannot read .*s.tar: .*'utf-8' codec"),
    ],
)
def test_samples_that_are_no_pairs_are_named_with_their_shard(members, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        dualenc.load_pairs(write_shard(tmp_path / "s.tar", members))


def test_shards_cut_anywhere_are_refused_by_name(tmp_path):
    """Also where the file would look whole to tarfile."""
    path = write_shard(tmp_path / "s.tar", samples(0, 3))
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    for length in (0, 100, 512, 700, 1024, 1600, end // 2, end - 1024, end - 512, end, end + 300):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cannot read .*s.tar: "):
            dualenc.load_pairs(path)
    path.write_bytes(content[: end + 512])
    assert len(dualenc.load_pairs(path, "all")) == 3
