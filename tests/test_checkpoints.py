"""Saving and loading: the folder alone brings back the same model, to the bit, or says why not."""

import functools
import json
import os
import resource
import shutil
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from support import CAPTIONS, TINY_VIT

import dualenc


def embeds(model, images):
    with torch.no_grad():
        output = model(**model.processor(text=list(CAPTIONS), images=images))
    return output.image_embeds, output.text_embeds, output.logits_per_image


def load(folder):
    return dualenc.DualEncoder.from_pretrained(folder)


def edit(folder, name="config.json", **changes):
    """Set entries of a json file; text__width is the entry width of the object text."""
    values = json.loads((folder / name).read_text())
    for key, value in changes.items():
        *outer, last = key.split("__")
        functools.reduce(dict.get, outer, values)[last] = value
    (folder / name).write_text(json.dumps(values))


@pytest.fixture
def saved(make_model, tmp_path):
    """(a checkpoint folder of a tiny model, the model)"""
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that puts a folder into a made-up hub cache; there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(folder, hub_id, revision="main"):
        repository = tmp_path / "hub" / f"models--{hub_id.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(f"commit of {revision}")
        shutil.copytree(folder, repository / "snapshots" / f"commit of {revision}")

    return put


# ---- Round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("vision", ["vit_tiny_patch16_224", "test_resnet"])
def test_a_copied_folder_gives_bit_equal_embeddings(tmp_path, make_model, images, vision):
    model = make_model(vision, text_pooling="pooler", logit_bias_init=-3.0)
    with torch.no_grad():
        model.logit_scale.fill_(1.234)
        model.train()(**model.processor(text=list(CAPTIONS), images=images))  # batch norm's state
    model.eval().save_pretrained(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "elsewhere")
    again = load(tmp_path / "elsewhere")
    assert not again.training and again.config == model.config
    assert again.processor.image_transform == model.processor.image_transform
    for before, after in zip(embeds(model, images), embeds(again, images)):
        assert torch.equal(before, after)
    assert again.logit_scale.item() == model.logit_scale.item() and again.logit_bias.item() == -3.0
    expected = {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"}
    assert {*os.listdir(tmp_path / "elsewhere")} == expected


# Models with tables that are computed when they are built, and stand in no file.
SWIN = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1), "window_size": 4}
COMPUTED = {
    "beit_base_patch16_224": {**TINY_VIT, "use_rel_pos_bias": True},
    "eva02_tiny_patch14_224": TINY_VIT,
    "swin_tiny_patch4_window7_224": SWIN,
    "vit_base_patch16_rope_224": TINY_VIT,
}


@pytest.mark.parametrize("name", COMPUTED)
def test_tables_that_are_in_no_file_are_computed_again(name, make_model, tmp_path):
    model = make_model(name, vision_args=COMPUTED[name])
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(load(tmp_path).encode_image(pixels), model.encode_image(pixels))


@pytest.mark.parametrize("half", [True, False])
def test_weights_are_float32_and_the_file_may_change_afterwards(half, saved):
    folder, model = saved
    (model.half() if half else model.to(memory_format=torch.channels_last)).save_pretrained(folder)
    again, path = load(folder), folder / "model.safetensors"
    with open(path, "r+b") as file:  # in place: a mapped file would change the weights
        file.write(b"0" * path.stat().st_size)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.float()), name


def test_a_model_without_a_processor_is_saved_and_loaded_without_one(saved, tmp_path):
    _, model = saved
    model.processor = None
    model.save_pretrained(tmp_path / "bare")
    assert load(tmp_path / "bare").processor is None
    model.processor = dualenc.Processor(model.vision_model.image_transform(), None)
    with pytest.raises(ValueError, match="the processor lacks its tokenizer"):
        model.save_pretrained(tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_a_run_folder_stands_for_its_best_checkpoint(saved, tmp_path):
    folder, model = saved
    (tmp_path / "train_config.json").write_text("{}")
    with pytest.raises(ValueError, match="the run in .* has not saved a checkpoint yet"):
        load(tmp_path)
    for name in ("last.old", "last", "best.old", "best"):  # the later counts more
        shutil.copytree(folder, tmp_path / name)
        assert dualenc.find_folder(tmp_path) == tmp_path / name
    assert torch.equal(load(tmp_path).text_projection.weight, model.text_projection.weight)
    assert dualenc.find_folder(tmp_path / "last") == tmp_path / "last"


# ---- Towers and the hub --------------------------------------------------------------------------


def test_hub_ids_are_found_in_the_local_cache_and_missing_ones_explained(saved, hub, make_model):
    """An id without an owner, and one with a revision, which is another model."""
    folder, model = saved
    other = make_model(seed=1)
    other.save_pretrained(folder.parent / "other")
    hub(folder, "towers")
    hub(folder.parent / "other", "someone/towers", "v1")
    for name, right in (("towers", model), ("someone/towers@v1", other)):
        assert torch.equal(load(name).text_projection.weight, right.text_projection.weight)
    with pytest.raises(ValueError, match="no folder nobody/x, nor a reachable hub id: "):
        load("nobody/x")
    with pytest.raises(ValueError, match="no folder .*missing"):
        load("./missing")


def test_only_what_can_be_read_is_downloaded(monkeypatch, tmp_path):
    """Safetensors, else the pickle; no weights of subfolders."""
    wanted, chosen = [], huggingface_hub.utils.filter_repo_objects
    files = ["config.json", "1_Pooling/config.json", "model.safetensors", "vocab.txt"]
    files += ["pytorch_model.bin", "training_args.bin", "tf_model.h5", "onnx/model.safetensors"]

    def download(name, revision=None, **patterns):
        wanted.append((name, revision, list(chosen(files, **patterns))))
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert dualenc.find_folder("owner/name@v1") == tmp_path
    assert wanted[0] == ("owner/name", "v1", files[:4])
    assert wanted[1][2] == ["pytorch_model.bin"], "the folder got no safetensors"


@pytest.fixture
def timm_folder(tmp_path):
    """(a timm model's folder, for images of 48 pixels, the model)"""
    args = {**TINY_VIT, "img_size": 48, "global_pool": "avg"}
    trunk = timm.create_model("vit_tiny_patch16_224", num_classes=0, **args)
    del args["img_size"]  # pretrained_cfg says it too, and older folders say it only there
    record = {"architecture": "vit_tiny_patch16_224", "model_args": args, "num_classes": 0}
    mean = {"mean": [0.1, 0.2, 0.3], "std": [0.2, 0.2, 0.2]}
    record["pretrained_cfg"] = {"input_size": [3, 48, 48], "fixed_input_size": True, **mean}
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "config.json").write_text(json.dumps(record))
    safetensors.torch.save_file(trunk.state_dict(), tmp_path / "timm" / "model.safetensors")
    return tmp_path / "timm", trunk


@pytest.mark.parametrize("vision", ["folder", "hf-hub:someone/vit", "someone/vit"])
def test_a_timm_folder_is_a_tower_saved_by_architecture(vision, timm_folder, hub, tmp_path):
    folder, trunk = timm_folder
    hub(folder, "someone/vit")
    hub(Path(__file__).parent / "fixtures" / "tower" / "distilbert", "someone/bert")
    place = str(folder) if vision == "folder" else vision
    if vision == "folder":  # as timm writes it since 1.0.31: with channels and both sides
        timm.models.save_for_hf(trunk, folder, {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}})
    model = dualenc.DualEncoder.from_vision_text_pretrained(place, "someone/bert").eval()
    tower, pixels = model.vision_model, torch.randn(2, 3, 48, 48)
    assert tower.weights_from == place and model.text_model.weights_from == "someone/bert"
    assert torch.equal(tower(pixels).pooler_output, trunk.eval()(pixels))
    assert tower.image_transform().mean == (0.1, 0.2, 0.3)
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "hub")
    assert torch.equal(load(tmp_path / "saved").encode_image(pixels), model.encode_image(pixels))


def test_what_of_a_tower_is_pretrained_is_noted(timm_folder):
    """A folder is always read; a name, also of the hub, only if asked."""
    folder, build = timm_folder[0], dualenc.build_vision_tower
    assert build(str(folder), False, {"image_size": 32}).weights_from == str(folder)
    for name in ("test_resnet", f"hf-hub:{folder}"):
        assert build(name, False, {}).weights_from is None


def test_overrides_reach_the_configuration_they_name():
    build = functools.partial(dualenc.DualEncoder.from_vision_text_pretrained, "test_resnet")
    sizes = {"vision_image_size": 48, "text_width": 16, "text_heads": 2, "logit_scale_init": 1.0}
    model = build("scratch", 8, False, **sizes)
    config = model.config
    assert (config.projection_dim, config.vision.image_size, config.text.width) == (8, 48, 16)
    assert model.logit_scale.item() == 1.0 and model.text_projection.weight.shape == (8, 16)
    with pytest.raises(ValueError, match="unknown field of VisionConfig 'imagesize'.*image_size"):
        build("scratch", pretrained=False, vision_imagesize=1)
    with pytest.raises(ValueError, match="unknown field of DualEncoderConfig 'projection'"):
        build("scratch", pretrained=False, projection=1)


# ---- Refusals ------------------------------------------------------------------------------------


def test_weights_that_do_not_fit_are_listed(saved):
    folder, model = saved
    weights = {**model.state_dict(), "stranger": torch.zeros(1)}
    del weights["logit_scale"]
    weights["text_projection.weight"] = torch.zeros(2, 3)
    weights["visual_projection.weight"] = weights["visual_projection.weight"].int()
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="weights do not fit the config.json of ") as caught:
        load(folder)
    for part in ("logit_scale", "stranger", "text_projection.weight", "visual_projection.weight"):
        assert part in str(caught.value)


IMAGES, TOKENS = "preprocessor_config.json", "tokenizer.json"


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("config.json", {"text__vocab_size": 10**10}, "do not fit"),
        ("config.json", {"vision__args__embed_dim": 90_000}, "do not fit"),
        ("config.json", {"vision__name": "vit", "vision__image_size": None}, "'vit' is a family"),
        ("config.json", {"text__colour": 5}, "unknown field of TextConfig 'colour'"),
        ("config.json", {"vision__args__colour": 5}, "cannot build.*colour"),
        ("config.json", {"model_type": "gpt9"}, "unknown model_type .* 'gpt9'; expected dualenc"),
        (IMAGES, {"size": "5"}, "cannot read the image processor of"),
        (TOKENS, {"padding": None}, "no padding"),
        (TOKENS, {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, "PanicExc"),
        (TOKENS, {"padding__pad_id": 999}, "tokenizer of .*: id 999 is beyond the text tower"),
        (TOKENS, {"model__vocab__a": 99999}, "tokenizer of .*: id 99999 is beyond the text tow"),
    ],
)
def test_files_that_lie_are_refused_before_memory_is_taken(name, changes, reason, saved):
    folder, _ = saved
    edit(folder, name, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=reason) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kilobytes


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"[" * 100_000, "cut"])
@pytest.mark.parametrize("name", ["config.json", IMAGES, TOKENS, "model.safetensors"])
def test_broken_files_are_refused_by_name(name, content, saved):
    path = saved[0] / name
    path.write_bytes(path.read_bytes()[:-1] if content == "cut" else content)
    with pytest.raises(ValueError, match=f"cannot read .*{name}"):
        load(saved[0])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_is_not_opened(name, saved, tmp_path):
    """Neither code in a .bin runs, nor in what is called .safetensors."""

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    folder, _ = saved
    (folder / "model.safetensors").unlink()
    torch.save(Bomb(), folder / name)
    with pytest.raises(ValueError, match=f"cannot read weights.*{name}"):
        load(folder)
    assert not (tmp_path / "ran").exists()


# ---- One atomic write ----------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    """On disk before it takes the old one's name."""
    path, happened, fsync, replace = tmp_path / "file", [], os.fsync, os.replace
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", lambda fd: (happened.append("on disk"), fsync(fd)))
        patched.setattr("os.replace", lambda a, b: (happened.append("renamed"), replace(a, b)))
        dualenc.write_file(path, "old")
    assert happened == ["on disk", "renamed"]

    full = Mock(side_effect=OSError(28, "No space left on device"))
    with monkeypatch.context() as patched, pytest.raises(ValueError, match=f"write {path}: .*No"):
        patched.setattr("os.fsync", full)
        dualenc.write_file(path, b"new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    with pytest.raises(ValueError, match="cannot write .*missing"):
        dualenc.write_file(tmp_path / "missing" / "file", "new")
