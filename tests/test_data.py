"""Claims about data specs: what is read, how it is split, and what a user is told about mistakes."""

import csv
import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import dualenc
import eval as evaluation
import train


def save_picture(path, colour="red", size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def all_splits(spec, **options):
    return {split: dualenc.load_pairs(spec, split, **options) for split in dualenc.SPLITS}


# ---- Splits ---------------------------------------------------------------------------------------------------------


def test_a_pictures_captions_never_straddle_the_split(tmp_path):
    """Split by the picture's name: train and test share no picture, together they are everything, rows in any order."""
    rows = [(f"{i}.png", f"caption {j} of {i}") for i in range(60) for j in range(3)]
    for i in range(60):
        save_picture(tmp_path / f"{i}.png")
    np.random.default_rng(0).shuffle(rows)
    with open(tmp_path / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    splits = all_splits(tmp_path / "captions.csv", val_fraction=0.3)
    train, test = splits["train"], splits["test"]
    assert not set(train.names) & set(test.names) and len(train) + len(test) == 60
    assert 8 <= len(test) <= 28, "about 30% of 60"
    assert splits["val"].names == test.names
    for pairs in (train, test):
        for name, captions in zip(pairs.names, pairs.captions):
            assert sorted(captions) == [f"caption {j} of {name[:-4]}" for j in range(3)]


def test_a_split_depends_on_names_alone():
    """New pictures never move old ones, and the share held out is the share asked for."""
    names = [f"picture{i}.jpg" for i in range(10_000)]
    out = {names[i] for i in dualenc.hashed_split(names, "test", 0.1)}
    assert len(out) == pytest.approx(1000, abs=100)
    more = [*names, "new.jpg"][::-1]
    assert {more[i] for i in dualenc.hashed_split(more, "test", 0.1)} - {"new.jpg"} == out
    assert {names[i] for i in dualenc.hashed_split(names, "train", 0.1)} == set(names) - out
    assert dualenc.hashed_split(names, "test", 0.0) == []


# ---- Caption files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header", [("image", "caption"), ("filepath", "title"), ("path", "text"), (" Image", "Caption ")]
)
@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_columns_are_found_by_name_and_separators_sniffed(tmp_path, header, separator):
    save_picture(tmp_path / "sub" / "a.png", "blue")
    lines = [separator.join(["id", *header]), separator.join(["1", "sub/a.png", '"a, b; c | d"'])]
    (tmp_path / "c.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    (pairs,) = [p for p in all_splits(tmp_path / "c.csv").values() if len(p)][:1]
    picture, captions = pairs[0]
    assert captions == ["a, b; c | d"] and picture.getpixel((0, 0)) == (0, 0, 255) and pairs.names == ["sub/a.png"]


def test_captions_are_text_whatever_they_look_like(tmp_path):
    """ "None" and "NA" are captions; quotes may hold separators, quotes and line ends; the file may be UTF-16."""
    save_picture(tmp_path / "a.png")
    captions = ["None", "NA", "null", 'say "hi", twice', "two\nlines", "piñata 日本 🎉"]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        with open(tmp_path / "c.csv", "w", newline="", encoding=encoding) as file:
            csv.writer(file).writerows([("image", "caption"), *(("a.png", caption) for caption in captions)])
        pairs = dualenc.load_pairs(tmp_path / "c.csv", "train", val_fraction=0.0)
        assert pairs.captions == [captions], encoding


def test_jsonl_rows_may_hold_one_caption_or_several(tmp_path):
    save_picture(tmp_path / "a.png")
    save_picture(tmp_path / "b.png")
    rows = [
        {"image": "a.png", "text": ["one", "two"]},
        {"image": "b.png", "text": "three"},
        {"image": "a.png", "text": "4"},
    ]
    (tmp_path / "c.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    pairs = dualenc.load_pairs(tmp_path / "c.jsonl", "train", val_fraction=0.0)
    assert dict(zip(pairs.names, pairs.captions)) == {"a.png": ["one", "two", "4"], "b.png": ["three"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", "image,words\na.png,x", r"no caption column: it has image, words; expected one of caption"),
        ("c.csv", "img,caption\na.png,x", r"no picture column: it has img, caption; expected one of image, filepath"),
        ("c.csv", "image,caption\na.png,x\nb.png,y", r"c.csv, line 3: missing picture .*b.png"),
        ("c.csv", "image,caption\na.png,x\na.png,  ", r"c.csv, line 3: empty caption for .*a.png"),
        ("c.csv", "image,caption\na.png", r"c.csv, line 2: empty caption"),
        ("c.csv", "image,caption\n,x", r"c.csv, line 2: no picture named"),
        ("c.csv", "image,caption\n", r"no pairs below"),
        ("c.csv", b"image,caption\na.png,\xff\xfa", r"c.csv is not utf-8-sig text"),
        ("c.jsonl", '{"image": "a.png", "caption": "x"}\n{bad', r"c.jsonl, line 2 is not json"),
        ("c.jsonl", "[1]", r"c.jsonl, line 1 is not a json object"),
        ("c.jsonl", '{"image": "a.png", "caption": 3}', r"c.jsonl, line 1: caption 3"),
    ],
)
def test_mistakes_in_caption_files_are_named_with_file_and_line(tmp_path, name, content, message):
    save_picture(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        dualenc.load_pairs(tmp_path / name, "train", val_fraction=0.0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cifar11", r"unknown data 'cifar11'.*did you mean cifar10"),
        ("no_such_folder/", r"unknown data 'no_such_folder/'"),
        ("missing.csv", r"no caption file missing.csv"),
    ],
)
def test_unknown_data_is_refused_with_what_there_is(spec, message):
    with pytest.raises(ValueError, match=message):
        dualenc.load_pairs(spec)
    with pytest.raises(ValueError, match="unknown split 'valid'; expected train, val, test"):
        dualenc.load_pairs("shapes", "valid")
    with pytest.raises(ValueError, match="val_fraction is 5, expected a share from 0 to 1"):
        dualenc.load_pairs("shapes", val_fraction=5)


# ---- Folders --------------------------------------------------------------------------------------------------------


def test_class_folders_become_captions_through_templates(tmp_path):
    for name, colour in (("big_dog", "red"), ("cat", "blue")):
        for i in range(3):
            save_picture(tmp_path / name / f"{i}.jpg", colour)
    pairs = dualenc.load_pairs(tmp_path, "train", val_fraction=0.0, templates=("a {}.", "one {}"))
    assert pairs.classes == ["big dog", "cat"] and pairs.labels == [0, 0, 0, 1, 1, 1]
    assert pairs.captions[0] == ["a big dog.", "one big dog"] and pairs.names[0] == "big_dog/0.jpg"
    assert pairs[5][0].getpixel((0, 0))[2] > 200
    captions, caption_groups, picture_groups = pairs.caption_table()
    assert captions == ["a big dog.", "one big dog", "a cat.", "one cat"] and caption_groups == [0, 0, 1, 1]
    assert picture_groups == pairs.labels
    with pytest.raises(ValueError, match="template 'a photo' has no {} for the class name"):
        dualenc.load_pairs(tmp_path, templates=("a photo",))


def test_hidden_folders_are_left_alone(tmp_path):
    for picture in ("x.jpg", ".thumbs/x.jpg", "part/y.jpg", "part/.thumbs/y.jpg"):
        save_picture(tmp_path / "classes" / "cat" / picture)
        save_picture(tmp_path / "texts" / picture)
    (tmp_path / "classes" / ".thumbs").mkdir()
    for text in ("x.txt", "part/y.txt"):
        (tmp_path / "texts" / text).write_text("a cat")
    assert dualenc.load_pairs(tmp_path / "classes", val_fraction=0.0).names == ["cat/part/y.jpg", "cat/x.jpg"]
    (tmp_path / "texts" / "part" / "y.jpg").unlink()
    assert dualenc.load_pairs(tmp_path / "texts", val_fraction=0.0).names == ["x.jpg"]


def test_own_splits_of_a_folder_are_used(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        for i in range(count):
            save_picture(tmp_path / split / "dog" / f"{i}.png")
    splits = all_splits(tmp_path)
    assert {name: len(pairs) for name, pairs in splits.items()} == {"train": 4, "val": 2, "test": 2}
    save_picture(tmp_path / "val" / "dog" / "0.png")
    assert len(dualenc.load_pairs(tmp_path, "val")) == 1 and len(dualenc.load_pairs(tmp_path, "test")) == 2


def test_incomplete_folders_are_refused(tmp_path):
    save_picture(tmp_path / "a" / "train" / "dog" / "0.png")
    with pytest.raises(ValueError, match="has train/ but neither val/ nor test/"):
        dualenc.load_pairs(tmp_path / "a", "test")
    save_picture(tmp_path / "b" / "dog" / "0.png")
    (tmp_path / "b" / "cat").mkdir()
    with pytest.raises(ValueError, match="class folder .*cat holds no pictures"):
        dualenc.load_pairs(tmp_path / "b")
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        dualenc.load_pairs(tmp_path / "c")


def test_pictures_with_text_files_have_a_caption_a_line(tmp_path):
    save_picture(tmp_path / "a.png")
    save_picture(tmp_path / "b.jpg")
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    with pytest.raises(ValueError, match=r"b.jpg has no caption file b.txt beside it"):
        dualenc.load_pairs(tmp_path)
    (tmp_path / "b.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"caption file .*b.txt is empty"):
        dualenc.load_pairs(tmp_path)
    (tmp_path / "b.txt").write_text("three")
    pairs = dualenc.load_pairs(tmp_path, val_fraction=0.0)
    assert dict(zip(pairs.names, pairs.captions)) == {"a.png": ["one", "two"], "b.jpg": ["three"]}


# ---- COCO, Flickr, torchvision --------------------------------------------------------------------------------------


def test_coco_captions_are_joined_by_picture_id(tmp_path):
    save_picture(tmp_path / "pictures" / "x.jpg")
    data = {
        "images": [{"id": 7, "file_name": "x.jpg"}],
        "annotations": [{"id": 1, "image_id": 7, "caption": "one "}, {"id": 2, "image_id": 7, "caption": "two"}],
    }
    (tmp_path / "captions.json").write_text(json.dumps(data))
    spec, images = f"coco:{tmp_path / 'captions.json'}", tmp_path / "pictures"
    assert dualenc.load_pairs(spec, images=images, val_fraction=0.0).captions == [["one", "two"]]
    data["annotations"][1]["image_id"] = 8
    (tmp_path / "captions.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="annotation 2: no picture named"):
        dualenc.load_pairs(spec, images=images)
    (tmp_path / "captions.json").write_text('{"info": 1}')
    with pytest.raises(ValueError, match="no COCO caption file: it has info"):
        dualenc.load_pairs(spec)


def test_karpathys_splits_are_the_datas_own(tmp_path):
    entries = []
    for i, split in enumerate(["train", "restval", "val", "test"]):
        save_picture(tmp_path / "part" / f"{i}.jpg")
        sentences = [{"raw": f"caption {i}"}]
        entries.append({"filename": f"{i}.jpg", "filepath": "part", "split": split, "sentences": sentences})
    (tmp_path / "d.json").write_text(json.dumps({"images": entries}))
    for kind in ("coco", "flickr"):
        splits = all_splits(f"{kind}:{tmp_path / 'd.json'}")
        got = {split: [c for captions in pairs.captions for c in captions] for split, pairs in splits.items()}
        assert got == {"train": ["caption 0", "caption 1"], "val": ["caption 2"], "test": ["caption 3"]}


@pytest.mark.parametrize(
    "text",
    [
        "a.jpg#0\tOne dog , running .\na.jpg#1\tTwo",
        'image,caption\na.jpg,"One dog , running ."\na.jpg,Two',
        "image_name| comment_number| comment\na.jpg| 0| One dog , running .\na.jpg| 1| Two",
        "\na.jpg,One dog , running .\n\na.jpg,Two\n",
    ],
)
def test_flickr_caption_files_of_all_three_kinds_are_read(tmp_path, text):
    save_picture(tmp_path / "a.jpg")
    (tmp_path / "f.txt").write_text(text)
    pairs = dualenc.load_pairs(f"flickr:{tmp_path / 'f.txt'}", val_fraction=0.0)
    assert pairs.captions == [["One dog , running .", "Two"]]
    (tmp_path / "f.txt").write_text('a.jpg,"A ""stop"" sign , red"\na.jpg,A shirt with "Go"\na.jpg#2\t"Quoted"')
    assert dualenc.load_pairs(f"flickr:{tmp_path / 'f.txt'}", val_fraction=0.0).captions == [
        ['A "stop" sign , red', 'A shirt with "Go"', '"Quoted"']
    ]
    (tmp_path / "f.txt").write_text("just words")
    with pytest.raises(ValueError, match="line 1 is no Flickr caption: 'just words'"):
        dualenc.load_pairs(f"flickr:{tmp_path / 'f.txt'}")
    save_picture(tmp_path / "elsewhere" / "b.jpg")
    (tmp_path / "f.txt").write_text("b.jpg#0\tTwo")
    pairs = dualenc.load_pairs(f"flickr:{tmp_path / 'f.txt'}", images=tmp_path / "elsewhere", val_fraction=0.0)
    assert pairs.captions == [["Two"]] and pairs[0][0].size


def write_idx(path, array):
    """The file format of MNIST: type and dimensions, then bytes."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.tobytes())


def test_torchvision_sets_are_read_by_name_with_their_own_splits(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("t10k", 3)):
        write_idx(raw / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8))
    splits = all_splits("fashionmnist", data_root=tmp_path, templates=("a {}",))
    assert {name: len(pairs) for name, pairs in splits.items()} == {"train": 6, "val": 3, "test": 3}
    assert splits["test"].captions == [["a T-shirt/top"], ["a Trouser"], ["a Pullover"]]
    assert splits["test"][0][0].mode == "L" and splits["train"].classes[5] == "Sandal"
    with pytest.raises(ValueError, match="cifar10 is not below .*; train.py's --download fetches it"):
        dualenc.load_pairs("cifar10", data_root=tmp_path)


def test_a_torchvision_set_without_splits_of_its_own_is_split_once(tmp_path):
    for kind in ("Forest", "River"):
        for i in range(20):
            save_picture(tmp_path / "eurosat" / "2750" / kind / f"{i}.jpg")
    splits = {
        name: set(pairs.names) for name, pairs in all_splits("eurosat", data_root=tmp_path, val_fraction=0.3).items()
    }
    assert splits["val"] == splits["test"] and not splits["train"] & splits["val"]
    assert len(splits["train"] | splits["val"]) == 40 and splits["val"]


def test_a_torchvision_set_with_other_words_for_labels_and_classes_is_read(tmp_path):
    """Caltech101 calls them y and categories. (To read its pictures, torchvision needs scipy.)"""
    for kind in ("ant", "bee", "BACKGROUND_Google"):
        for i in range(1, 11):
            save_picture(tmp_path / "caltech101" / "101_ObjectCategories" / kind / f"image_{i:04}.jpg")
    (tmp_path / "caltech101" / "Annotations").mkdir()
    splits = all_splits("caltech101", data_root=tmp_path, val_fraction=0.3, templates=("a {}",))
    assert all(pairs.classes == ["ant", "bee"] for pairs in splits.values())
    both = [*splits["train"].captions, *splits["val"].captions]
    assert len(both) == 20 and both.count(["a ant"]) == both.count(["a bee"]) == 10


@pytest.mark.parametrize("name", dualenc.TORCHVISION_SETS)
def test_every_listed_torchvision_set_exists_and_takes_its_arguments(name, tmp_path):
    """Absent data is the only complaint: class, split names and arguments are right."""
    for split in dualenc.SPLITS:
        with pytest.raises(ValueError, match=f"{name} is not below"):
            dualenc.load_pairs(name, split, data_root=tmp_path)


# ---- Shapes ---------------------------------------------------------------------------------------------------------


def test_shapes_come_from_the_seed_alone():
    one, two, other = (dualenc.ShapesPairs("train", seed=seed, count=20) for seed in (0, 0, 1))
    assert one.captions == two.captions != other.captions
    assert all(np.array_equal(one[i][0], two[i][0]) for i in range(20))
    assert one[3][0].size == (64, 64) and dualenc.ShapesPairs("train", count=1, side=32)[0][0].size == (32, 32)


def test_as_many_shapes_are_held_out_as_there_are():
    objects = [(size, c, shape) for size in dualenc.SIZES for c in dualenc.COLOURS for shape in dualenc.SHAPES]
    known = [thing for thing in objects if thing[1:] not in dualenc.HELD_OUT_OBJECTS]
    scenes = [(a, relation, b) for a in known for b in known if a != b for relation in dualenc.RELATIONS]
    held_out = [scene for scene in scenes if dualenc.is_held_out(*scene)]
    assert 2 * len(held_out) == dualenc.MAX_HELD_OUT
    assert len(dualenc.ShapesPairs("test", count=dualenc.MAX_HELD_OUT)) == dualenc.MAX_HELD_OUT
    for count in (3, dualenc.MAX_HELD_OUT + 2):
        with pytest.raises(ValueError, match=f"{count} held-out pictures; expected an even number up to 3,184"):
            dualenc.ShapesPairs("test", count=count)


def test_held_out_shapes_are_512_distinct_captions_never_seen_in_training():
    train, test = dualenc.load_pairs("shapes"), dualenc.load_pairs("shapes", "test")
    seen = {frozenset([a, b]) for a, _, b in train.pictures.scenes}
    assert len(test) == len({captions[0] for captions in test.captions}) == 512
    assert not {tuple(c) for c in train.captions} & {tuple(c) for c in test.captions}
    objects = {thing[1:] for scene in train.pictures.scenes for thing in (scene[0], scene[2])}
    assert not objects & dualenc.HELD_OUT_OBJECTS
    assert {colour for colour, _ in objects} == set(dualenc.COLOURS) and {s for _, s in objects} == set(dualenc.SHAPES)
    scenes = test.pictures.scenes
    new = [any(thing[1:] in dualenc.HELD_OUT_OBJECTS for thing in (a, b)) for a, _, b in scenes]
    assert Counter(new) == {True: 256, False: 256}
    known = [frozenset([a, b]) for (a, _, b), is_new in zip(scenes, new) if not is_new]
    assert any(pair in seen for pair in known), "the same objects are known in other arrangements"
    assert not set(scenes) & set(train.pictures.scenes)
    for scenes in (test.pictures.scenes, train.pictures.scenes):
        assert all(mirror == (b, r, a) for (a, r, b), mirror in zip(scenes[::2], scenes[1::2])), "its mirror is next"


def test_shapes_look_like_their_captions():
    """Where the caption says it is and in the colour it says, there is a thing of about the size it says."""
    pairs = dualenc.ShapesPairs("test", count=64)
    for i, (first, relation, second) in enumerate(pairs.pictures.scenes):
        image = np.asarray(pairs[i][0], dtype=int)
        half = (slice(None), slice(0, 32)) if relation == "left of" else (slice(0, 32), slice(None))
        other = (slice(None), slice(32, 64)) if relation == "left of" else (slice(32, 64), slice(None))
        for (size, colour, _), part in ((first, half), (second, other)):
            near = (np.abs(image[part] - dualenc.COLOURS[colour]).max(-1) <= 20).sum()
            smallest, largest = {"small": (30, 190), "large": (130, 640)}[size]
            assert smallest <= near <= largest, (pairs.captions[i], size, colour, near)


def test_shape_captions_say_the_scene_in_one_of_two_ways():
    a, b = ("small", "red", "circle"), ("large", "blue", "star")
    import random

    said = {dualenc.describe(*dualenc.as_told(a, "left of", b, random.Random(seed))) for seed in range(20)}
    assert said == {"a small red circle left of a large blue star", "a large blue star right of a small red circle"}
    said = {dualenc.describe(*dualenc.as_told(a, "above", b, random.Random(seed))) for seed in range(20)}
    assert said == {"a small red circle above a large blue star", "a large blue star below a small red circle"}


def test_selected_pairs_keep_picture_captions_and_label_together():
    pairs = dualenc.Pairs(list("abc"), [0, 1, 2], [["x"], ["y"], ["z"]], [0, 1, 0], ["k", "l"])
    some = pairs.select([2, 1])
    assert (some.names, [some[i] for i in range(2)], some.labels) == (["c", "b"], [(2, ["z"]), (1, ["y"])], [0, 1])
    assert isinstance(some, torch.utils.data.Dataset) and len(some.pictures) == 2


def test_a_picture_does_not_give_the_wording_of_its_caption_away():
    """ "A left of B" and "B right of A" describe one picture: its background must not say which of them was drawn."""
    pairs = dualenc.ShapesPairs("train", count=400)
    as_drawn = torch.tensor([told[1] in dualenc.RELATIONS for told in pairs.told]).float()
    backgrounds = torch.tensor([picture.getpixel((0, 0)) for picture in pairs.pictures]).float()
    assert 0.4 < as_drawn.mean() < 0.6
    correlations = torch.corrcoef(torch.cat([as_drawn[None], backgrounds.T]))[0, 1:]
    assert correlations.abs().max() < 0.2, f"red, green and blue of the background: {correlations.tolist()}"


# ---- Large JPEGs ----------------------------------------------------------------------------------------------------


def photo(size, seed=0):
    """What photographs have: soft colour at several scales, hard edges, and noise in every pixel."""
    rng, (width, height) = np.random.default_rng(seed), size
    values = np.zeros((height, width, 3), dtype=np.float32)
    for cells, contrast in ((4, 60), (30, 20), (200, 10)):
        soft = rng.normal(128 / 3, contrast, (cells, cells, 3)).clip(0, 255).astype(np.uint8)
        values += np.asarray(Image.fromarray(soft).resize(size, Image.Resampling.BICUBIC))
    for _ in range(12):
        x, y, side = rng.integers(width), rng.integers(height), rng.integers(5, height // 4)
        values[y : y + side, x : x + 2 * side] = rng.integers(0, 256, 3)
    return Image.fromarray((values + rng.normal(0, 6, (height, width, 1))).clip(0, 255).astype(np.uint8))


def square(side):
    return dualenc.ImageTransform(resize=side, crop=(side, side))


@pytest.mark.parametrize(
    ("size", "transform", "scale"),
    [
        ((1600, 1200), square(64), 8),
        ((1600, 1200), square(224), 2),
        ((1200, 1600), dualenc.ImageTransform(resize=(96, 64), crop=None, interpolation="bilinear"), 4),
        ((1603, 1197), square(32), 4),
        ((1603, 1197), square(100), 2),
    ],
)
def test_large_jpegs_decoded_smaller_come_to_the_same_pixels(size, transform, scale, tmp_path):
    """By less than one level of 255 on average; bicubic and bilinear, both good filters, differ by more."""
    photo(size).save(tmp_path / "a.jpg", quality=90)
    assert transform.decode_scale(size) == scale
    files = dualenc.PictureFiles([tmp_path / "a.jpg"])
    small = dualenc.sized_for(transform, files)[0]
    assert small.size == tuple(-(-side // scale) for side in size) and files[0].size == size
    full, reduced = (transform.resize_and_crop(dualenc.to_pixels(p)).float() for p in (files[0], small))
    assert 0 < (full - reduced).abs().mean() < 1
    other = dataclasses.replace(
        transform, interpolation={"bicubic": "bilinear"}.get(transform.interpolation, "bicubic")
    )
    assert (full - other.resize_and_crop(dualenc.to_pixels(files[0])).float()).abs().mean() > (
        full - reduced
    ).abs().mean()


def test_a_jpeg_is_decoded_smaller_only_if_twice_the_pixels_remain_and_nothing_moves():
    assert [square(64).decode_scale((side, side)) for side in (255, 256, 511, 512, 1023, 1024, 8000)] == [
        *(1, 2, 1, 4, 4, 8, 8)  # 511 pixels would be stretched to 512: a seventh of a final pixel
    ]
    assert square(64).decode_scale((1600, 1200), smallest_share=0.25) == 4
    assert square(64).decode_scale((1600, 1200), smallest_share=0.05) == 2, "a crop of a 20th needs more pixels"
    assert square(64).decode_scale((1201, 1201)) == 2 and square(64).decode_scale((639, 639)) == 1
    assert dualenc.ImageTransform(resize=None, crop=(64, 64)).decode_scale((8000, 8000)) == 1
    # 64 * 649 / 640 is 64.9 and 64 * 325 / 320 is 65: with another width the crop would lie elsewhere.
    assert square(64).resized(640, 649) == (64, 64) != square(64).resized(320, 325)
    assert square(64).decode_scale((649, 640)) == 1 and square(64).decode_scale((648, 640)) == 4


def test_small_pictures_and_other_formats_are_read_to_the_bit(tmp_path):
    photo((250, 254)).save(tmp_path / "a.jpg")
    photo((640, 640)).save(tmp_path / "b.png")
    files = dualenc.PictureFiles([tmp_path / "a.jpg", tmp_path / "b.png"])
    for full, sized in zip(files, dualenc.sized_for(square(64), files)):
        assert np.array_equal(np.asarray(full), np.asarray(sized))
    assert dualenc.sized_for(square(64), [1, 2]) == [1, 2], "other pictures are left alone"


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_jpegs_decoded_smaller_keep_colour_and_are_turned_upright(mode, tmp_path):
    picture = Image.new("RGB", (800, 640), (200, 40, 40))
    picture.paste((40, 40, 200), (0, 320, 800, 640))  # red above blue
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    picture.transpose(Image.Transpose.ROTATE_90).convert(mode).save(tmp_path / "a.jpg", quality=95, exif=exif)
    files = dualenc.PictureFiles([tmp_path / "a.jpg"])
    full, small = files[0], dualenc.sized_for(square(64), files)[0]
    assert full.size == (800, 640) and small.size == (200, 160) and small.mode == full.mode
    assert (np.asarray(full.resize(small.size)).astype(int) - np.asarray(small)).mean() == pytest.approx(0, abs=2)
    upper, lower = small.getpixel((100, 40)), small.getpixel((100, 120))
    assert upper != lower and (mode == "L" or (upper[0] > 150 and lower[2] > 150))


def test_training_evaluation_and_search_see_the_same_pixels(tmp_path, make_model):
    for i in range(3):
        photo((640, 512), seed=i).save(tmp_path / f"{i}.jpg")
        (tmp_path / f"{i}.txt").write_text(f"two dogs {i}")
    model, pairs = make_model(), dualenc.load_pairs(tmp_path, val_fraction=0.0)
    transform = model.processor.image_transform
    trained = train.TrainingPairs(pairs, transform, train.TrainConfig())
    measured = [image for image, _ in evaluation.ReadyPictures(pairs.pictures, transform)]
    cropped = train.TrainingPairs(pairs, transform, train.TrainConfig(crop_scale=0.1))
    full = [transform.resize_and_crop(dualenc.to_pixels(picture)) for picture in pairs.pictures]
    for i in range(3):
        assert torch.equal(trained[0, i][0], measured[i]) and not torch.equal(measured[i], full[i])
        assert trained.pictures[i].size == (160, 128) and cropped.pictures[i].size == (320, 256)
    embeds = evaluation.embed_pictures(model, pairs.pictures)
    gallery = evaluation.open_gallery(str(tmp_path), "test", "", str(tmp_path / "1.jpg"), 3)
    found = evaluation.measure(evaluation.Subject(model, gallery), ["search"])["search"]["found"]
    scores = (embeds @ embeds[1]).sort(descending=True)
    assert [f["picture"] for f in found] == [pairs.names[i] for i in scores.indices.tolist()]
    assert [f["score"] for f in found] == pytest.approx(scores.values.tolist(), abs=1e-6)
