"""Claims about the processor: any picture or caption in, the same tensors out, before and after saving."""

import json

import numpy as np
import pytest
import torch
from conftest import CAPTIONS
from PIL import Image

import dualenc


def make_transform(**overrides):
    values = {"resize": 24, "crop": (20, 20), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), **overrides}
    return dualenc.ImageTransform(**values)


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 30, 3), dtype=np.uint8))


def test_the_transform_is_resize_crop_and_normalise_as_pillow_does_it(picture):
    """Pillow resizes in its own code; one grey level of rounding is allowed."""
    got = make_transform(interpolation="bilinear")(picture)
    resized = np.asarray(picture.resize((24, 32), Image.Resampling.BILINEAR), dtype=float)
    cropped = resized[6:26, 2:22]
    right = (cropped / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    assert got.shape == (3, 20, 20) and got.dtype == torch.float32
    assert (got - torch.tensor(right).permute(2, 0, 1)).abs().max() < 1.01 / 255 / 0.2


def test_every_form_of_a_picture_gives_the_same_pixels(picture):
    array = np.asarray(picture)
    forms = {
        "PIL": picture,
        "uint8 HWC": array,
        "uint8 CHW": array.transpose(2, 0, 1),
        "tensor CHW": torch.tensor(array).permute(2, 0, 1),
        "tensor HWC": torch.tensor(array),
    }
    floats = {
        "float 0 to 1": array.astype(np.float32) / 255,
        "float 0 to 255": array.astype(np.float64),
        "float tensor CHW": torch.tensor(array).permute(2, 0, 1) / 255,
    }
    transform = make_transform(interpolation="bilinear")  # bicubic overshoots, which uint8 cuts off and floats keep
    right = transform(picture)
    for name, form in forms.items():
        assert torch.equal(transform(form), right), name
    for name, form in floats.items():  # resized without rounding to a whole grey level
        assert (transform(form) - right).abs().max() < 1.01 / 255 / 0.2, name


def test_batches_and_mixed_sizes_are_stacked(picture, tokenizer):
    processor = dualenc.Processor(make_transform(), tokenizer)
    one = processor(images=picture)["pixel_values"]
    assert one.shape == (1, 3, 20, 20)
    mixed = processor(images=[picture, np.zeros((50, 25), np.uint8), torch.zeros(3, 21, 60)])["pixel_values"]
    assert mixed.shape == (3, 3, 20, 20) and torch.equal(mixed[0], one[0])
    stacked = processor(images=np.stack([np.asarray(picture)] * 2))["pixel_values"]
    assert torch.equal(stacked, torch.cat([one, one]))


def test_gray_alpha_palette_and_16_bit_pictures_look_as_a_person_sees_them():
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    half = Image.new("RGBA", (4, 5), (255, 0, 0, 128))
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    palette = red.convert("P")
    gray16 = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    right = {
        "gray": (Image.new("L", (4, 4), 100), (100, 100, 100)),
        "half transparent on white": (half, (255, 127, 127)),
        "fully transparent is white": (clear, (255, 255, 255)),
        "palette": (palette, (255, 0, 0)),
        "16 bits": (gray16, (156, 156, 156)),
        "CMYK": (red.convert("CMYK"), (255, 0, 0)),
        "array with alpha": (np.asarray(half), (255, 127, 127)),
        "gray array": (np.full((5, 5, 1), 9, np.uint8), (9, 9, 9)),
        "bilevel": (Image.new("1", (4, 4), 1), (255, 255, 255)),
    }
    for name, (picture, colour) in right.items():
        image = dualenc.to_pixels(picture)
        assert image.shape[0] == 3 and image.dtype == torch.uint8, name
        assert (image.flatten(1).T - torch.tensor(colour)).abs().max() <= 1, name
    assert dualenc.to_pixels(red, channels=1).shape == (1, 4, 4)
    assert dualenc.to_pixels(np.asarray(red), channels=1).flatten()[0] == 76  # 0.299 * 255


def test_files_are_turned_upright(tmp_path):
    picture = Image.new("RGB", (20, 10), "white")
    picture.paste("red", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    picture.save(tmp_path / "turned.png", exif=exif)
    upright = dualenc.open_picture(tmp_path / "turned.png")
    assert upright.size == (10, 20) and upright.getpixel((5, 2)) == (255, 0, 0)


def test_odd_crop_margins_cut_the_larger_part_off_the_end():
    image = torch.arange(7).expand(1, 7, 7)
    assert dualenc.centre_crop(image, (7, 4))[0, 0].tolist() == [1, 2, 3, 4]
    assert dualenc.centre_crop(image.mT, (4, 7))[0, :, 0].tolist() == [1, 2, 3, 4]


def test_crops_larger_than_the_picture_are_filled_with_black():
    image = torch.ones(1, 2, 3)
    assert dualenc.centre_crop(image, (2, 6))[0].tolist() == [[0, 1, 1, 1, 0, 0]] * 2
    assert dualenc.centre_crop(image, (5, 3))[0, :, 0].tolist() == [0, 1, 1, 0, 0]


def test_proportions_are_kept_or_ignored_as_asked(picture):
    assert make_transform(crop=None).resize_and_crop(dualenc.to_pixels(picture)).shape == (3, 32, 24)
    assert make_transform(crop=None, resize=(11, 13)).resize_and_crop(dualenc.to_pixels(picture)).shape == (3, 11, 13)
    wide = torch.zeros(3, 30, 40, dtype=torch.uint8)
    assert make_transform(crop=None).resize_and_crop(wide).shape == (3, 24, 32)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("cat.jpg", "a PIL image, a numpy array or a tensor, not str"),
        (np.zeros((5, 6, 2), np.uint8), r"shape \(5, 6, 2\), expected"),
        (np.zeros((2, 3, 4, 5), np.uint8), r"shape \(2, 3, 4, 5\), expected"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\), expected"),
        (np.zeros((4, 4, 3), np.int64), "values are torch.int64, expected uint8 or a float"),
    ],
)
def test_what_is_no_picture_is_refused(picture, message):
    with pytest.raises(ValueError, match=message):
        dualenc.to_pixels(picture)


def test_unreadable_picture_files_are_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    for name in ("broken.jpg", "missing.jpg"):
        with pytest.raises(ValueError, match=f"cannot read picture .*{name}"):
            dualenc.open_picture(tmp_path / name)


# ---- Captions -------------------------------------------------------------------------------------------------------


def test_captions_are_padded_to_the_longest_of_the_batch(tokenizer):
    processor = dualenc.Processor(make_transform(), tokenizer)
    inputs = processor(text=["two dogs", "the quick brown fox jumps"])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert set(inputs) == {"input_ids", "attention_mask"} and ids.dtype == mask.dtype == torch.int64
    assert ids.shape == mask.shape and mask.sum(1).max() == mask.shape[1]
    pad, cls, sep = (tokenizer.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]"))
    for row, real in zip(ids, mask.bool()):
        assert (row[~real] == pad).all() and row[0] == cls and row[real][-1] == sep
    assert processor(text="two dogs")["input_ids"].shape[0] == 1


def test_long_captions_are_cut_and_counted_once(tokenizer):
    processor = dualenc.Processor(make_transform(), tokenizer)
    with pytest.warns(UserWarning, match="1 of 2 captions were cut to 32 tokens"):
        inputs = processor(text=["two dogs", "dogs " * 50])
    assert inputs["input_ids"].shape == (2, 32) and inputs["input_ids"][1, -1] == tokenizer.token_to_id("[SEP]")
    processor(text="dogs " * 50)  # a second warning would be an error here
    assert processor(text=["a dog left of a dog"], max_length=4)["input_ids"].shape == (1, 4)
    assert processor(text=["dogs " * 50], max_length=100)["input_ids"].shape == (1, 32), "the tower's limit holds"


def test_captions_come_back_from_their_ids(tokenizer):
    processor = dualenc.Processor(make_transform(), tokenizer)
    ids = processor(text=list(CAPTIONS))["input_ids"]
    assert processor.batch_decode(ids) == [*CAPTIONS[:3], "a photo of a cafe"]
    assert processor.decode(ids[1]) == processor.decode(ids[1].tolist()) == "two dogs"


def test_the_trained_vocabulary_is_small_reproducible_and_covers_its_captions():
    captions = [f"a {colour} {shape}" for colour in dualenc.COLOURS for shape in dualenc.SHAPES]
    one, *others = (dualenc.train_tokenizer(captions, 100) for _ in range(4))
    assert all(one.to_str() == other.to_str() for other in others) and one.get_vocab_size() <= 100
    unknown = one.token_to_id("[UNK]")
    assert all(unknown not in one.encode(caption).ids for caption in captions)
    assert unknown in one.encode("日本").ids
    assert dualenc.Processor(None, one)(text="a " * 300)["input_ids"].shape[1] == 302, "no limit unless given"
    with pytest.raises(ValueError, match="no captions"):
        dualenc.train_tokenizer([], 100)


def test_the_processor_refuses_what_it_cannot_use(tokenizer):
    processor = dualenc.Processor(make_transform(), tokenizer)
    for nothing in ({}, {"text": []}, {"images": []}, {"text": [], "images": [Image.new("RGB", (2, 2))]}):
        with pytest.raises(ValueError, match="nothing to process"):
            processor(**nothing)
    for limit in (0, 1):
        with pytest.raises(ValueError, match=f"captions of at most {limit} tokens, but the special ones alone are 2"):
            processor(text="two dogs", max_length=limit)
    with pytest.raises(ValueError, match=r"caption 1 is nan \(float\), expected a string"):
        processor(text=["two dogs", float("nan")])
    tokenizer.no_padding()
    with pytest.raises(ValueError, match="no padding: call tokenizer.enable_padding"):
        dualenc.Processor(make_transform(), tokenizer)


# ---- Saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [make_transform(), make_transform(resize=(20, 20), crop=None)])
def test_a_processor_is_rebuilt_from_its_folder_alone(tmp_path, tokenizer, picture, transform):
    processor = dualenc.Processor(transform, tokenizer)
    processor(text="two dogs", max_length=3)  # a limit for one call must not be saved
    processor.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "elsewhere")
    again = dualenc.Processor.from_pretrained(tmp_path / "elsewhere")
    assert again.image_transform == transform and again.max_length == 32
    before, after = (p(text=list(CAPTIONS), images=picture) for p in (processor, again))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_preprocessor_config_uses_the_published_words(tmp_path, tokenizer):
    dualenc.Processor(make_transform(interpolation="bicubic"), tokenizer).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert written["size"] == {"shortest_edge": 24} and written["crop_size"] == {"height": 20, "width": 20}
    assert written["resample"] == Image.Resampling.BICUBIC and written["image_mean"] == [0.5, 0.4, 0.3]
    for word, number in dualenc.INTERPOLATIONS.items():
        assert number == Image.Resampling[word.upper()]
        assert make_transform(interpolation=word)(Image.new("RGB", (50, 50))).shape == (3, 20, 20)
    with pytest.raises(ValueError, match="unknown resample 1; expected 0, 2, 3"):
        dualenc.ImageTransform.from_dict({**written, "resample": Image.Resampling.LANCZOS.value})


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    dualenc.Processor(make_transform(), None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer in .* tokenizer.json, .*; it holds .*preprocessor_config.json"):
        dualenc.Processor.from_pretrained(tmp_path)


def test_characters_inside_words_are_named_before_learning_in_a_fixed_order():
    """Found word by word, which is quick; the same set as found caption by caption, odd characters included."""
    captions = ["don't\tstop", "a\x1cb naïve  piñata", "東京 tower", "U.S.A. x\u0301y", "x\u00a0yz"]
    tokenizer = dualenc.train_tokenizer(captions, 300)
    words = [
        word
        for caption in captions
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(caption))
    ]
    inner = sorted({"##" + character for word in words for character in word[1:]})
    assert [tokenizer.id_to_token(5 + i) for i in range(len(inner))] == inner and "##b" in inner


def test_a_tower_shortens_the_limit_of_a_processor_but_never_lengthens_it(tmp_path, make_model, tokenizer):
    """A limit of 8 tokens stays under a tower of 32 positions; one of 999, read from a file, becomes 32."""
    for own, expected in ((8, 8), (999, 32), (None, 32)):
        processor = dualenc.Processor(None, dualenc.train_tokenizer(["two dogs"], 100, own or 5))
        processor.max_length = own
        processor.limit_length(32)
        assert processor.max_length == expected
    model = make_model()
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["truncation"]["max_length"] = 999
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert dualenc.DualEncoder.from_pretrained(tmp_path).processor.max_length == model.text_model.max_tokens


def test_a_token_id_just_beyond_the_table_is_refused(tokenizer):
    largest = max(tokenizer.get_vocab().values())
    dualenc.check_token_ids(tokenizer, largest + 1, "here")
    with pytest.raises(ValueError, match=f"here has token id {largest}, but .* table ends at {largest - 1}"):
        dualenc.check_token_ids(tokenizer, largest, "here")


def test_a_limit_for_one_call_is_not_saved_where_the_processor_has_none(tmp_path):
    processor = dualenc.Processor(None, dualenc.train_tokenizer(["one two three four"], 100))
    assert processor(text="one two three four", max_length=3)["input_ids"].shape == (1, 3)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] is None
    assert processor(text="one two three four")["input_ids"].shape == (1, 6)


@pytest.mark.parametrize(
    "given, missing", [({"text": "a"}, "tokenizer"), ({"images": Image.new("RGB", (2, 2))}, "image_transform")]
)
def test_a_processor_says_which_half_it_lacks(given, missing):
    with pytest.raises(ValueError, match=f"no {missing}"):
        dualenc.Processor(None, None)(**given)
    with pytest.raises(ValueError, match="no tokenizer"):
        dualenc.Processor(None, None).decode([1, 2])


@pytest.mark.parametrize("missing", ["tokenizer", "image_transform"])
def test_a_model_with_half_a_processor_is_refused_before_anything_is_written(missing, make_model, tmp_path):
    """It could not be loaded again."""
    model = make_model()
    setattr(model.processor, missing, None)
    with pytest.raises(ValueError, match=f"no {missing}"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
