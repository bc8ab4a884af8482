"""Checkpoints of transformers, read and written without it; its numbers are in tests/fixtures."""

import dataclasses
import inspect
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dualenc

FIXTURES = Path(__file__).parent / "fixtures"
DUAL = sorted(folder.name for folder in (FIXTURES / "dual").iterdir())
TOKENS = sorted({path.name for path in (FIXTURES / "tokens").iterdir()} - {"xlm-roberta-old"})
IMAGE_PROCESSORS = json.loads((FIXTURES / "images.json").read_text())


def largest_difference(got, right):
    return (got.double() - right.double()).abs().max().item()


def expected_of(folder):
    """(inputs, {name: tensor} of all that the fixture expects) of a folder."""
    tensors = load_file(folder / "expected.safetensors")
    inputs = {key[6:]: tensor for key, tensor in tensors.items() if key.startswith("input.")}
    inputs.pop("larger", None)  # images of another size, for DINOv2
    return inputs, tensors


@pytest.fixture
def copy(tmp_path):
    """A function that copies a fixture, changes its weights and config, and returns the folder."""

    def make(name, weights=None, config=None):
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(FIXTURES / name, folder)
        if weights:
            changed = weights(load_file(folder / "model.safetensors"))
            changed = {key: tensor.contiguous() for key, tensor in changed.items()}
            save_file(changed, folder / "model.safetensors")
        if config:
            values = json.loads((folder / "config.json").read_text())
            config(values)
            (folder / "config.json").write_text(json.dumps(values))
        return folder

    return make


def two_towers(vision, text, **overrides):
    return dualenc.DualEncoder.from_vision_text_pretrained(
        str(FIXTURES / "tower" / vision), str(FIXTURES / "tower" / text), 8, **overrides
    ).eval()


def assert_reproduces(folder, name):
    """The dual encoder in folder computes what transformers computed for the fixture's name."""
    model = dualenc.DualEncoder.from_pretrained(folder)
    inputs, right = expected_of(FIXTURES / "dual" / name)
    output = model(**inputs, output_attentions=True)
    for key in ("image_embeds", "text_embeds"):
        assert largest_difference(getattr(output, key), right[key]) < 1e-5, key
    logits = output.logits_per_image, right["logits_per_image"]
    assert largest_difference(*logits) / model.logit_scale.exp().item() < 1e-5
    for tower in (output.vision_model_output, output.text_model_output):
        assert len(tower.attentions) == 2
        for weights in tower.attentions:
            assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    return model


# ---- What transformers computes ------------------------------------------------------------------


@pytest.mark.parametrize("name", DUAL)
def test_a_published_dual_encoder_gives_transformers_numbers(name):
    """Embeddings to 1e-5 with attention weights or without, hidden states and gradients to 1e-4."""
    model = assert_reproduces(FIXTURES / "dual" / name, name)
    assert not model.training, "dropout and drop path of the config must be off after loading"
    after_pad = isinstance(model.text_model, dualenc.RobertaEncoder)
    unused = model.config.text.pad_token_id + 1 if after_pad else 0
    assert model.text_model.max_tokens == model.config.text.max_positions - unused
    inputs, right = expected_of(FIXTURES / "dual" / name)
    output = model(**inputs, return_loss=True, output_hidden_states=True)
    for key in ("image_embeds", "text_embeds"):
        assert largest_difference(getattr(output, key), right[key]) < 1e-5, key
    output.loss.backward()
    assert output.loss.item() == pytest.approx(right["loss"].item(), rel=1e-5)
    is_real = inputs["attention_mask"].bool()
    for side in ("vision", "text"):
        tower = getattr(output, f"{side}_model_output")
        states = {f"{side}.hidden_states.{i}": state for i, state in enumerate(tower.hidden_states)}
        states[f"{side}.last_hidden_state"] = tower.last_hidden_state
        assert states.keys() == {key for key in right if key.startswith(f"{side}.")}
        for key, state in states.items():
            rows = slice(None) if side == "vision" else is_real
            assert largest_difference(state[rows], right[key][rows]) < 1e-4, key
    for weight in ("visual_projection.weight", "text_projection.weight", "logit_scale"):
        gradient, wanted = model.get_parameter(weight).grad, right[f"gradient.{weight}"]
        assert largest_difference(gradient, wanted) < 1e-4 * wanted.abs().max(), weight


def test_dinov2_reads_images_of_any_size():
    folder = FIXTURES / "dual" / "dinov2-bert"
    _, right = expected_of(folder)
    model = dualenc.DualEncoder.from_pretrained(folder)
    features = model.get_image_features(right["input.larger"])
    assert largest_difference(features, right["larger"]) < 1e-4


def test_published_towers_run_and_train_under_bf16_autocast():
    """MPNet adds float biases to its scores: they must follow the precision of the queries."""
    model = dualenc.DualEncoder.from_pretrained(FIXTURES / "dual" / "clip-mpnet")
    inputs, right = expected_of(FIXTURES / "dual" / "clip-mpnet")
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, torch.autocast("cpu", torch.bfloat16):
            output = model(**inputs, return_loss=True)
        assert largest_difference(output.text_embeds, right["text_embeds"]) < 0.05
    output.loss.backward()
    bias = model.text_model.score_mask(None, torch.zeros(1, 200, 1))[0, 0]
    assert bias[0, -1] == bias[0, 127] and bias[-1, 0] == bias[-1, 72], "far ones share a row"


def nest(weights):
    pattern = r"^vision_model\."
    return {re.sub(pattern, "vision_model.vision_model.", key): t for key, t in weights.items()}


def gamma_and_beta(weights):
    """As BERT's first files, and those that transformers 5.0.0 wrote, call them."""
    ends = (r"(?<=LayerNorm\.)weight$", "gamma"), (r"(?<=LayerNorm\.)bias$", "beta")
    return {re.sub(*ends[0], re.sub(*ends[1], key)): t for key, t in weights.items()}


def computed_tables(weights):
    table = "vision_model.encoder.layer.0.attention.attention.relative_position_bias."
    zeros, ids = torch.zeros(5, 5), torch.arange(24)[None]
    return weights | {"text_model.embeddings.position_ids": ids, f"{table}_position_index": zeros}


@pytest.mark.parametrize(
    "name, change",
    [("siglip-bert", nest), ("vit-bert", gamma_and_beta), ("beit-camembert", computed_tables)],
)
def test_tensor_names_of_every_version_are_read(name, change, copy):
    before = load_file(FIXTURES / "dual" / name / "model.safetensors")
    assert change(before).keys() != before.keys()
    assert_reproduces(copy(f"dual/{name}", change), name)


@pytest.mark.parametrize("kind", ["bin", "old bin"])
def test_pickles_are_read_with_weights_only(kind, copy):
    folder = copy("dual/vit-bert")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(weights, path, _use_new_zipfile_serialization=kind == "bin")
    assert_reproduces(folder, "vit-bert")


@pytest.mark.parametrize("name", DUAL)
def test_hf_to_ours_to_hf_gives_the_same_tensors_and_config(name, tmp_path):
    """To the bit, without mask tokens; CLIP and SigLIP nested, as all versions read them."""
    source = FIXTURES / "dual" / name
    model = dualenc.DualEncoder.from_pretrained(source)
    model.save_pretrained(tmp_path / "ours")
    ours = dualenc.DualEncoder.from_pretrained(tmp_path / "ours")
    ours.save_pretrained(tmp_path / "hf", format="hf")
    before = load_file(source / "model.safetensors")
    before = nest(before) if name.startswith(("clip", "siglip")) else before
    before.pop("vision_model.embeddings.mask_token", None)
    after = load_file(tmp_path / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    for key in before:
        assert torch.equal(before[key], after[key]), key
    assert_reproduces(tmp_path / "hf", name)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    published = json.loads((source / "config.json").read_text())
    assert written["architectures"] == ["VisionTextDualEncoderModel"]
    for side in ("vision_config", "text_config"):
        for key in (written[side].keys() & published[side].keys()) - {"use_mask_token"}:
            assert written[side][key] == published[side][key], f"{side}.{key}"


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("vision", dualenc.VisionConfig("test_resnet"), "test_resnet"),
        ("vision.pooling", "token", "vit with pooling token"),
        ("text.family", "distilbert", "distilbert;"),
        ("text.family", "own", "own with"),
        ("text.pooling", "mean", "bert with pooling mean"),
        ("projection_head", "mlp", "mlp heads"),
        ("logit_bias_init", -10.0, "logit_bias"),
    ],
)
def test_what_transformers_lacks_is_not_written(field, value, message, tmp_path, monkeypatch):
    """Among them a new family of text towers, which is a class and one row, and a new head."""
    monkeypatch.setitem(dualenc.HF_TEXT, "own", dualenc.Published(dualenc.MPNetEncoder))
    monkeypatch.setitem(dualenc.PROJECTION_HEADS, "mlp", torch.nn.Linear)
    config = dualenc.DualEncoder.from_pretrained(FIXTURES / "dual" / "vit-bert").config
    side, _, name = field.rpartition(".")
    if side:
        name, value = side, dataclasses.replace(getattr(config, side), **{name: value})
    model = dualenc.DualEncoder(dataclasses.replace(config, **{name: value}))
    message = f"dual encoder has no {message}.*start from .*google/vit-base-patch16-224-in21k"
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "hf", format="hf")
    assert not (tmp_path / "hf").exists()
    model.save_pretrained(tmp_path / "ours")
    again = dualenc.DualEncoder.from_pretrained(tmp_path / "ours")
    assert again.config == model.config and type(again.text_model) is type(model.text_model)


# ---- Towers alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["distilbert", "bert-masked-lm", "bert-classifier"])
def test_a_text_tower_is_read_from_below_its_task_head(name):
    """The pooler is used where there is one and none is asked for, else the first token."""
    folder = FIXTURES / "tower" / name
    encoder = dualenc.TextEncoder.from_pretrained(folder)
    assert dualenc.TextEncoder.from_pretrained(folder, pooling="mean").config.pooling == "mean"
    inputs, right = expected_of(folder)
    output, is_real = encoder(**inputs), inputs["attention_mask"].bool()
    states = output.last_hidden_state, right["last_hidden_state"]
    assert largest_difference(*(state[is_real] for state in states)) < 1e-4
    has_pooler = name == "bert-classifier"
    pooled = right["pooler_output"] if has_pooler else right["last_hidden_state"][:, 0]
    assert encoder.config.pooling == ("pooler" if has_pooler else "cls") and not encoder.training
    assert largest_difference(output.pooler_output, pooled) < 1e-4


@pytest.mark.parametrize("name", ["vit-classifier", "deit-teacher", "beit-classifier", "clip"])
def test_a_vision_tower_is_read_from_below_its_task_head(name):
    """A pooler is never invented: a ViT or DeiT without one gives its class token."""
    tower = two_towers(name, "bert-classifier").vision_model
    inputs, right = expected_of(FIXTURES / "tower" / name)
    output = tower(**inputs)
    assert largest_difference(output.last_hidden_state, right["last_hidden_state"]) < 1e-4
    own = name in ("beit-classifier", "clip")
    pooled = right["pooler_output"] if own else right["last_hidden_state"][:, 0]
    assert largest_difference(output.pooler_output, pooled) < 1e-4
    assert tower.weights_from == str(FIXTURES / "tower" / name)


@pytest.mark.parametrize(
    "pooling, overrides, expected",
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, {}, "mean"),
        ({"pooling_mode": "cls"}, {}, "cls"),
        ({"pooling_mode_max_tokens": True}, {"text_pooling": "mean"}, "mean"),
        (None, {}, "pooler"),
        ({"pooling_mode_max_tokens": True}, {}, None),
    ],
)
def test_a_sentence_transformers_folder_says_how_to_pool_and_cut(
    pooling, overrides, expected, copy
):
    def longer(weights):  # than the tokenizer's ids
        return {k: torch.cat([t, t]) if "word_emb" in k else t for k, t in weights.items()}

    folder = copy("tower/bert-classifier", longer, lambda config: config.update(vocab_size=160))
    shutil.copytree(FIXTURES / "tokens" / "bert-saved", folder, dirs_exist_ok=True)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 7}')
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if expected is None:
        with pytest.raises(ValueError, match="unknown text pooling 'max'; expected"):
            two_towers("vit-classifier", folder)
        return
    model = two_towers("vit-classifier", folder, **overrides)
    assert (model.config.text.pooling, model.processor.positions) == (expected, 24)
    assert model.processor.max_length == 7 and model.text_model.weights_from == str(folder)
    model = dualenc.DualEncoder.from_vision_text_pretrained("test_vit", folder, 8, 0, **overrides)
    assert model.processor.image_transform == model.vision_model.image_transform()


def test_ids_beyond_a_towers_vocabulary_are_refused_when_it_is_loaded(copy):
    folder = copy("tower/bert-classifier")
    shutil.copytree(FIXTURES / "tokens" / "bert-saved", folder, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"tokenizer of .*: id \d+ is beyond .*, 0 to 79"):
        two_towers("vit-classifier", folder)


def test_a_folder_says_how_its_images_are_prepared_and_their_size(copy):
    tower = two_towers("clip", "bert-classifier").vision_model
    folder = FIXTURES / "tower" / "clip"
    assert tower.image_transform() == dualenc.Processor.from_pretrained(folder).image_transform
    assert two_towers("clip", "bert-classifier", vision_image_size=16).vision_model.image_size == 16
    folder = copy("tower/clip")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="clip has no preprocessor_config.json: how are"):
        two_towers(folder, "bert-classifier")
    folder = copy("dual/vit-bert")
    shutil.copy(FIXTURES / "tokens" / "bert-saved" / "tokenizer.json", folder)
    assert dualenc.DualEncoder.from_pretrained(folder).processor is None


# ---- Tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENS)
def test_ids_masks_and_types_are_those_of_transformers(name, tmp_path):
    """Accents, Chinese, emoji, [MASK] and <mask>, nothing, too much; and again after saving."""
    expected = json.loads((FIXTURES / "tokens" / name / "expected.json").read_text())
    texts = expected.pop("texts")
    processor = dualenc.Processor(None, *dualenc.read_tokenizer(FIXTURES / "tokens" / name))
    processor.save_pretrained(tmp_path, format="hf")
    for one in (processor, dualenc.Processor.from_pretrained(tmp_path)):
        assert {key: tensor.tolist() for key, tensor in one(text=texts).items()} == expected


def tokenizer_folder(tmp_path, name, files=(), **settings):
    """A copy of a fixture's tokenizer with other settings, and further files."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(FIXTURES / "tokens" / name, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for file, content in dict(files).items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / file).write_text(text, encoding="utf-8")
    return folder


def test_older_places_of_special_tokens_are_read(tmp_path):
    """special_tokens_map.json, which the settings overrule, and a class that config.json tells."""
    files = {"config.json": {"model_type": "x", "text_config": {"model_type": "mpnet"}}}
    files["special_tokens_map.json"] = {"pad_token": {"content": "<unk>"}, "cls_token": "<unk>"}
    settings = {"cls_token": "<s>", "tokenize_chinese_chars": False}
    folder = tokenizer_folder(tmp_path, "mpnet-old", files, **settings)
    tokenizer, token_types = dualenc.read_tokenizer(folder)
    assert (tokenizer.padding["pad_token"], token_types) == ("<unk>", False)
    assert tokenizer.encode("龘龘").tokens == ["<s>", "[UNK]", "</s>"]


@pytest.mark.parametrize("side, kept", [("left", "a cat"), ("right", "two"), ("", "two and a cat")])
def test_a_caption_is_cut_where_the_settings_say(side, kept, tmp_path):
    """And not where tokenizer.json says, as in transformers; also after saving."""
    settings = {"truncation_side": side, "model_max_length": 4} if side else {}
    folder = tokenizer_folder(tmp_path, "bert-saved", tokenizer_class="BertTokenizer", **settings)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    strategy = {"direction": "Right", "strategy": "LongestFirst", "stride": 0}
    tokenizer["truncation"] = {"max_length": 3, **strategy}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    dualenc.Processor(None, *dualenc.read_tokenizer(folder)).save_pretrained(tmp_path, "hf")
    processor = dualenc.Processor(None, *dualenc.read_tokenizer(tmp_path))
    assert processor.decode(processor(text="two and a cat")["input_ids"][0]) == kept


@pytest.mark.parametrize(
    "name, files, settings, message",
    [
        ("bert-saved", {}, {"tokenizer_class": "PhobertTokenizer"}, "class 'phobert'; expect"),
        ("bert-old", {"config.json": {"tokenizer_class": "BertJapanese"}}, {}, "class 'bertja"),
        ("bert-old", {"vocab.txt": "\u2581the\n"}, {}, "sentencepiece's pieces are not read"),
        ("bert-saved", {"vocab.txt": "<none>"}, {"pad_token": "<none>"}, "no pad_token '<none>'"),
        ("xlm-roberta-old", {}, {"tokenizer_class": "XLMRobertaTokenizer"}, "tokenizer.json"),
    ],
)
def test_tokenizers_of_other_kinds_are_refused_by_name(name, files, settings, message, tmp_path):
    with pytest.raises(ValueError, match=f"cannot read .*tokenizer/.*: .*{message}"):
        dualenc.read_tokenizer(tokenizer_folder(tmp_path, name, files, **settings))


# ---- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "side, changes, message",
    [
        ("vision", {"model_type": "dinov2_with_registers"}, "timm has more by name"),
        ("text", {"model_type": "albert"}, "text model_type 'albert'; expected bert, "),
        ("vision", {"hidden_act": "mish"}, "unknown activation 'mish'; expected swish, gelu"),
        ("text", {"is_decoder": True}, "is_decoder is true"),
        ("vision", {"hidden_size": "x"}, "cannot build the model of"),
    ],
)
def test_what_a_config_asks_for_in_vain_is_refused(side, changes, message, copy):
    folder = copy("dual/vit-bert", None, lambda config: config[f"{side}_config"].update(changes))
    with pytest.raises(ValueError, match=message) as caught:
        dualenc.DualEncoder.from_pretrained(folder)
    assert str(folder) in str(caught.value)


POOLER, LAYER = "vision_model.pooler.dense.weight", "vision_model.encoder.layer.0"
WORDS = "text_model.embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        (POOLER, None, 'Missing.*"vision_model.trunk.head.dense.weight"'),
        (f"{LAYER}.attention.attention.query.weight", None, "size .*attn.qkv.weight"),
        (f"{LAYER}.attention.attention.query.weight", torch.zeros(24, 9), "Sizes of tensors must"),
        ("stranger", torch.zeros(2), 'Unexpected.*"stranger"'),
        (WORDS, torch.zeros(79, 24), f"size mismatch for {WORDS}"),
    ],
)
def test_weights_that_do_not_fit_are_refused(name, tensor, message, copy):
    def change(weights):
        return {k: t for k, t in {**weights, name: tensor}.items() if t is not None}

    folder = copy("dual/vit-bert", change)
    with pytest.raises(ValueError, match=f"weights do not fit .*{folder}: .*{message}"):
        dualenc.DualEncoder.from_pretrained(folder)


@pytest.mark.parametrize(
    "tower, overrides, message",
    [
        ("clip", {"vision_pooling": "avg"}, "unknown clip_vision_model pooling 'avg'; expected No"),
        ("clip", {"text_family": "roberta"}, "this folder 'roberta'; expected bert"),
        ("beit-classifier", {"vision_patch_dropout": 0.5}, "Beit.*argument 'patch_drop_rate'"),
        ("clip", {"vision_image_size": 32}, "clip.*16 pixels; timm has towers of any size by name"),
    ],
)
def test_settings_a_family_does_not_have_are_refused(tower, overrides, message):
    with pytest.raises(ValueError, match=message):
        two_towers(tower, "bert-classifier", **overrides)
    deit = two_towers("deit-teacher", "bert-classifier", vision_args={"hidden_dropout_prob": 0.5})
    assert deit.vision_model.trunk.blocks[0].attn.proj_drop.p == 0.5


def test_a_full_clip_is_no_dual_encoder_but_lends_its_vision_tower():
    with pytest.raises(ValueError, match="model_type .*from_vision_text_pretrained. 'clip'"):
        dualenc.DualEncoder.from_pretrained(FIXTURES / "tower" / "clip")
    with pytest.raises(ValueError, match="unknown text model_type 'clip'"):
        dualenc.TextEncoder.from_pretrained(FIXTURES / "tower" / "clip")


def test_a_folder_without_weights_or_with_code_in_them_is_refused(copy):
    folder, load = copy("dual/vit-bert"), dualenc.DualEncoder.from_pretrained
    torch.save({"logit_scale": Path("anything")}, folder / "pytorch_model.bin")
    load(folder)  # safetensors go first
    for name in ("pytorch_model.bin", "model.safetensors"):
        (folder / "model.safetensors").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=f"cannot read weights in one piece from .*{name}"):
            load(folder)
        (folder / "pytorch_model.bin").unlink(missing_ok=True)


@pytest.mark.parametrize("name", IMAGE_PROCESSORS)
def test_pixel_values_are_those_of_transformers_image_processors(name):
    """Images of odd sizes, stretched, cropped, cut off or left raw."""
    tensors, transform = load_file(FIXTURES / "images.safetensors"), IMAGE_PROCESSORS[name]
    for i in range(3):
        got = dualenc.ImageTransform.from_dict(transform)(tensors[f"picture.{i}"].numpy())
        assert largest_difference(got, tensors[f"{name}.{i}"]) < 1e-6


# ---- Beside transformers itself ------------------------------------------------------------------


@pytest.fixture
def hf():
    """transformers, where tests/requirements-parity.txt is installed."""
    return pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DUAL)
def test_transformers_reads_what_is_written_and_computes_the_same(name, hf, tmp_path):
    """Ours, written as hf: every weight is read, outputs to 1e-5, and back to the bit."""
    ours = dualenc.DualEncoder.from_pretrained(FIXTURES / "dual" / name)
    ours.save_pretrained(tmp_path / "ours", format="hf")
    read = hf.VisionTextDualEncoderModel.from_pretrained
    theirs, report = read(tmp_path / "ours", output_loading_info=True)
    assert not any(report[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    inputs = expected_of(FIXTURES / "dual" / name)[0]
    with torch.no_grad():
        right, got = theirs.eval()(**inputs, return_loss=True), ours(**inputs, return_loss=True)
    for key in ("image_embeds", "text_embeds"):
        assert largest_difference(getattr(got, key), right[key]) < 1e-5, key
    assert got.loss.item() == pytest.approx(right.loss.item(), rel=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = dualenc.DualEncoder.from_pretrained(tmp_path / "theirs")
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tokens", ["bert-old", "roberta-saved", "mpnet-saved"])
def test_processors_of_both_libraries_agree_on_files_of_either(tokens, hf, tmp_path, images):
    texts = json.loads((FIXTURES / "tokens" / tokens / "expected.json").read_text())["texts"]
    tokenizer = hf.AutoTokenizer.from_pretrained(FIXTURES / "tokens" / tokens)
    sizes = {"size": {"height": 19, "width": 19}, "crop_size": {"height": 16, "width": 16}}
    theirs = hf.VisionTextDualEncoderProcessor(hf.DeiTImageProcessor(**sizes), tokenizer)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = dualenc.Processor.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", format="hf")
    back = hf.VisionTextDualEncoderProcessor.from_pretrained(tmp_path / "ours")
    got = ours(text=texts, images=images)
    for processor in (theirs, back):
        limits = {"padding": True, "truncation": True, "return_tensors": "pt"}
        right = processor(text=texts, images=images, **limits)
        assert right.keys() == got.keys()
        for key in got:
            assert largest_difference(got[key], right[key]) < 1e-6, key


@pytest.mark.slow
@pytest.mark.parametrize("name", [*dualenc.HF_VISION, *dualenc.HF_TEXT])
def test_defaults_are_those_of_transformers_configurations(name, hf):
    config = hf.AutoConfig.for_model(name)
    if name in dualenc.HF_VISION:  # timm's defaults, unless the table has others
        vision = dualenc.read_vision_config({"model_type": name}, None, {})
        block, row = dualenc.build_tower(vision).trunk.blocks[0], dualenc.HF_VISION[name]
        assert isinstance(block.mlp.act, type(dualenc.ACTIVATIONS[config.hidden_act]()))
        ours = {n: p.default for n, p in inspect.signature(row.make).parameters.items()}
        ours |= {"layer_norm_eps": block.norm1.eps, "intermediate_size": block.mlp.fc1.out_features}
        ours = {key: ours[n] for key, n in dualenc.VISION_KEYS.items() if n in ours} | row.defaults
        ours = {key: value for key, value in ours.items() if key in config.to_dict()}
    else:
        values = dualenc.read_text_config({"model_type": name}, "cls", {})
        keys = dualenc.DISTILBERT_KEYS if name == "distilbert" else dualenc.BERT_KEYS
        ours = {key: getattr(values, field) for key, field in keys.items()}
    assert ours == {key: getattr(config, key, 0) for key in ours}  # MPNet has no token types
