"""Any image or caption gives the tensors a person would expect, before and after saving."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from support import CAPTIONS

import dualenc

RED, BLUE, WHITE = (200, 40, 40), (40, 40, 200), (255, 255, 255)  # most images: left red, then blue


def make_transform(**overrides):
    values = {"resize": 24, "crop": 20, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    return dualenc.ImageTransform(**{**values, **overrides})


@pytest.fixture
def image():
    values = np.random.default_rng(1).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(autouse=True)
def no_notices_yet():
    dualenc.notice.cache_clear()


def two_halves(mode="RGB", left=RED, right=BLUE, size=(40, 20)):
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def assert_looks(image, left, right, tolerance=12):
    values = np.asarray(image.convert("RGB")).astype(float)
    middle = values.shape[1] // 2
    for half, expected in ((values[:, :middle], left), (values[:, middle:], right)):
        assert half.mean((0, 1)) == pytest.approx(expected, abs=tolerance)


# ---- The transform


def test_the_transform_is_pillows_resize_crop_and_normalise(image):
    """Pillow resizes in its own code; one gray level of rounding is allowed."""
    got = make_transform(interpolation="bilinear")(image)
    resized = np.asarray(image.resize((24, 32), Image.Resampling.BILINEAR), dtype=float)
    right = (resized[6:26, 2:22] / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    assert got.shape == (3, 20, 20) and got.dtype == torch.float32
    assert (got - torch.tensor(right).permute(2, 0, 1)).abs().max() < 1.01 / 255 / 0.2


def test_every_form_of_an_image_gives_the_same_pixels(image):
    array, transform = np.asarray(image), make_transform()
    one = transform(image)
    assert torch.equal(transform(array), one)
    assert torch.equal(transform(torch.tensor(array).permute(2, 0, 1)), one)
    processor = dualenc.Processor(transform, None)
    assert torch.equal(processor(images=image)["pixel_values"], one[None])
    mixed = processor(images=[image, np.zeros((50, 25), np.uint8)])["pixel_values"]
    assert mixed.shape == (2, 3, 20, 20) and torch.equal(mixed[0], one)


def test_odd_margins_of_crops_and_borders_are_at_the_end():
    def crop(image, side):
        return make_transform(resize=None, crop=side).resize_and_crop(image)[0].tolist()

    image = torch.arange(7).expand(1, 7, 7)
    assert crop(image, 4) == [[1, 2, 3, 4]] * 4
    image = torch.ones(1, 2, 3)
    assert crop(image, 6)[2:4] == [[0, 1, 1, 1, 0, 0]] * 2
    assert [row[1] for row in crop(image, 5)] == [0, 1, 1, 0, 0]
    assert crop(torch.arange(7).expand(1, 2, 7), 4)[1:] == [[1, 2, 3, 4]] * 2 + [[0] * 4]


@pytest.mark.parametrize(
    ("squash", "size", "expected"),
    [(False, (40, 30), (32, 24)), (False, (31, 50), (24, 38)), (True, (40, 30), (24, 24))],
)
def test_proportions_are_kept_or_ignored_as_asked(squash, size, expected):
    pixels = torch.zeros(3, *size, dtype=torch.uint8)
    assert make_transform(crop=None, squash=squash).resize_and_crop(pixels).shape == (3, *expected)


@pytest.mark.parametrize(
    ("message", "function", "given"),
    [
        ("image is a str of no dtype, expected a PIL image", dualenc.to_pixels, {"image": "a.jpg"}),
        ("ndarray of float64, .* uint8", dualenc.to_pixels, {"image": np.ones((4, 4))}),
        ("floats", dualenc.to_pixels, {"image": Image.new("F", (4, 4))}),
        ("image side is 0, expected at least 1", make_transform, {"resize": 0}),
        ("expected three of each", make_transform, {"std": (1.0, 0.0, 1.0)}),
        ("unknown interpolation 'cubic'; .*bicubic", make_transform, {"interpolation": "cubic"}),
        ("no tokenizer: make", dualenc.Processor(make_transform(), None), {"text": "x"}),
        ("no image_transform: make", dualenc.Processor(None, None), {"images": np.ones((4, 4))}),
    ],
)
def test_mistakes_are_refused(message, function, given):
    with pytest.raises(ValueError, match=message):
        function(**given)


def test_what_cannot_be_processed_is_refused(tokenizer):
    processor = dualenc.Processor(make_transform(), tokenizer)
    for given in ({}, {"text": [], "images": []}):
        with pytest.raises(ValueError, match="nothing to process: give text, images or both"):
            processor(**given)
    with pytest.raises(ValueError, match="max_length is 1, expected at least 2"):
        processor(text="two dogs", max_length=1)
    tokenizer.no_padding()
    with pytest.raises(ValueError, match="no padding: call tokenizer.enable_padding"):
        dualenc.Processor(None, tokenizer)


# ---- Image files as found


def gray(values):
    def save(path):
        Image.fromarray(np.repeat(values, 20)[None].repeat(20, 0)).save(path)

    return save


def palette(path):
    image = two_halves("P", 0, 1)
    image.putpalette([*RED, *BLUE])
    image.save(path, transparency=1)


def animation(path):
    other = two_halves(left=BLUE, right=RED)
    two_halves().save(path, save_all=True, append_images=[other, other])


FOUND = {
    "CMYK: a.jpg": (lambda p: two_halves().convert("CMYK").save(p, quality=95), RED, BLUE),
    "gray: a.png": (two_halves("L", 60, 180).save, (60,) * 3, (180,) * 3),
    "16-bit: a.png": (gray(np.uint16([12_800, 51_200])), (50,) * 3, (200,) * 3),
    "32-bit: a.tif": (gray(np.int32([50 * 257, 200 * 257])), (50,) * 3, (200,) * 3),
    "32-bit, wide: a.tif": (gray(np.int32([-5, 70_000])), (0,) * 3, (255,) * 3),
    "palette: a.png": (palette, RED, WHITE),
    "clear: a.png": (two_halves("RGBA", (*RED, 255), (*BLUE, 0)).save, RED, WHITE),
    "clear gray: a.png": (two_halves("LA", (60, 255), (180, 0)).save, (60,) * 3, WHITE),
    "PA: a.tif": (two_halves("RGBA", (*RED, 255), (*BLUE, 0)).convert("PA").save, RED, WHITE),
    "half clear: a.png": (two_halves("RGBA", (255, 0, 0, 128), WHITE).save, (255, 127, 127), WHITE),
    "animation: a.gif": (animation, RED, BLUE),
    "PNG: ein Bild é 写真.jpg": (lambda p: two_halves().save(p, format="PNG"), RED, BLUE),
}


@pytest.mark.parametrize("kind", FOUND)
def test_odd_images_look_as_a_person_sees_them(kind, tmp_path):
    save, left, right = FOUND[kind]
    path = tmp_path / kind.partition(": ")[2]
    save(path)
    tolerance = 25 if "animation" in kind else 12 if "CMYK" in kind else 1
    assert_looks(dualenc.open_image(path), left, right, tolerance)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [None, 20, "item of a data set"])
def test_images_are_turned_upright(orientation, size, tmp_path):
    """The camera's note is undone, whether or not the JPEG is decoded smaller."""
    turn = Image.Transpose
    stored = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM}
    stored |= {5: turn.TRANSPOSE, 6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270}
    image = two_halves(size=(160, 80))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = image.transpose(stored[orientation]) if orientation > 1 else image
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    image, path = Image.open(tmp_path / "a.jpg"), tmp_path / "a.jpg"
    upright = dualenc.open_image(([(image, 0)], 0) if isinstance(size, str) else path, size)
    assert upright.size == ((80, 40) if size == 20 else (160, 80))
    assert_looks(upright, RED, BLUE)


def png(image):
    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png(two_halves())[:80], "."),
        (b"<html>not found</html>", "cannot identify"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot identify"),
    ],
)
def test_broken_images_are_named(content, reason, tmp_path):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot read image .*a\.jpg: .*{reason}"):
        dualenc.open_image(tmp_path / "a.jpg")


def test_a_missing_image_is_named(tmp_path):
    for path in (tmp_path, str(tmp_path / "missing.png")):
        with pytest.raises(ValueError, match=f"cannot read image {path}: .*directory"):
            dualenc.open_image(path)


# ---- Captions


def test_captions_are_padded_to_the_longest_of_the_batch(tokenizer):
    inputs = dualenc.Processor(None, tokenizer)(text=["two dogs", "the quick brown fox jumps"])
    assert set(inputs) == {"input_ids", "attention_mask"}
    ids, mask = inputs.values()
    assert ids.shape == mask.shape and mask.sum(1).max() == mask.shape[1] > mask.sum(1).min()
    for row, real in zip(ids, mask.bool()):
        words = [tokenizer.id_to_token(index) for index in row]
        assert words[0] == "<s>" and words[real.sum() - 1] == "</s>"
        assert set(words[real.sum() :]) <= {"<pad>"} and (row[~real] == 0).all()


def test_long_captions_are_cut_and_noted_once(tokenizer, capsys):
    processor = dualenc.Processor(None, tokenizer)
    ids = processor(text=["two dogs", "dogs " * 50])["input_ids"]
    assert ids.shape == (2, 32) and ids[1, -1] == tokenizer.token_to_id("</s>")
    processor(text="dogs " * 50)
    assert capsys.readouterr().out == "note: captions longer than 32 tokens are cut\n"


def test_an_explicit_length_counts_up_to_the_towers_positions(tokenizer):
    long = ("dogs " * 100).strip()

    def lengths(limits, **positions):
        processor = dualenc.Processor(None, tokenizer, **positions)
        return [processor(text=long, max_length=n)["input_ids"].shape[1] for n in limits]

    assert lengths((4, 50, 100), positions=64) == [4, 50, 64]
    tokenizer.enable_truncation(32)
    assert lengths((None,), positions=64) == [32]
    assert lengths((None, 100), positions=16) == [16, 16]
    tokenizer.no_truncation()
    assert lengths((7, None)) == [7, 102]
    tokenizer.no_truncation()
    assert lengths((None,), positions=32) == [32]


WORDS = ("ma mã má", "schon schön", "ano año", "мой мои", "ไม ไม่ ไม้", "दिन दीन", "か が")


@pytest.mark.parametrize("words", WORDS)
def test_marks_that_make_words_are_kept(words):
    words = words.split()
    tokenizer = dualenc.train_tokenizer(words, 400)
    ids = [tokenizer.encode(word).ids for word in words]
    assert len({*map(tuple, ids)}) == len(words)
    processor = dualenc.Processor(None, tokenizer)
    assert processor.batch_decode(ids) == words
    assert processor.decode(torch.tensor(ids[1])) == words[1]
    for one, other in (("\u00e9", "e\u0301"), ("Two Dogs", "two dogs")):
        assert tokenizer.encode(one).ids == tokenizer.encode(other).ids


def test_a_learned_vocabulary_is_as_large_as_asked_and_knows_every_word():
    tokenizer = dualenc.train_tokenizer([*dualenc.COLOURS, *dualenc.SHAPES], 300)
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.decode(tokenizer.encode("日本 zebra").ids) == " 日本 zebra"


# ---- Saving


TRANSFORMS = [make_transform(), make_transform(squash=True, crop=None)]
TRANSFORMS += [make_transform(resize=None, interpolation="bilinear")]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_processor_is_rebuilt_from_its_folder_alone(tmp_path, tokenizer, image, transform):
    processor = dualenc.Processor(transform, tokenizer)
    processor(text="two dogs", max_length=3)  # a limit for one call must not be saved
    processor.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "elsewhere")
    again = dualenc.Processor.from_pretrained(tmp_path / "elsewhere")
    assert again.image_transform == transform and again.max_length == 32
    before, after = (p(text=list(CAPTIONS), images=image) for p in (processor, again))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_folder_with_one_half_gives_that_half(tmp_path, tokenizer):
    dualenc.Processor(make_transform(), None).save_pretrained(tmp_path / "images")
    dualenc.Processor(None, tokenizer).save_pretrained(tmp_path / "text")
    images, text = (dualenc.Processor.from_pretrained(tmp_path / n) for n in ("images", "text"))
    assert images.image_transform == make_transform() and images.tokenizer is None
    assert text.image_transform is None and text.tokenizer.to_str() == tokenizer.to_str()
    (tmp_path / "neither").mkdir()
    with pytest.raises(ValueError, match="has neither a tokenizer nor preprocessor_config.json"):
        dualenc.Processor.from_pretrained(tmp_path / "neither")


def test_preprocessor_config_uses_the_published_words():
    written = json.loads(json.dumps(make_transform().to_dict()))
    assert (written["size"], written["crop_size"]["width"]) == ({"shortest_edge": 24}, 20)
    assert written["image_mean"] == [0.5, 0.4, 0.3] and written["rescale_factor"] == 1 / 255
    assert written["resample"] == 3
    oblong = {"height": 8, "width": 9}
    for name, wrong, message in (
        ("resample", 1, "unknown interpolation 'lanczos'; expected nearest"),
        ("size", oblong, "size is .*, expected a number of pixels or a square"),
        ("crop_size", oblong, "size is .*, expected a number of pixels or a square"),
        ("image_processor_type", "DonutImageProcessor", "unknown image processor 'donut'"),
        ("do_rescale", False, "pixels are multiplied by 1, expected 1 / 255"),
        ("rescale_factor", 1 / 127.5, "pixels are multiplied by 0.0078"),
    ):
        with pytest.raises(ValueError, match=message):
            dualenc.ImageTransform.from_dict({**written, name: wrong})


HALF, CLIP_MEAN = (0.5,) * 3, (0.48145466, 0.4578275, 0.40821073)


@pytest.mark.parametrize(
    ("kind", "written", "resize", "crop", "mean"),
    [
        ("ViTFeatureExtractor", {"size": 96}, (96, True), None, HALF),
        ("ViTImageProcessorFast", {"size": {"height": 8, "width": 8}}, (8, True), None, HALF),
        ("DeiTImageProcessor", {"size": None}, (256, True), 224, HALF),
        ("CLIPFeatureExtractor", {"size": 96, "crop_size": 90}, (96, False), 90, CLIP_MEAN),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 9}}, (9, False), 224, CLIP_MEAN),
        ("BitImageProcessor", {"do_resize": False}, (None, False), 224, CLIP_MEAN),
        ("SiglipImageProcessor", {"do_normalize": False}, (224, True), None, (0.0,) * 3),
        ("BeitImageProcessor", {"do_center_crop": True}, (224, True), 224, HALF),
    ],
)
def test_files_of_every_age_are_read_as_transformers_does(kind, written, resize, crop, mean):
    name = "feature_extractor_type" if "Feature" in kind else "image_processor_type"
    got = dualenc.ImageTransform.from_dict({name: kind, **written})
    assert ((got.resize, got.squash), got.crop) == (resize, crop)
    assert got.mean == pytest.approx(mean)


def test_a_file_without_a_type_is_for_the_model_beside_it(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"size": 96}')
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    got = dualenc.Processor.from_pretrained(tmp_path).image_transform
    assert (got.resize, got.squash, got.interpolation) == (96, True, "bilinear")
    (tmp_path / "config.json").write_text('{"model_type": "swin"}')
    with pytest.raises(ValueError, match="unknown image processor 'swin'"):
        dualenc.Processor.from_pretrained(tmp_path)
