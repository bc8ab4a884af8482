"""What happens to pictures and caption files as they are found: odd ones are read right, broken ones named."""

import io
import json
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dualenc

# Left half red, right half blue; gray ones: left dark, right light.
RED, BLUE = (200, 40, 40), (40, 40, 200)


def two_halves(mode="RGB", left=RED, right=BLUE, size=(40, 20)):
    picture = Image.new(mode, size, left)
    picture.paste(right, (size[0] // 2, 0, *size))
    return picture


def halves_of(picture):
    """The mean RGB of the left and of the right half."""
    values = np.asarray(picture.convert("RGB")).astype(float)
    middle = values.shape[1] // 2
    return values[:, :middle].mean((0, 1)), values[:, middle:].mean((0, 1))


def assert_looks(picture, left, right, tolerance=12):
    for got, expected in zip(halves_of(picture), (left, right)):
        assert np.abs(got - np.array(expected)).max() <= tolerance, f"{got} where a person sees {expected}"


# ---- Pictures as found ----------------------------------------------------------------------------------------------


def test_cmyk(tmp_path):
    two_halves().convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert Image.open(tmp_path / "a.jpg").mode == "CMYK"
    assert_looks(dualenc.open_picture(tmp_path / "a.jpg"), RED, BLUE)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_gray_keeps_its_brightness(name, tmp_path):
    values = np.full((20, 40), 12_800, dtype=np.uint16)
    values[:, 20:] = 51_200
    Image.fromarray(values).save(tmp_path / name)
    assert_looks(dualenc.open_picture(tmp_path / name), (50,) * 3, (200,) * 3, tolerance=1)
    Image.fromarray(values // 256).save(tmp_path / name)  # nearly black, not a picture of 8 bits
    assert_looks(dualenc.open_picture(tmp_path / name), (0,) * 3, (0,) * 3, tolerance=1)


@pytest.mark.parametrize(("scale", "kind"), [(1 / 255, "F"), (1, "F"), (1, "I"), (257, "I"), (257, "F")])
def test_32_bit_gray_is_scaled_by_what_its_values_can_be(scale, kind, tmp_path):
    values = np.full((20, 40), 50 * scale, dtype=np.float32 if kind == "F" else np.int32)
    values[:, 20:] = 200 * scale
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert Image.open(tmp_path / "a.tif").mode == kind
    assert_looks(dualenc.open_picture(tmp_path / "a.tif"), (50,) * 3, (200,) * 3, tolerance=1)


def test_16_bit_colour(tmp_path):
    """Pillow cannot write such a file, so its bytes are put together here: one row of 16-bit RGB."""
    row = b"\0" + b"".join(bytes([v, v]) for colour in [RED] * 20 + [BLUE] * 20 for v in colour)

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = (40).to_bytes(4, "big") + (1).to_bytes(4, "big")
    chunks = chunk(b"IHDR", size + bytes([16, 2, 0, 0, 0])) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    assert_looks(dualenc.open_picture(tmp_path / "a.png"), RED, BLUE, tolerance=1)


def test_what_is_transparent_is_white(tmp_path):
    palette = two_halves("P", 0, 1)
    palette.putpalette([*RED, *BLUE])
    palette.save(tmp_path / "palette.png", transparency=1)
    two_halves("LA", (100, 255), (100, 0)).save(tmp_path / "gray.png")
    two_halves("RGBA", (*RED, 255), (*BLUE, 0)).save(tmp_path / "colour.png")
    two_halves("RGB").save(tmp_path / "key.png", transparency=BLUE)
    assert_looks(dualenc.open_picture(tmp_path / "palette.png"), RED, (255,) * 3)
    assert_looks(dualenc.open_picture(tmp_path / "gray.png"), (100,) * 3, (255,) * 3)
    assert_looks(dualenc.open_picture(tmp_path / "colour.png"), RED, (255,) * 3)
    assert_looks(dualenc.open_picture(tmp_path / "key.png"), RED, (255,) * 3)


def test_gray_stays_gray(tmp_path):
    two_halves("L", 60, 180).save(tmp_path / "a.png")
    two_halves("1", 0, 1).save(tmp_path / "b.png")
    assert_looks(dualenc.open_picture(tmp_path / "a.png"), (60,) * 3, (180,) * 3, tolerance=0)
    assert_looks(dualenc.open_picture(tmp_path / "b.png"), (0,) * 3, (255,) * 3, tolerance=0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation, tmp_path):
    """The camera's note is undone: the pixels as stored, with the note, show the upright picture again."""
    turn = Image.Transpose
    as_stored = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE}
    as_stored |= {6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270}
    picture = two_halves() if orientation == 1 else two_halves().transpose(as_stored[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = dualenc.open_picture(tmp_path / "a.jpg")
    assert upright.size == (40, 20)
    assert_looks(upright, RED, BLUE)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_shows_its_first_frame(suffix, tmp_path):
    other = two_halves(left=BLUE, right=RED)
    two_halves().save(tmp_path / f"a.{suffix}", save_all=True, append_images=[other, other])
    assert_looks(dualenc.open_picture(tmp_path / f"a.{suffix}"), RED, BLUE, tolerance=25)


def test_names_and_extensions_do_not_matter(tmp_path):
    """A PNG called .jpg, and a name in another script with a space."""
    two_halves().save(tmp_path / "ein Bild é 写真.jpg", format="PNG")
    assert_looks(dualenc.open_picture(tmp_path / "ein Bild é 写真.jpg"), RED, BLUE, tolerance=0)


def test_a_name_that_is_no_utf_8_is_a_name_like_others(tmp_path):
    (tmp_path / "dog").mkdir()
    two_halves().save(tmp_path / "dog" / os.fsdecode(b"caf\xe9.png"), format="PNG")
    pairs = [dualenc.load_pairs(tmp_path, split, val_fraction=0.5) for split in ("train", "val")]
    assert sum(map(len, pairs)) == 1


def test_one_pixel_is_a_picture(tmp_path):
    Image.new("RGB", (1, 1), RED).save(tmp_path / "a.png")
    transform = dualenc.ImageTransform(resize=32, crop=(32, 32), mean=(0, 0, 0), std=(1, 1, 1))
    pixels = transform(dualenc.open_picture(tmp_path / "a.png"))
    assert torch.allclose(pixels * 255, torch.tensor(RED).float()[:, None, None].expand(3, 32, 32), atol=0.5)


@pytest.mark.parametrize("size", [(1, 99), (2, 200), (200, 2), (301, 3)])
def test_a_long_strip_shows_the_same_middle_as_if_it_were_resized_whole(size):
    picture = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = dualenc.ImageTransform(resize=12, crop=(12, 12))
    whole = [side * 12 // min(size) for side in size]
    expected = dualenc.centre_crop(dualenc.TF.resize(picture, whole, dualenc.InterpolationMode.BICUBIC), (12, 12))
    assert torch.equal(transform.resize_and_crop(picture), expected)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_a_very_long_strip_does_not_fill_the_memory(size, monkeypatch):
    """Resized whole, it would be 224 x 13,440,000 pixels."""
    original = dualenc.TF.resize

    def resize(image, size, *arguments, **more):
        assert max(size) < 10_000
        return original(image, size, *arguments, **more)

    monkeypatch.setattr(dualenc.TF, "resize", resize)
    transform = dualenc.ImageTransform(resize=224, crop=(224, 224))
    assert transform.resize_and_crop(torch.zeros(3, *size, dtype=torch.uint8)).shape == (3, 224, 224)


def test_pictures_up_to_32_times_as_long_as_wide_are_resized_whole():
    picture = torch.randint(0, 256, (3, 10, 320), dtype=torch.uint8)
    assert dualenc.shorten_strip(picture).shape == (3, 10, 320)
    assert dualenc.shorten_strip(picture[:, :9]).shape == (3, 9, 288)


def small_png():
    buffer = io.BytesIO()
    two_halves().save(buffer, "PNG")
    return buffer.getvalue()


def bomb():
    """A PNG that claims 30,000 x 30,000 pixels."""
    data = bytearray(small_png())
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


BROKEN = {
    "truncated": (small_png()[:80], "."),
    "empty": (b"", "cannot identify"),
    "text": (b"<html>not found</html>", "cannot identify"),
    "bomb": (bomb(), "decompression bomb"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "PostScript is not read"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_picture_is_named_with_its_row(kind, tmp_path):
    data, reason = BROKEN[kind]
    (tmp_path / "a.jpg").write_bytes(data)
    (tmp_path / "captions.csv").write_text("image,caption\na.jpg,a dog\n")
    pairs = dualenc.load_pairs(tmp_path / "captions.csv", "train", val_fraction=0)
    with pytest.raises(ValueError, match=rf"captions.csv, line 2: cannot read picture .*a\.jpg: .*{reason}"):
        pairs[0]


def test_what_is_no_file_is_no_picture(tmp_path):
    """A pipe would be waited for, for ever."""
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", tmp_path, tmp_path / "missing.png"):
        with pytest.raises(ValueError, match="no such file"):
            dualenc.open_picture(path)


def test_a_broken_picture_of_a_torchvision_set_is_named():
    class Broken:
        def __getitem__(self, i):
            raise OSError("image file is truncated")

    with pytest.raises(ValueError, match="cannot read picture 7 of Broken: image file is truncated"):
        dualenc.FirstOfEach(Broken())[7]


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it repairs
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damaged_bytes_give_a_picture_or_a_value_error(form, tmp_path):
    """Whatever Pillow's decoders raise, and they raise all kinds, becomes a ValueError that names the file."""
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    two_halves().save(buffer, form, **({"exif": exif} if form in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
    rng, refused = random.Random(form), 0
    for i in range(300):
        data = bytearray(buffer.getvalue())
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(min(len(data), 400))] = rng.randrange(256)
        path = tmp_path / f"{i}"
        path.write_bytes(data)
        try:
            assert dualenc.open_picture(path).mode in ("RGB", "L")
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 10


def test_unreadable_pictures_are_dropped_by_name(tmp_path):
    for i in range(5):
        two_halves().save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("two halves")
    (tmp_path / "3.png").write_bytes(b"")
    pairs = dualenc.load_pairs(tmp_path, "train", val_fraction=0)
    for workers in (0, 1):
        left, bad = dualenc.drop_unreadable(pairs, workers)
        assert left.names == ["0.png", "1.png", "2.png", "4.png"]
        assert list(bad) == ["3.png"] and "3.txt, line 1: cannot read picture" in bad["3.png"]


# ---- Caption files as found -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        two_halves().save(tmp_path / name)
    return tmp_path


def load(path, **arguments):
    """{picture: captions} of all the pictures of a caption file."""
    pairs = dualenc.load_pairs(path, "train", val_fraction=0, **arguments)
    return dict(zip(pairs.names, pairs.captions))


def table(folder, text, name="captions.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["captions.csv", "captions.tsv", "captions.jsonl"])
def test_byte_order_marks_utf_16_and_windows_newlines_change_nothing(encoding, newline, name, folder):
    rows = [("a.png", "a café"), ("b.png", "二匹の犬")]
    if name.endswith("jsonl"):
        lines = [json.dumps({"image": image, "caption": text}, ensure_ascii=False) for image, text in rows]
    else:
        separator = "," if name.endswith("csv") else "\t"
        lines = [separator.join(row) for row in [("image", "caption"), *rows]]
    path = table(folder, newline.join([*lines, ""]).encode(encoding), name)
    assert load(path) == {"a.png": ["a café"], "b.png": ["二匹の犬"]}


def test_quotes_newlines_and_separators_inside_quotes_are_part_of_the_caption(folder):
    text = 'image,caption\na.png,"a dog, that says ""no"""\nb.png,"two\r\nlines"\n\nc.png, "after a space"\n'
    expected = {"a.png": ['a dog, that says "no"'], "b.png": ["two\r\nlines"], "c.png": ["after a space"]}
    assert load(table(folder, text)) == expected


def test_none_na_and_null_are_captions_like_others(folder):
    captions = ["None", "NA", "null", "nan", "N/A", "0", "false"]
    lines = ["image,caption", *(f"a.png,{caption}" for caption in captions)]
    assert load(table(folder, "\n".join(lines))) == {"a.png": captions}


def test_long_right_to_left_and_emoji_captions_arrive_whole(folder):
    captions = ["word " * 1999 + "end", "كلب يجري على الشاطئ", "כלב רץ", "👩‍👩‍👧‍👦 a family 🐕", "a\u2028b\x85c"]
    (folder / "a.txt").write_text("\n".join(captions), encoding="utf-8")
    lines = "".join(json.dumps({"image": "a.png", "caption": c}, ensure_ascii=False) + "\n" for c in captions)
    for name in ("b", "c"):
        (folder / f"{name}.txt").write_text("another")
    assert load(folder)["a.png"] == captions
    assert load(table(folder, lines, "captions.jsonl")) == {"a.png": captions}
    tokenizer = dualenc.train_tokenizer(captions, 500, max_length=16)
    with pytest.warns(UserWarning, match="cut to 16 tokens"):
        inputs = dualenc.Processor(None, tokenizer)(text=captions)
    assert inputs["input_ids"].shape == (5, 16) and inputs["attention_mask"].sum(1).min() > 2


def test_equal_rows_count_once_and_spellings_of_a_path_are_one_picture(folder):
    text = "image,caption\na.png,a dog\n./a.png,a dog\nb.png,a dog\na.png,a cat\na.png, a dog \n"
    assert load(table(folder, text)) == {"a.png": ["a dog", "a cat"], "b.png": ["a dog"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,caption\na.png,a dog\nb.png,\n", "line 3: empty caption for b.png"),
        ("image,caption\na.png,a dog\nb.png,  \n", "line 3: empty caption for b.png"),
        ("image,caption\na.png,a dog\nb.png\n", "line 3: empty caption for b.png"),
        ('image,caption\na.png,"two\nlines"\n,a dog\n', "line 4: no picture named"),
        ('image,caption\na.png,"two\nlines"\nd.png,a dog\n', "line 4: missing picture .*d.png"),
        ("image,words\na.png,a dog\n", "has no caption column: it has image, words; expected one of caption"),
        ("photo,caption\na.png,a dog\n", "has no picture column: it has photo, caption; expected one of image"),
        ("image,caption\na.png,a dog, running\n", "line 2 has 3 cells, but the header names 2 .* separator ','"),
        ('image,caption\na.png,"a dog\nb.png,a cat\n', "line 2: .*must end with one"),
        ('image,caption\na.png,"a" dog\n', "line 2: .*must end with one"),
        ("image,caption\n", "no pairs below"),
        ("", "no pairs below"),
        ("image,caption\na.png,caf\xe9\n".encode("latin-1"), "is not utf-8-sig text after line .*save it as UTF-8"),
        (b"\xff\xfei", "is not utf-16 text"),
        ("image,caption\na.png," + "x" * 200_000, "line 2: field larger than field limit"),
        ("image,caption\n" + "x" * 5000 + ",a dog\n", "line 2: missing picture"),
        ("image,caption\na\0.png,a dog\n", "line 2: (missing picture|line contains NUL)"),
    ],
)
def test_broken_tables_are_refused_by_file_and_line(text, message, folder):
    path = table(folder, text)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"image": "b.png", "caption": null}', "line 2: empty caption for b.png"),
        ('{"image": "b.png", "caption": []}', r"line 2: caption \[\] for b.png"),
        ('{"image": "b.png", "caption": 5}', "line 2: caption 5 for b.png"),
        ('{"image": "b.png", "caption": "half \\ud83d a smile"}', "no text in .*line 2: .*surrogates"),
        ('{"image": "b.png"}', "line 2: empty caption"),
        ('{"image": ["b.png"], "caption": "a dog"}', "line 2: no picture named"),
        ('["b.png", "a dog"]', "line 2 is not a json object"),
        ('{"image": ', "line 2 is not json: "),
        ("[" * 100_000, "line 2 is not json: maximum recursion"),
    ],
)
def test_broken_json_lines_are_refused_by_file_and_line(row, message, folder):
    path = table(folder, '{"image": "a.png", "caption": "a dog"}\n' + row + "\n", "captions.jsonl")
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_column_too_many_without_content_is_no_mistake(folder):
    """As spreadsheets write them."""
    assert load(table(folder, "image,caption,,\na.png,a dog,,\nb.png,a cat,,,\n"))["b.png"] == ["a cat"]


def test_paths_that_climb_out_of_the_folder_need_permission(folder):
    inside = folder / "inside"
    inside.mkdir()
    for climbing in ("../a.png", "x/../../a.png", ".."):
        path = table(inside, f"image,caption\n{climbing},a dog\n")
        with pytest.raises(ValueError, match="line 2: picture .* lies outside .*absolute path, or --allow-outside"):
            load(path)
    path = table(inside, "image,caption\n../a.png,a dog\n")
    assert load(path, allow_outside=True) == {"../a.png": ["a dog"]}
    assert load(table(inside, f"image,caption\n{folder / 'a.png'},a dog\n")) == {"../a.png": ["a dog"]}
    two_halves().save(inside / "..a.png")
    assert load(table(inside, "image,caption\n..a.png,a dog\n")) == {"..a.png": ["a dog"]}
    notes = {"images": [{"id": 1, "file_name": "../a.png"}], "annotations": [{"image_id": 1, "caption": "a dog"}]}
    (inside / "coco.json").write_text(json.dumps(notes))
    with pytest.raises(ValueError, match="annotation None: picture ../a.png lies outside"):
        load(f"coco:{inside / 'coco.json'}")
    (inside / "flickr.txt").write_text("../a.png#0\ta dog\n")
    with pytest.raises(ValueError, match="flickr.txt, line 1: picture ../a.png lies outside"):
        load(f"flickr:{inside / 'flickr.txt'}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"info": {}}, "cannot read .*coco.json: no COCO caption file: it has info; expected images and annotations"),
        ({"images": [{"id": 1}], "annotations": []}, "cannot read .*KeyError"),
        ({"images": 5}, "cannot read .*TypeError"),
        ([], "cannot read .*coco.json: a json object was expected, not list"),
    ],
)
def test_json_that_is_no_coco_file_is_refused(content, message, folder):
    (folder / "coco.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load(f"coco:{folder / 'coco.json'}")
    with pytest.raises(ValueError, match="no caption file"):
        load(f"flickr:{folder / 'missing.txt'}")


@pytest.mark.slow
def test_a_million_rows(tmp_path):
    """200,000 pictures with five captions each: under a minute and under 1.5 GB, torch itself included."""
    (tmp_path / "pictures").mkdir()
    with open(tmp_path / "captions.csv", "w") as file:
        file.write("image,caption\n")
        for i in range(200_000):
            (tmp_path / "pictures" / f"{i}.jpg").touch()
            for j in range(5):
                file.write(
                    f'pictures/{i}.jpg,"caption {j} of picture {i}, with some more words to be as long as most"\n'
                )
    measure = f"""
import resource, time
import dualenc
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
pairs = dualenc.load_pairs({str(tmp_path / "captions.csv")!r}, "train")
seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(pairs), sum(map(len, pairs.captions)), seconds, before / 1024, after / 1024)
"""
    root = Path(dualenc.__file__).parent
    ran = subprocess.run([sys.executable, "-c", measure], capture_output=True, text=True, cwd=root, check=True)
    pictures, captions, seconds, before, after = map(float, ran.stdout.split())
    print(f"a million rows: {seconds:.1f} s, {after - before:.0f} MB on top of {before:.0f} MB")
    assert captions == 5 * pictures > 890_000
    assert seconds < 60 and after < 1500
