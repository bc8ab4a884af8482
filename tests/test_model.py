"""Claims about the dual encoder with real towers; its forward and lock are Exercises 2 and 12."""

import json
import math

import pytest
import torch
from support import CAPTIONS
from torch import nn

import dualenc


@pytest.fixture
def batch(make_model, images):
    """(pixel_values, captions by name) for four pairs."""
    inputs = make_model().processor(text=list(CAPTIONS), images=images)
    return inputs.pop("pixel_values"), inputs


def test_temperature_and_projections_start_as_published(make_model):
    """2.6592, ln(1 / 0.07) truncated; one matrix a side, whose features keep the variance."""
    model, config = make_model(projection_dim=2000), dualenc.DualEncoderConfig()
    assert model.logit_scale.shape == ()
    assert model.logit_scale.item() == pytest.approx(2.6592, abs=1e-7)
    assert math.exp(dualenc.LOGIT_SCALE_MAX) == pytest.approx(100)
    assert (config.projection_dim, config.projection_head) == (512, "linear")
    assert not hasattr(model, "logit_bias") and make_model(logit_bias_init=-10.0).logit_bias == -10
    for head in (model.visual_projection, model.text_projection):
        assert head.bias is None and head.weight.shape == (2000, 32)
        assert head.weight.std().item() == pytest.approx(32**-0.5, rel=0.02)
    tower = dualenc.TextEncoder(dualenc.TextConfig(width=60, depth=1))
    for name, weight in tower.named_parameters():  # BERT's
        if weight.ndim == 1:
            assert (weight == name.endswith("Norm.weight")).all(), name
        else:
            assert weight.std().item() == pytest.approx(0.02, rel=0.2), name


@pytest.mark.parametrize("side", ["image", "text"])
def test_embeds_are_features_at_unit_norm_whoever_computes_them(make_model, batch, side):
    model, (pixel_values, captions) = make_model(), batch
    inputs = {"pixel_values": pixel_values} if side == "image" else captions
    output, tower = model(**inputs), "vision" if side == "image" else "text"
    embeds = getattr(output, f"{side}_embeds")
    features = getattr(model, f"get_{side}_features")(**inputs)
    pooled = getattr(output, f"{tower}_model_output").pooler_output
    assert torch.equal(getattr(model, f"encode_{side}")(**inputs), embeds)
    assert torch.equal(getattr(model, f"project_{side}")(pooled), embeds)
    norms = features.norm(dim=1, keepdim=True)
    assert not torch.allclose(norms, torch.ones(4, 1), atol=1e-2), "features keep their norm"
    assert torch.allclose(features / norms, embeds, atol=1e-6)


# ---- What people attach to a model ---------------------------------------------------------------


@pytest.mark.parametrize("side", ["image", "text"])
def test_every_way_through_a_tower_calls_every_module_of_it(make_model, batch, side):
    """The last block too, though only its first token is pooled: hooks there must fire."""
    model, (pixel_values, captions) = make_model(text_pooling="cls"), batch
    inputs, tower = captions, model.text_model
    if side == "image":  # timm's trunk owns the position table; its forward_features is called
        inputs, tower = {"pixel_values": pixel_values}, model.vision_model.trunk
    with_weights, called = set(), set()
    for name, module in tower.named_modules():
        if name and next(module.parameters(recurse=False), None) is not None:
            with_weights.add(name)
            module.register_forward_hook(lambda *_, name=name: called.add(name))
    for mode in (True, False):
        for method in (f"encode_{side}", f"get_{side}_features"):
            called.clear()
            getattr(model.train(mode), method)(**inputs)
            assert called == with_weights and len(called) > 10, f"{method} leaves out modules"


class LoRA(nn.Module):
    """A low-rank update beside a frozen linear layer, as peft adds it."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, rows):
        return self.base(rows) + self.up(self.down(rows))


@pytest.mark.parametrize("locked", [False, True])
def test_low_rank_adapters_in_the_last_block_learn(make_model, batch, locked):
    """Also in towers that were locked before the adapters came."""
    model, (pixel_values, captions) = make_model(), batch
    model = model.lock("both") if locked else model
    attention = model.vision_model.trunk.blocks[-1].attn
    attention.qkv = LoRA(attention.qkv)
    attention = model.text_model.encoder["layer"][-1].attention["self"]
    attention["query"] = LoRA(attention["query"])
    adapters = [weight for name, weight in model.named_parameters() if ".up." in name]
    model.train()(**captions, pixel_values=pixel_values, return_loss=True).loss.backward()
    assert len(adapters) == 2 and all(weight.grad.any() for weight in adapters)


@pytest.mark.filterwarnings("ignore")  # torch announces another place for quantisation
def test_dynamic_int8_quantisation_of_the_towers_works(make_model, batch):
    model, (pixel_values, captions) = make_model(), batch
    plain = model(**captions, pixel_values=pixel_values)
    for name in ("vision_model", "text_model"):
        small = torch.ao.quantization.quantize_dynamic(getattr(model, name), {nn.Linear})
        assert not any(isinstance(module, nn.Linear) for module in small.modules())
        setattr(model, name, small)
    quantised = model(**captions, pixel_values=pixel_values)
    for side in ("image_embeds", "text_embeds"):
        one, two = getattr(plain, side), getattr(quantised, side)
        assert not torch.equal(one, two) and (one * two).sum(dim=1).min() > 0.95


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("vision", ["vit_tiny_patch16_224", "test_resnet"])
def test_models_of_another_type_take_the_processors_pixels(make_model, batch, dtype, vision):
    """After model.half() or model.bfloat16(), pixels of float32 are cast in the tower."""
    model, (pixel_values, captions) = make_model(vision), batch
    with torch.no_grad():
        right = model(**captions, pixel_values=pixel_values)
        got = model.to(dtype)(**captions, pixel_values=pixel_values)
    assert got.image_embeds.dtype == got.text_embeds.dtype == dtype
    for side in ("image_embeds", "text_embeds"):
        assert torch.allclose(getattr(got, side).float(), getattr(right, side), atol=5e-2)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_towers_take_one_graph_each_for_captions_of_any_length(make_model, precision):
    """Without a break inside a tower; test_train.py compares what they compute."""
    model, graphs = make_model().train(), []
    options = {"backend": lambda graph, _: graphs.append(graph) or graph, "fullgraph": True}
    model.vision_model.compile(**options)
    model.text_model.compile(dynamic=True, **options)
    for length in (7, 9, 12, 5, 20, 31):
        mask = torch.ones(4, length, dtype=torch.long)
        inputs = {"input_ids": 5 * mask, "attention_mask": mask}
        with dualenc.autocast(torch.device("cpu"), precision):
            output = model(**inputs, pixel_values=torch.randn(4, 3, 32, 32), return_loss=True)
        output.loss.backward()
    assert len(graphs) == 2


# ---- Configurations and their tables -------------------------------------------------------------


def mlp_head(width, projection_dim):
    return nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, projection_dim))


def test_a_new_head_and_a_new_pooling_are_a_row_each(make_model, batch, monkeypatch, tmp_path):
    """Built, trained, saved and loaded by name."""
    monkeypatch.setitem(dualenc.PROJECTION_HEADS, "mlp", mlp_head)
    monkeypatch.setitem(dualenc.TEXT_POOLING, "second", lambda tower, hidden, mask: hidden[:, 1])
    model = make_model(projection_head="mlp", text_pooling="second")
    pixel_values, captions = batch
    output = model.train()(**captions, pixel_values=pixel_values, return_loss=True)
    output.loss.backward()
    grads = [weight.grad.any() for weight in model.visual_projection.parameters()]
    assert len(grads) == 4 and all(grads)
    tower = output.text_model_output
    assert torch.equal(tower.pooler_output, tower.last_hidden_state[:, 1])
    model.eval().save_pretrained(tmp_path)
    loaded = dualenc.DualEncoder.from_pretrained(tmp_path)
    assert loaded.config == model.config
    one, two = (m(**captions, pixel_values=pixel_values).logits_per_image for m in (model, loaded))
    assert torch.equal(one, two)


def test_configurations_survive_json():
    vision = dualenc.VisionConfig("resnet18", {"layers": [1, 1, 1, 1]}, 64)
    config = dualenc.DualEncoderConfig(vision, dualenc.TextConfig(width=32, heads=2), 8)
    values = json.loads(json.dumps(config.to_dict()))
    assert dualenc.DualEncoderConfig.from_dict(values) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": {"widht": 3}}, "unknown field of TextConfig 'widht'; expected width, "),
        ({"projection_dim": 0}, "projection_dim is 0, expected at least 1"),
        ({"projection_head": "mlp"}, "unknown projection head 'mlp'; expected linear"),
        ({"text": {"width": 30, "heads": 4}}, "text width 30 is not a multiple of 4 heads"),
        ({"text": {"family": "gpt2"}}, "unknown text family 'gpt2'; expected bert"),
        ({"text": {"pooling": "max"}}, "unknown text pooling 'max'; expected cls, mean, pooler"),
        ({"text": {"activation": "glu"}}, "unknown activation 'glu'; expected gelu, "),
    ],
)
def test_configurations_that_cannot_be_built_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        dualenc.DualEncoderConfig.from_dict(values)
