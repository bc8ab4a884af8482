"""Claims about saving and loading: the folder alone brings back the same model, to the bit, or says why not."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from conftest import CAPTIONS

import dualenc


def embeds(model, pictures):
    with torch.no_grad():
        output = model(**model.processor(text=list(CAPTIONS), images=pictures))
    return output.image_embeds, output.text_embeds, output.logits_per_image


@pytest.mark.parametrize("vision", ["vit_tiny_patch16_224", "test_resnet"])
def test_a_copied_folder_gives_bit_equal_embeddings_and_the_same_preprocessing(tmp_path, make_model, pictures, vision):
    model = make_model(vision, text_pooling="pooler", logit_bias_init=-3.0)
    with torch.no_grad():
        model.logit_scale.fill_(1.234)
        model.train()(**model.processor(text=list(CAPTIONS), images=pictures))  # batch-norm statistics move
    model.eval().save_pretrained(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "saved")
    again = dualenc.DualEncoder.from_pretrained(tmp_path / "elsewhere")
    assert not again.training and again.config == model.config
    assert again.processor.image_transform == model.processor.image_transform
    assert all(torch.equal(one, two) for one, two in zip(embeds(model, pictures), embeds(again, pictures)))
    assert again.logit_scale.item() == model.logit_scale.item() and again.logit_bias.item() == -3.0
    names = {path.name for path in (tmp_path / "elsewhere").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"}


def test_a_model_without_a_processor_is_saved_and_loaded_without_one(tmp_path, make_model):
    model = make_model()
    model.processor = None
    model.save_pretrained(tmp_path)
    assert dualenc.DualEncoder.from_pretrained(tmp_path).processor is None


def test_weights_that_do_not_fit_are_listed(tmp_path, make_model):
    """Missing, unexpected and misshapen names, at most five of each, and nothing is loaded halfway."""
    make_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    del weights["logit_scale"]
    weights["extra"] = torch.zeros(1)
    weights["text_projection.weight"] = torch.zeros(2, 3)
    safetensors.torch.save_file(weights, path)
    shapes = r"text_projection.weight \(2, 3\), expected \(16, 32\)"
    message = f"1 missing: logit_scale; 1 unexpected: extra; 1 misshapen: {shapes}"
    with pytest.raises(ValueError, match=message):
        dualenc.DualEncoder.from_pretrained(tmp_path)
    safetensors.torch.save_file({}, path)
    with pytest.raises(ValueError, match=r"\d\d missing: logit_scale(, [\w.]+){4}$"):
        dualenc.DualEncoder.from_pretrained(tmp_path)


def test_a_checkpoint_of_other_sizes_is_refused(tmp_path, make_model):
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text"]["width"] = config["text"]["embedding_width"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"misshapen: text_model[\w.]+ \(\d+, 32\), expected \(\d+, 64\)"):
        dualenc.DualEncoder.from_pretrained(tmp_path)


def test_broken_folders_are_refused(tmp_path, make_model):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="cannot read weights .*model.safetensors"):
        dualenc.DualEncoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="model_type 'gpt2', expected 'dualenc'"):
        dualenc.DualEncoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read .*config.json"):
        dualenc.DualEncoder.from_pretrained(tmp_path)
    for place in (tmp_path / "missing", "./missing"):
        with pytest.raises(ValueError, match="no folder .*missing"):
            dualenc.DualEncoder.from_pretrained(place)


def test_hub_ids_are_found_in_the_local_cache_and_missing_ones_explained(tmp_path, make_model, pictures, monkeypatch):
    """A made-up cache, no network: what huggingface_hub would have downloaded is read from where it keeps it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--someone--towers", "0" * 40
    model = make_model()
    model.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    again = dualenc.DualEncoder.from_pretrained("someone/towers")
    assert torch.equal(embeds(again, pictures)[0], embeds(model, pictures)[0])
    with pytest.raises(ValueError, match="someone/else is neither a folder nor a hub id within reach"):
        dualenc.DualEncoder.from_pretrained("someone/else")


def test_timm_weights_from_the_hub_cache_are_saved_under_their_architecture(tmp_path, monkeypatch):
    """vision="hf-hub:...": the saved folder rebuilds the tower without the hub."""
    import timm
    from conftest import TINY_TEXT, TINY_VIT

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository, commit = tmp_path / "cache" / "models--someone--vit", "0" * 40
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    trunk = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **TINY_VIT)
    record = {"architecture": "vit_tiny_patch16_224", "model_args": TINY_VIT, "num_classes": 0}
    record["pretrained_cfg"] = {"input_size": [3, 32, 32], "fixed_input_size": True, "mean": [0.1, 0.2, 0.3]}
    (folder / "config.json").write_text(json.dumps(record))
    safetensors.torch.save_file(trunk.state_dict(), folder / "model.safetensors")

    arguments = {**TINY_TEXT, "text_vocab_size": 50, "vision_image_size": 32}
    model = dualenc.DualEncoder.from_vision_text_pretrained("hf-hub:someone/vit", "scratch", **arguments)
    assert torch.equal(model.vision_model.trunk.pos_embed, trunk.pos_embed)
    assert model.vision_model.image_transform().mean == (0.1, 0.2, 0.3)
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "cache")
    again = dualenc.DualEncoder.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.vision_model.trunk.pos_embed, trunk.pos_embed)


def test_overrides_reach_the_configuration_they_name():
    model = dualenc.DualEncoder.from_vision_text_pretrained(
        "test_resnet", "scratch", 8, False, vision_image_size=48, text_width=16, text_heads=2, logit_scale_init=1.0
    )
    config = model.config
    assert (config.projection_dim, config.vision.image_size, config.text.width) == (8, 48, 16)
    assert model.logit_scale.item() == 1.0 and model.text_projection.weight.shape == (8, 16)
    for name, message in (
        ("vision_imagesize", "unknown field of VisionConfig 'imagesize'.*did you mean image_size"),
        ("text_with", "unknown field of TextConfig 'with'"),
        ("projection", "unknown field of DualEncoderConfig 'projection'.*did you mean projection_dim"),
    ):
        with pytest.raises(ValueError, match=message):
            dualenc.DualEncoder.from_vision_text_pretrained("test_resnet", "scratch", pretrained=False, **{name: 1})
    with pytest.raises(ValueError, match="no folder no such tower"):
        dualenc.DualEncoder.from_vision_text_pretrained("test_resnet", "no such tower", pretrained=False)


def test_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    dualenc.write_file(path, "old")
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        dualenc.write_file(path, "new")
    assert path.read_text() == "old"
