"""Checkpoints of transformers, read and written without it: its own numbers stand in tests/fixtures."""

import dataclasses
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import dualenc
import eval as evaluation
import train

FIXTURES = Path(__file__).parent / "fixtures"
DUAL = sorted(folder.name for folder in (FIXTURES / "dual").iterdir())
TOKENS = sorted(folder.name for folder in (FIXTURES / "tokens").iterdir())


def largest_difference(got, right):
    return (got.double() - right.double()).abs().max().item()


def expected_of(folder):
    """(inputs, expected outputs) of a fixture."""
    tensors = load_file(folder / "expected.safetensors")
    inputs = {key.removeprefix("input."): tensor for key, tensor in tensors.items() if key.startswith("input.")}
    return inputs, {key: tensor for key, tensor in tensors.items() if not key.startswith("input.")}


@pytest.fixture
def copy(tmp_path):
    """A function that copies a fixture, with its weights and config.json changed, and returns the folder."""

    def make(name, weights=lambda w: w, config=lambda c: c):
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(FIXTURES / name, folder)
        changed = weights(load_file(folder / "model.safetensors"))
        save_file({key: tensor.contiguous() for key, tensor in changed.items()}, folder / "model.safetensors")
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config(values) or values))
        return folder

    return make


def assert_reproduces(folder, name, tolerance=1e-5):
    """The dual encoder in folder computes what transformers computed for the fixture called name."""
    model = dualenc.DualEncoder.from_pretrained(folder)
    inputs, right = expected_of(FIXTURES / "dual" / name)
    inputs.pop("larger", None)
    output = model(**inputs, return_loss=True)
    for key in ("image_embeds", "text_embeds"):
        assert largest_difference(getattr(output, key), right[key]) < tolerance, key
    scale = model.logit_scale.exp().item()
    assert largest_difference(output.logits_per_image, right["logits_per_image"]) / scale < tolerance
    return model


# ---- What transformers computes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DUAL)
def test_a_published_dual_encoder_gives_transformers_numbers(name):
    """Embeddings to 1e-5, logits / scale to 1e-5, hidden states to 1e-4, loss and gradients to 1e-4 relative."""
    model = assert_reproduces(FIXTURES / "dual" / name, name)
    assert not model.training, "dropout and drop path of the config must be off after loading"
    inputs, right = expected_of(FIXTURES / "dual" / name)
    inputs.pop("larger", None)
    output = model(**inputs, return_loss=True, output_hidden_states=True)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(right["loss"].item(), rel=1e-5)
    is_real = inputs["attention_mask"].bool()
    for side, tower in (("vision", output.vision_model_output), ("text", output.text_model_output)):
        states = {f"{side}.hidden_states.{i}": state for i, state in enumerate(tower.hidden_states)}
        states[f"{side}.last_hidden_state"] = tower.last_hidden_state
        assert states.keys() == {key for key in right if key.startswith(f"{side}.")}
        for key, state in states.items():
            rows = slice(None) if side == "vision" else is_real
            assert largest_difference(state[rows], right[key][rows]) < 1e-4, key
    for weight in ("visual_projection.weight", "text_projection.weight", "logit_scale"):
        gradient, wanted = model.get_parameter(weight).grad, right[f"gradient.{weight}"]
        assert largest_difference(gradient, wanted) < 1e-4 * wanted.abs().max(), weight


@pytest.mark.parametrize("name", [name for name in DUAL if "larger" in expected_of(FIXTURES / "dual" / name)[1]])
def test_dinov2_reads_pictures_of_any_size(name):
    inputs, right = expected_of(FIXTURES / "dual" / name)
    model = dualenc.DualEncoder.from_pretrained(FIXTURES / "dual" / name)
    assert largest_difference(model.get_image_features(inputs["larger"]), right["larger"]) < 1e-4


def test_dinov2_refuses_pictures_that_are_not_whole_patches():
    model = dualenc.DualEncoder.from_pretrained(FIXTURES / "dual" / "dinov2-bert")
    with pytest.raises(ValueError, match=r"pictures of \(16, 20\) pixels are not whole patches of \(8, 8\)"):
        model.encode_image(torch.zeros(1, 3, 16, 20))


@pytest.mark.parametrize("name", ["clip-mpnet", "registers-albert"])
def test_published_towers_run_and_train_under_bf16_autocast(name):
    """MPNet adds float biases to its scores: they must follow the precision of the queries."""
    model = dualenc.DualEncoder.from_pretrained(FIXTURES / "dual" / name).train()
    inputs, right = expected_of(FIXTURES / "dual" / name)
    inputs.pop("larger", None)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, torch.autocast("cpu", torch.bfloat16):
            output = model.eval()(**inputs, return_loss=True)
        assert largest_difference(output.text_embeds, right["text_embeds"]) < 0.05
    output.loss.backward()


@pytest.mark.parametrize("name", DUAL)
def test_attention_weights_are_real_and_change_nothing(name):
    model = dualenc.DualEncoder.from_pretrained(FIXTURES / "dual" / name)
    inputs, right = expected_of(FIXTURES / "dual" / name)
    inputs.pop("larger", None)
    output = model(**inputs, output_attentions=True)
    for tower, depth in ((output.vision_model_output, 2), (output.text_model_output, model.config.text.depth)):
        assert len(tower.attentions) == depth
        for weights in tower.attentions:
            assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    assert largest_difference(output.image_embeds, right["image_embeds"]) < 1e-5
    assert largest_difference(output.text_embeds, right["text_embeds"]) < 1e-5


# ---- Every file layout ----------------------------------------------------------------------------------------------


def rename(old, new):
    return lambda weights: {key.replace(old, new): tensor for key, tensor in weights.items()}


def nest(weights):
    return {("vision_model." if key.startswith("vision_model.") else "") + key: t for key, t in weights.items()}


def old_layer_norms(weights):
    """As BERT's first files, and those that transformers 5.0.0 wrote, call them."""
    ends = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for old, new in ends.items():
        weights = rename(old, new)(weights)
    return weights


def tables_that_can_be_computed(weights):
    extra = {"text_model.embeddings.position_ids": torch.arange(24)[None]}
    extra["vision_model.encoder.layer.0.attention.attention.relative_position_bias.relative_position_index"] = (
        torch.zeros(5, 5)
    )
    return weights | extra


LAYOUTS = {
    "clip nested": ("clip-mpnet", nest),
    "siglip nested": ("siglip-bert", nest),
    "gamma and beta": ("vit-bert", old_layer_norms),
    "tables that can be computed": ("beit-camembert", tables_that_can_be_computed),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_of_every_version_are_read(layout, copy):
    name, change = LAYOUTS[layout]
    before = load_file(FIXTURES / "dual" / name / "model.safetensors")
    assert change(dict(before)).keys() != before.keys(), "the layout must differ from the fixture's"
    assert_reproduces(copy(f"dual/{name}", change), name)


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "old bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_weights_are_read_from_every_kind_of_file(suffix, shards, copy):
    """Whole or in shards that an index names; safetensors, or pickles read with weights_only."""
    folder = copy("dual/vit-bert")
    weights = load_file(folder / "model.safetensors")
    weights = {key: tensor.clone() for key, tensor in weights.items()}
    (folder / "model.safetensors").unlink()
    stem, end = ("model", "safetensors") if suffix == "safetensors" else ("pytorch_model", "bin")
    names = [f"{stem}-{i}.{end}" if shards > 1 else f"{stem}.{end}" for i in range(shards)]
    where = {key: names[i % shards] for i, key in enumerate(weights)}
    for name in names:
        part = {key: tensor for key, tensor in weights.items() if where[key] == name}
        if end == "safetensors":
            save_file(part, folder / name)
        else:
            torch.save(part, folder / name, _use_new_zipfile_serialization=suffix == "bin")
    if shards > 1:
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"weight_map": where}))
    assert_reproduces(folder, "vit-bert")


def test_half_precision_files_are_computed_in_float32(copy):
    folder = copy("dual/vit-bert", lambda weights: {key: tensor.half() for key, tensor in weights.items()})
    model = assert_reproduces(folder, "vit-bert", tolerance=2e-2)
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


def test_keys_left_out_of_a_config_have_the_family_default(copy):
    """Version 4 leaves out what equals the class's default: RoBERTa's pad id of 1, CLIP's quick_gelu, every eps."""

    def shorten(values):
        for side, keys in (
            ("vision", ("hidden_act", "layer_norm_eps", "attention_dropout", "num_channels")),
            ("text", ("pad_token_id", "layer_norm_eps", "hidden_act", "type_vocab_size")),
        ):
            for key in keys:
                values[f"{side}_config"].pop(key, None)

    assert_reproduces(copy("dual/clip-mpnet", config=shorten), "clip-mpnet")
    assert_reproduces(copy("dual/swiglu-roberta", config=shorten), "swiglu-roberta")


def test_a_pickle_with_code_in_it_is_refused(copy):
    folder = copy("dual/vit-bert")
    (folder / "model.safetensors").unlink()
    torch.save({"logit_scale": Path("anything")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot read weights .*pytorch_model.bin"):
        dualenc.DualEncoder.from_pretrained(folder)


# ---- Round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DUAL)
def test_hf_to_ours_to_hf_gives_the_same_tensors_under_the_same_names(name, tmp_path):
    """To the bit, mask tokens included; CLIP and SigLIP towers nested, as every version of transformers reads them."""
    source = FIXTURES / "dual" / name
    model = dualenc.DualEncoder.from_pretrained(source)
    model.save_pretrained(tmp_path / "ours")
    dualenc.DualEncoder.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "hf", format="hf")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    if model.config.vision.name in ("clip_vision_model", "siglip_vision_model"):
        before = nest(before)
    assert before.keys() == after.keys()
    for key in before:
        assert torch.equal(before[key], after[key]), key
    assert_reproduces(tmp_path / "hf", name)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    published = json.loads((source / "config.json").read_text())
    assert written["architectures"] == ["VisionTextDualEncoderModel"]
    for side in ("vision_config", "text_config"):
        for key, value in written[side].items():
            if key in published[side]:
                assert published[side][key] == value, f"{side}.{key}"


TINY = {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8}
# timm towers of every kind that transformers has a form for, and the family it goes by there.
PLAIN = {
    "class token": ("vit_tiny_patch16_224", TINY, "dinov2"),
    "average": ("vit_tiny_patch16_224", {**TINY, "global_pool": "avg"}, "beit"),
    "average without qkv bias": ("vit_tiny_patch16_224", {**TINY, "global_pool": "avg", "qkv_bias": False}, "beit"),
    "layer scale, no class position": ("deit3_small_patch16_224", TINY, "dinov2"),
    "registers": ("vit_base_patch14_reg4_dinov2", TINY, "dinov2_with_registers"),
    "clip": ("vit_base_patch32_clip_quickgelu_224", TINY, "clip_vision_model"),
    "siglip": ("vit_base_patch16_siglip_224", TINY, "siglip_vision_model"),
    "beit": ("beit_base_patch16_224", {**TINY, "init_values": 0.5}, "beit"),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_timm_vits_are_written_in_the_form_that_computes_the_same(kind, make_model, tmp_path):
    name, arguments, family = PLAIN[kind]
    arguments = dict(arguments)
    pooling = arguments.pop("global_pool", None)
    model = make_model(name, vision_args=arguments, text_pooling="pooler", vision_pooling=pooling)
    with torch.no_grad():
        for weight in model.vision_model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(tmp_path, format="hf")
    assert json.loads((tmp_path / "config.json").read_text())["vision_config"]["model_type"] == family
    back = dualenc.DualEncoder.from_pretrained(tmp_path)
    pixel_values = torch.randn(2, 3, 32, 32)
    inputs = model.processor(text=["a dog", "two dogs"])
    right, got = model(pixel_values=pixel_values, **inputs), back(pixel_values=pixel_values, **inputs)
    assert largest_difference(got.image_embeds, right.image_embeds) < 1e-5
    assert largest_difference(got.text_embeds, right.text_embeds) < 1e-5
    assert torch.equal(got.logits_per_image, got.logits_per_text.T)


def test_a_vit_without_a_pooler_is_written_as_dinov2(tmp_path, copy):
    """transformers' own ViT always has a pooler, and a random one is nobody's wish."""
    model = two_towers("vit-classifier", "bert-classifier")
    twice = {**model.config.vision.args, "intermediate_size": 48}
    config = dualenc.dataclasses.replace(model.config.vision, args=twice)
    model = dualenc.DualEncoder(dualenc.dataclasses.replace(model.config, vision=config)).eval()
    model.save_pretrained(tmp_path / "hf", format="hf")
    back = dualenc.DualEncoder.from_pretrained(tmp_path / "hf")
    pixel_values = torch.randn(2, 3, 16, 16)
    assert back.config.vision.name == "dinov2"
    assert largest_difference(back.encode_image(pixel_values), model.encode_image(pixel_values)) < 1e-5


# ---- Towers alone ---------------------------------------------------------------------------------------------------


def two_towers(vision, text, **overrides):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dualenc.DualEncoder.from_vision_text_pretrained(
            str(FIXTURES / "tower" / vision), str(FIXTURES / "tower" / text), projection_dim=8, **overrides
        ).eval()


@pytest.mark.parametrize("name", ["distilbert", "electra", "bert-masked-lm", "bert-classifier"])
def test_a_text_tower_is_read_from_below_its_task_head(name):
    """What was dropped is said in one line; the pooler is used where the checkpoint has one, else the first token."""
    folder = FIXTURES / "tower" / name
    with pytest.warns(UserWarning, match="tensors are no part of the tower and were left out"):
        encoder = dualenc.TextEncoder.from_pretrained(folder)
    inputs, right = expected_of(folder)
    output = encoder(**inputs)
    is_real = inputs["attention_mask"].bool()
    assert largest_difference(output.last_hidden_state[is_real], right["last_hidden_state"][is_real]) < 1e-4
    assert encoder.config.pooling == ("pooler" if name == "bert-classifier" else "cls")
    pooled = right["pooler_output"] if name == "bert-classifier" else right["last_hidden_state"][:, 0]
    assert largest_difference(output.pooler_output, pooled) < 1e-4
    assert not encoder.training


def test_text_pooling_overrides_the_checkpoint_and_says_that_its_pooler_is_unused():
    folder = FIXTURES / "tower" / "bert-classifier"
    with pytest.warns(UserWarning, match="left out: classifier.* pooler.dense.weight"):
        encoder = dualenc.TextEncoder.from_pretrained(folder, pooling="mean")
    inputs, right = expected_of(folder)
    mean = dualenc.masked_mean(right["last_hidden_state"], inputs["attention_mask"])
    assert largest_difference(encoder(**inputs).pooler_output, mean) < 1e-4


@pytest.mark.parametrize("name", ["vit-classifier", "deit-teacher", "beit-classifier", "clip"])
def test_a_vision_tower_is_read_from_below_its_task_head(name):
    """A pooler is never invented: a ViT or DeiT without one gives its class token."""
    model = two_towers(name, "bert-classifier")
    inputs, right = expected_of(FIXTURES / "tower" / name)
    output = model.vision_model(**inputs)
    assert largest_difference(output.last_hidden_state, right["last_hidden_state"]) < 1e-4
    pooled = right["pooler_output"] if name in ("beit-classifier", "clip") else right["last_hidden_state"][:, 0]
    assert largest_difference(output.pooler_output, pooled) < 1e-4


def test_a_pretrained_text_tower_brings_its_tokenizer(copy, tmp_path):
    """Captions are cut at the tower's own limit, pictures are made as the vision folder says."""
    text = copy("tower/bert-classifier")
    for path in (FIXTURES / "tokens" / "bert-saved").iterdir():
        shutil.copy(path, text)
    vision = copy("tower/vit-classifier")
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 16, "width": 16},
        "image_mean": [0.1] * 3,
    }
    (vision / "preprocessor_config.json").write_text(json.dumps(settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = dualenc.DualEncoder.from_vision_text_pretrained(str(vision), str(text))
        ours = dualenc.DualEncoder.from_vision_text_pretrained("resnet18", str(text), pretrained=False)
    assert model.processor.max_length == 20, "model_max_length in tokenizer_config.json"
    assert model.processor.image_transform.mean == (0.1, 0.1, 0.1)
    assert ours.processor.image_transform.resize == int(224 / 0.95)
    inputs = model.processor(text="two dogs", images=Image.new("RGB", (20, 30)))
    assert inputs.keys() == {"input_ids", "attention_mask", "token_type_ids", "pixel_values"}
    model.eval()(**{**inputs, "input_ids": inputs["input_ids"].clamp(max=79)})


def test_a_vision_tower_is_resampled_to_another_picture_size():
    model = two_towers("vit-classifier", "bert-classifier", vision_image_size=32)
    assert model.config.vision.image_size == model.vision_model.image_size == 32
    assert model.vision_model.image_transform().crop is None
    assert model.encode_image(torch.randn(1, 3, 32, 32)).shape == (1, 8)


def test_a_resampled_tower_keeps_mean_and_std_of_its_folder(tmp_path):
    folder = tmp_path / "tower"
    shutil.copytree(FIXTURES / "tower" / "vit-classifier", folder)
    values = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    values |= {"size": {"height": 30, "width": 30}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    as_published, resampled = (
        two_towers(folder, "bert-classifier", **more).vision_model.image_transform()
        for more in ({}, {"vision_image_size": 32})
    )
    assert as_published.resize == (30, 30) and resampled.resize == (32, 32)
    assert resampled == dataclasses.replace(as_published, resize=(32, 32)) and resampled.mean == (0.1, 0.2, 0.3)


def test_a_folder_without_an_image_processor_has_its_class_settings_in_proportion():
    """DeiT's class resizes to 256 and crops 224; CLIP's takes the shorter side; others squash."""
    for family, size, resize, crop in (
        ("deit", 224, (256, 256), (224, 224)),
        ("deit", 448, (512, 512), (448, 448)),
        ("vit", 32, (32, 32), None),
        ("clip_vision_model", 336, 336, (336, 336)),
        ("vit", (24, 16), (24, 16), None),
    ):
        transform = dualenc.published_transform(family, size, 3)
        assert (transform.resize, transform.crop) == (resize, crop), family


# ---- The two scripts ------------------------------------------------------------------------------------------------


@pytest.fixture
def published(make_model, tmp_path):
    """(dual encoder, its ViT alone, its BERT alone): three folders as transformers writes them."""
    model = make_model(vision_args=TINY, vision_pooling="avg", text_pooling="pooler")
    model.save_pretrained(tmp_path / "dual", format="hf")
    config = json.loads((tmp_path / "dual" / "config.json").read_text())
    weights = load_file(tmp_path / "dual" / "model.safetensors")
    for side in ("vision", "text"):
        shutil.copytree(tmp_path / "dual", tmp_path / side)
        (tmp_path / side / "config.json").write_text(json.dumps(config[f"{side}_config"]))
        prefix = f"{side}_model."
        alone = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
        save_file(alone, tmp_path / side / "model.safetensors")
    return tmp_path / "dual", tmp_path / "vision", tmp_path / "text"


def test_eval_measures_a_transformers_folder(published):
    numbers = evaluation.main([str(published[0]), "--data", "shapes", "--device", "cpu"])
    assert numbers["retrieval"]["n_images"] == 512


def test_train_takes_towers_from_transformers_folders(published, tmp_path):
    """With the text tower's own tokenizer and pooling, and the pictures as the vision folder has them."""
    _, vision, text = published
    flags = (
        f"--vision {vision} --text {text} --batch-size 8 --steps 1 --workers 0 --device cpu --out {tmp_path / 'run'}"
    )
    train.main(flags.split())
    trained = dualenc.DualEncoder.from_pretrained(tmp_path / "run" / "last")
    own = dualenc.Processor.from_pretrained(text)
    assert trained.config.vision.name == "beit" and trained.config.text.pooling == "pooler"
    assert trained.processor.image_transform == own.image_transform
    assert trained.processor.tokenizer.get_vocab() == own.tokenizer.get_vocab()


def test_a_new_vision_tower_beside_a_published_text_tower_sees_the_whole_picture(published, tmp_path):
    flags = f"--vision test_resnet --image-size 32 --text {published[2]} --batch-size 8 --steps 1 --workers 0"
    train.main([*flags.split(), "--device", "cpu", "--out", str(tmp_path / "run")])
    transform = dualenc.Processor.from_pretrained(tmp_path / "run" / "last").image_transform
    assert transform.resize == 32 and transform.crop == (32, 32)


def test_train_refuses_a_pretrained_text_tower_without_a_tokenizer(published, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (published[2] / name).unlink()
    with pytest.raises(ValueError, match="text holds no tokenizer, and a pretrained text tower understands no other"):
        train.main(["--text", str(published[2]), "--out", str(tmp_path / "run"), "--device", "cpu"])


# ---- Hub ids --------------------------------------------------------------------------------------------------------


def test_a_hub_id_is_found_in_the_local_cache(tmp_path, monkeypatch):
    """A made-up cache, offline: an id, one without an organisation, and a revision of each, which is another model."""
    monkeypatch.setattr(dualenc.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(dualenc.huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for directory in ("models--clip-italian--clip-italian", "models--tiny"):
        for revision, commit, name in (("main", "0" * 40, "vit-bert"), ("v1", "1" * 40, "vit-roberta")):
            shutil.copytree(FIXTURES / "dual" / name, tmp_path / directory / "snapshots" / commit)
            (tmp_path / directory / "refs").mkdir(exist_ok=True)
            (tmp_path / directory / "refs" / revision).write_text(commit)
    original = dualenc.huggingface_hub.snapshot_download
    monkeypatch.setattr(
        dualenc.huggingface_hub, "snapshot_download", lambda *a, **k: original(*a, cache_dir=str(tmp_path), **k)
    )
    for name in ("clip-italian/clip-italian", "tiny"):
        assert_reproduces(name, "vit-bert")
        assert_reproduces(f"{name}@v1", "vit-roberta")
    with pytest.raises(ValueError, match="nobody/nothing is neither a folder nor a hub id within reach"):
        dualenc.DualEncoder.from_pretrained("nobody/nothing")


# ---- Tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*captions were cut")
@pytest.mark.parametrize("name", TOKENS)
def test_ids_masks_and_types_are_those_of_transformers(name):
    """Accents, Chinese, emoji, literal [MASK] and <mask>, nothing at all, far too much; padding on either side."""
    expected = json.loads((FIXTURES / "tokens" / name / "expected.json").read_text())
    tokenizer, token_types = dualenc.read_tokenizer(FIXTURES / "tokens" / name)
    texts = expected.pop("texts")
    got = dualenc.Processor(None, tokenizer, token_types)(text=texts)
    assert got.keys() == expected.keys()
    for i, text in enumerate(texts):
        for key in expected:
            assert got[key][i].tolist() == expected[key][i], f"{key} of {text[:30]!r}"


@pytest.mark.filterwarnings("ignore:.*captions were cut")
@pytest.mark.parametrize("name", TOKENS)
def test_a_saved_processor_gives_the_same_tokens(name, tmp_path):
    expected = json.loads((FIXTURES / "tokens" / name / "expected.json").read_text())
    texts = expected.pop("texts")
    dualenc.Processor(None, *dualenc.read_tokenizer(FIXTURES / "tokens" / name)).save_pretrained(tmp_path)
    got = dualenc.Processor(None, *dualenc.read_tokenizer(tmp_path))(text=texts)
    assert {key: tensor.tolist() for key, tensor in got.items()} == expected


def test_older_places_of_special_tokens_are_read(tmp_path):
    """special_tokens_map.json, and a class that only config.json tells."""
    shutil.copy(FIXTURES / "tokens" / "mpnet-old" / "vocab.txt", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mpnet"}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<unk>"}}))
    tokenizer, token_types = dualenc.read_tokenizer(tmp_path)
    assert (tokenizer.padding["pad_token"], token_types) == ("<unk>", False)
    assert tokenizer.encode("").tokens == ["<s>", "</s>"]


def test_a_caption_is_cut_at_the_side_the_files_say(tmp_path):
    folder = tmp_path / "left"
    shutil.copytree(FIXTURES / "tokens" / "bert-old", folder)
    settings = {"truncation_side": "left", "model_max_length": 4, "tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    processor = dualenc.Processor(None, *dualenc.read_tokenizer(folder))
    with pytest.warns(UserWarning, match="captions were cut to 4 tokens"):
        assert processor.decode(processor(text="two dogs and a cat")["input_ids"][0]) == "a cat"


# ---- Pixels ---------------------------------------------------------------------------------------------------------


def image_cases():
    settings = json.loads((FIXTURES / "images.json").read_text())
    return [(name, number) for name in settings for number in range(3)]


@pytest.mark.parametrize("name, number", image_cases())
def test_pixel_values_are_those_of_the_torchvision_backed_processors(name, number):
    """To 1e-6 for PIL, numpy and tensors, uint8 and float, channels first and last, odd sizes and crops."""
    settings = json.loads((FIXTURES / "images.json").read_text())[name]
    tensors = load_file(FIXTURES / "images.safetensors")
    transform = dualenc.ImageTransform.from_dict(settings)
    picture, right = tensors[f"picture.{number}"], tensors[f"{name}.{number}"]
    first = picture.permute(2, 0, 1)
    for kind in (Image.fromarray(picture.numpy()), picture.numpy(), picture, first.numpy(), first):
        assert largest_difference(transform(kind), right) < 1e-6
    for kind in (picture.float(), first.float().numpy(), first / 255):
        assert largest_difference(transform(kind), tensors[f"{name}.{number}.float"]) < 1e-6


PROCESSORS = ("ViT", "DeiT", "Beit", "Siglip", "CLIP", "Bit")


def test_every_layout_of_image_settings_is_read(tmp_path):
    """An integer or a pair for a size, what only the class tells, an older name of the class; the newer file wins."""
    read = dualenc.ImageTransform.from_dict
    assert read({"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32}) == read(
        {
            "image_processor_type": "CLIPImageProcessorFast",
            "size": {"shortest_edge": 32},
            "crop_size": {"height": 32, "width": 32},
        }
    )
    assert read({"feature_extractor_type": "ViTFeatureExtractor", "size": 32}).resize == (32, 32)
    assert read({"image_processor_type": "ViTImageProcessor", "size": [48, 32]}).resize == (48, 32)
    deit = read({"image_processor_type": "DeiTImageProcessor", "crop_size": None})
    assert (deit.resize, deit.crop, deit.interpolation) == ((256, 256), (224, 224), "bicubic")
    resampled = {name: read({"image_processor_type": f"{name}ImageProcessor"}).interpolation for name in PROCESSORS}
    assert resampled == {name: "bilinear" if name == "ViT" else "bicubic" for name in PROCESSORS}
    assert read({"image_processor_type": "ViTImageProcessor", "do_resize": False}).resize is None
    raw = read({"image_processor_type": "ViTImageProcessor", "do_rescale": False, "do_normalize": False, "size": 2})
    assert largest_difference(raw(np.full((2, 2, 3), 7, np.uint8)), torch.full((3, 2, 2), 7.0)) < 1e-5
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor"}))
    nested = {"image_processor": {"image_processor_type": "SiglipImageProcessor"}, "processor_class": "any"}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert dualenc.read_image_transform(tmp_path).interpolation == "bicubic"


def test_floats_up_to_one_are_taken_as_they_are():
    """A deliberate difference: transformers divides them by 255 once more."""
    transform = dualenc.ImageTransform(resize=None, crop=None, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert transform(torch.full((3, 2, 2), 0.5)).unique().tolist() == [0.5]
    assert transform(torch.full((3, 2, 2), 51.0)).unique().item() == pytest.approx(0.2)


# ---- Refusals -------------------------------------------------------------------------------------------------------


def set_in(side, **values):
    return lambda config: config[f"{side}_config"].update(values)


def without(key):
    return lambda weights: {name: tensor for name, tensor in weights.items() if name != key}


def shorter(key):
    return lambda weights: {name: tensor[:-1] if name == key else tensor for name, tensor in weights.items()}


PROJECTION, WORDS = "visual_projection.weight", "text_model.embeddings.word_embeddings.weight"
POOLED = "vision_model.pooler.dense.weight"
BROKEN = {
    "unknown vision": (
        set_in("vision", model_type="resnet"),
        None,
        "unknown vision model_type 'resnet'; expected vit, ",
    ),
    "unknown text": (
        set_in("text", model_type="modernbert"),
        None,
        "unknown text model_type 'modernbert'; expected bert, ",
    ),
    "unknown activation": (set_in("vision", hidden_act="mish"), None, "unknown activation 'mish'; expected gelu"),
    "no config": (lambda config: config.pop("text_config") and None, None, "unknown text model_type None"),
    "relative_key": (
        set_in("text", position_embedding_type="relative_key"),
        None,
        "position_embedding_type = 'relative_key'; only 'absolute' is supported",
    ),
    "decoder": (set_in("text", is_decoder=True), None, "is_decoder = True; only False is supported"),
    "cross": (set_in("text", add_cross_attention=True), None, "add_cross_attention = True; only False"),
    "no scale": (None, without("logit_scale"), "1 missing: logit_scale$"),
    "no pooler": (None, without(POOLED), f"1 missing: {POOLED.removeprefix('x')}"),
    "extra": (None, lambda weights: weights | {"visual_bias": torch.zeros(2)}, "1 unexpected: visual_bias$"),
    "projection": (None, shorter(PROJECTION), r"1 misshapen: visual_projection.weight \(11, 24\), expected \(12, 24\)"),
    "words": (None, shorter(WORDS), r"1 misshapen: text_model.*word_embeddings.weight \(79, 24\), expected \(80, 24\)"),
    "text": (set_in("vision", hidden_size="x"), None, "cannot build the model of .*: TypeError"),
    "heads": (
        set_in("vision", num_attention_heads=7),
        None,
        "cannot build the model of .*: AssertionError: dim should",
    ),
    "list": (lambda config: config.update(vision_config=[1]), None, "cannot build the model of .*: AttributeError"),
    "words for sizes": (set_in("vision", image_size="224"), None, "cannot build the model of .*config.json: "),
    "many": (
        None,
        lambda weights: {},
        r"does not fit the model of its config.json: \d\d missing: ([\w.]+, ){4}[\w.]+$",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_cannot_be_loaded_exactly_is_refused(fault, copy):
    config, weights, message = BROKEN[fault]
    unchanged = {"config": config, "weights": weights}
    folder = copy("dual/vit-bert", **{name: change for name, change in unchanged.items() if change})
    with pytest.raises(ValueError, match=message):
        dualenc.DualEncoder.from_pretrained(folder)


@pytest.mark.parametrize(
    "name, where",
    [
        ("beit-camembert", "use_relative_position_bias"),
        ("beit-albert", "use_absolute.*, use_shared"),
        ("dinov2-bert", ""),
    ],
)
def test_position_tables_of_oblong_pictures_are_refused_where_transformers_has_them_wrong(name, where, copy):
    folder = copy(f"dual/{name}", config=set_in("vision", image_size=[24, 16]))
    with pytest.raises(ValueError, match=f"tower( with {where}.*)? for pictures of 24 x 16 pixels: .*only square"):
        dualenc.DualEncoder.from_pretrained(folder)


def test_albert_with_inner_groups_is_refused(copy):
    with pytest.raises(ValueError, match="inner_group_num = 2; only 1 is supported"):
        dualenc.DualEncoder.from_pretrained(copy("dual/beit-albert", config=set_in("text", inner_group_num=2)))


def test_a_folder_without_an_image_processor_loads_without_a_processor(copy):
    folder = copy("dual/vit-bert")
    shutil.copy(FIXTURES / "tokens" / "bert-saved" / "tokenizer.json", folder)
    assert dualenc.DualEncoder.from_pretrained(folder).processor is None


def test_a_full_clip_is_no_dual_encoder_but_lends_its_vision_tower():
    with pytest.raises(ValueError, match="has model_type 'clip', expected 'dualenc' or .*from_vision_text_pretrained"):
        dualenc.DualEncoder.from_pretrained(FIXTURES / "tower" / "clip")
    with pytest.raises(ValueError, match="unknown text model_type 'clip'"):
        dualenc.TextEncoder.from_pretrained(FIXTURES / "tower" / "clip")


@pytest.mark.parametrize("side", ["vision", "text"])
def test_a_tower_whose_config_makes_no_sense_is_refused_by_name(side, copy):
    """Whatever timm or torch make of it: one ValueError that names the file."""
    name = {"vision": "vit-classifier", "text": "bert-classifier"}[side]
    folder = copy(f"tower/{name}", config=lambda config: config.update(hidden_size="wide"))
    towers = {"vision": FIXTURES / "tower" / "vit-classifier", "text": FIXTURES / "tower" / "bert-classifier"}
    towers[side] = folder
    with pytest.raises(ValueError, match=f"cannot build the model of {folder}"):
        two_towers(*towers.values())


def test_a_folder_of_timm_is_told_from_one_of_transformers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "num_features": 192}))
    with pytest.raises(ValueError, match="holds a timm model: write hf-hub: before its hub id"):
        two_towers(tmp_path, "bert-classifier")


def test_a_folder_without_weights_says_what_it_holds(copy):
    folder = copy("dual/vit-bert")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match="no weights in .*: expected model.safetensors or pytorch_model.bin, it holds con"
    ):
        dualenc.DualEncoder.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="cannot read weights .*model.safetensors"):
        dualenc.DualEncoder.from_pretrained(folder)


def test_settings_a_family_does_not_have_are_refused():
    with pytest.raises(ValueError, match="unknown clip_vision_model pooling 'avg'; expected None"):
        two_towers("clip", "bert-classifier", vision_pooling="avg")
    with pytest.raises(ValueError, match="a beit tower has no patch dropout"):
        two_towers("beit-classifier", "bert-classifier", vision_patch_dropout=0.5)
    with pytest.raises(ValueError, match="unknown field of TextConfig 'size'"):
        two_towers("clip", "bert-classifier", text_size=3)


def test_towers_that_transformers_has_no_form_for_are_not_written(make_model, tmp_path):
    with pytest.raises(ValueError, match="no form of resnet18 .*; plain ViTs can be written, convolutions"):
        make_model("resnet18", text_pooling="pooler").save_pretrained(tmp_path, format="hf")
    with pytest.raises(ValueError, match="bert tower that pools by 'mean': .* train with text_pooling='pooler'"):
        make_model().save_pretrained(tmp_path, format="hf")
    with pytest.raises(ValueError, match="no logit_bias: a model trained with siglip_loss stays in dualenc"):
        make_model(text_pooling="pooler", logit_bias_init=-10.0).save_pretrained(tmp_path, format="hf")
    with pytest.raises(ValueError, match="unknown checkpoint format 'onnx'; expected dualenc, hf"):
        make_model().save_pretrained(tmp_path, format="onnx")
    with pytest.raises(ValueError, match="plain ViTs can be written"):
        make_model("vit_small_patch16_18x2_224", text_pooling="pooler").save_pretrained(tmp_path, format="hf")
    normed = make_model(vision_args={**TINY, "qk_norm": True}, text_pooling="pooler")
    with pytest.raises(ValueError, match="no form of vit_tiny_patch16_224 .*unexpected: .*q_norm"):
        normed.save_pretrained(tmp_path, format="hf")
    both = make_model(vision_args={**TINY, "fc_norm": False}, vision_pooling="avg", text_pooling="pooler")
    with pytest.raises(ValueError, match="no form of vit_tiny_patch16_224"):
        both.save_pretrained(tmp_path, format="hf")
    assert not any(tmp_path.iterdir()), "nothing is written of what cannot be written whole"


def test_a_tower_that_only_looks_the_same_is_not_written(make_model, tmp_path):
    """Same tensors, another function: the class token scaled before the head."""
    model = make_model(text_pooling="pooler")
    model.vision_model.trunk.pool_include_prefix = True
    model.vision_model.trunk.global_pool = "max"
    with pytest.raises(ValueError, match="the nearest one, dinov2, computes something else"):
        model.save_pretrained(tmp_path, format="hf")


def test_processor_files_that_are_not_understood_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown image processor 'Vilt'; expected ViT, DeiT, Beit, Siglip, CLIP, Bit"):
        dualenc.ImageTransform.from_dict({"image_processor_type": "ViltImageProcessor"})
    with pytest.raises(ValueError, match="unknown image processor 'none'"):
        dualenc.ImageTransform.from_dict({"size": 32})
    with pytest.raises(ValueError, match="image size .*longest_edge.* is not understood; expected shortest_edge"):
        dualenc.ImageTransform.from_dict({"image_processor_type": "ViTImageProcessor", "size": {"longest_edge": 3}})
    with pytest.raises(
        ValueError, match="cannot read .*preprocessor_config.json: there is none; the folder holds nothing"
    ):
        dualenc.read_image_transform(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer in .*: expected tokenizer.json, vocab.txt, .* it holds nothing"):
        dualenc.read_tokenizer(tmp_path)
    shutil.copy(FIXTURES / "tokens" / "bert-saved" / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>"}))
    with pytest.raises(ValueError, match="has no padding token '<pad>' in its vocabulary"):
        dualenc.read_tokenizer(tmp_path)


def test_camemberts_sentencepiece_file_whose_pieces_are_numbered_otherwise_is_refused(tmp_path):
    shutil.copy(FIXTURES / "tokens" / "xlm-roberta-old" / "sentencepiece.bpe.model", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "camembert"}))
    with pytest.raises(ValueError, match="sentencepiece.bpe.model: CamemBERT's tokenizer is read from tokenizer.json"):
        dualenc.read_tokenizer(tmp_path)


# ---- Memory ---------------------------------------------------------------------------------------------------------


def test_loading_draws_no_random_weights(monkeypatch):
    """Their memory is taken once, and filled from the file: nothing is initialised only to be overwritten."""
    drawn_on, normal_ = [], torch.nn.init.normal_

    def watched(tensor, *arguments, **keywords):
        drawn_on.append(tensor.device.type)
        return normal_(tensor, *arguments, **keywords)

    monkeypatch.setattr(torch.nn.init, "normal_", watched)
    dualenc.DualEncoder.from_pretrained(FIXTURES / "dual" / "vit-bert")
    assert set(drawn_on) == {"meta"}


@pytest.mark.slow
def test_loading_holds_at_most_two_copies_of_the_weights(tmp_path):
    """ViT-B/16 and BERT-base: the mapped file is one copy, the model the other; measured in a process of its own."""
    resource = pytest.importorskip("resource")
    assert resource  # Unix only
    args = {
        key: v
        for key, v in dualenc.PUBLISHED_VISION["vit"].defaults.items()
        if key not in ("image_size", "num_channels")
    }
    vision = dualenc.VisionConfig(name="vit", args=args, image_size=224, pooling="pooler")
    config = dualenc.DualEncoderConfig(vision, dualenc.TextConfig(pooling="pooler"))
    dualenc.DualEncoder(config).save_pretrained(tmp_path, format="hf")
    program = (
        "import resource, sys; from dualenc import DualEncoder\n"
        "held = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = held(); model = DualEncoder.from_pretrained(sys.argv[1]); print(held() - before)"
    )
    here = Path(dualenc.__file__).parent
    command = [sys.executable, "-c", program, str(tmp_path)]
    taken = int(subprocess.run(command, cwd=here, check=True, capture_output=True, text=True).stdout)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert taken < 2.05 * size, f"{taken / size:.2f} copies"
