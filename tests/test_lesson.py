"""Claims about the losses and the dual encoder, each against a slow version written independently."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CAPTIONS, fails_like
from references import slow_clip_loss, tensors, unit_rows
from torch.utils.flop_counter import FlopCounterMode

import dualenc


def test_siglip_loss_is_a_sigmoid_for_every_cell():
    images, texts, log_scale, bias = unit_rows(5, 8, 4), unit_rows(5, 8, 5), 1.1, -2.0

    def slow(scale, per_pair=True, sign=1):
        total = 0.0
        for i in range(5):
            for j in range(5):
                z = 1 if i == j else -1
                total += math.log(1 + math.exp(-z * (scale * float(images[i] @ texts[j]) + sign * bias)))
        return total / 5 if per_pair else total / 25

    mistakes = {
        "mean over cells, not sum over cells by B": slow(math.exp(log_scale), per_pair=False),
        "bias subtracted": slow(math.exp(log_scale), sign=-1),
        "logit_scale used without exp": slow(log_scale),
    }
    got = dualenc.siglip_loss(*tensors(images, texts, log_scale, bias))
    fails_like(got.detach(), slow(math.exp(log_scale)), mistakes, "siglip_loss", 1e-10)


def test_multi_positive_loss_shares_the_answer_within_a_group():
    images, texts, groups = unit_rows(6, 8, 6), unit_rows(6, 8, 7), [0, 1, 0, 2, 1, 0]
    entropy = sum(math.log(groups.count(g)) for g in groups) / 6
    right = slow_clip_loss(images, texts, 1.3, groups=groups) - entropy
    mistakes = {
        "entropy of the answer left in": right + entropy,
        "plain clip_loss": slow_clip_loss(images, texts, 1.3),
    }
    got = dualenc.multi_positive_clip_loss(*tensors(images, texts, 1.3), torch.tensor(groups))
    fails_like(got.detach(), right, mistakes, "multi_positive_clip_loss", 1e-10)


def test_multi_positive_loss_without_repeats_is_clip_loss_and_with_them_can_reach_0():
    inputs = tensors(unit_rows(5, 8, 8), unit_rows(5, 8, 9), 2.0)
    single = dualenc.multi_positive_clip_loss(*inputs, torch.arange(5))
    assert single.item() == pytest.approx(dualenc.clip_loss(*inputs).item(), abs=1e-12)
    groups = torch.tensor([0, 0, 1, 1])
    embeds = torch.eye(2)[groups]
    assert dualenc.multi_positive_clip_loss(embeds, embeds, torch.tensor(math.log(100.0)), groups).abs() < 1e-5
    assert dualenc.clip_loss(embeds, embeds, torch.tensor(math.log(100.0))).item() == pytest.approx(
        math.log(2), abs=1e-5
    )


@pytest.mark.parametrize("extra", [(), (torch.tensor(0.0),), (torch.arange(3),)])
def test_losses_refuse_sides_of_different_shape(extra):
    loss = {0: dualenc.clip_loss, 1: dualenc.siglip_loss}.get(len(extra))
    if extra and extra[0].ndim:
        loss = dualenc.multi_positive_clip_loss
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(2, 4\)"):
        loss(torch.ones(3, 4), torch.ones(2, 4), torch.tensor(0.0), *extra)


def test_multi_positive_loss_refuses_ids_that_are_not_one_a_row():
    with pytest.raises(ValueError, match=r"shape \(2,\), expected one id a row: \(3,\)"):
        dualenc.multi_positive_clip_loss(torch.ones(3, 4), torch.ones(3, 4), torch.tensor(0.0), torch.arange(2))


# ---- DualEncoder ----------------------------------------------------------------------------------------------------


def test_logit_scale_starts_at_the_published_value(make_model):
    """2.6592, ln(1 / 0.07) cut after four digits; cosines are multiplied by 14.28."""
    model = make_model()
    assert model.logit_scale.shape == () and model.logit_scale.item() == pytest.approx(2.6592, abs=1e-7)
    assert dualenc.DualEncoderConfig().projection_dim == 512
    assert math.exp(dualenc.LOGIT_SCALE_MAX) == pytest.approx(100)


def test_projections_have_no_bias(make_model):
    model = make_model(projection_dim=16)
    assert model.visual_projection.bias is None and model.text_projection.bias is None
    assert model.visual_projection.weight.shape == (16, 32) and model.text_projection.weight.shape == (16, 32)


def test_forward_is_the_figure_in_the_paper(make_model, pictures):
    """Tower, projection, unit norm, exp(logit_scale) * cosine: recomputed step by step in numpy."""
    model = make_model(logit_scale_init=1.5)
    inputs = model.processor(text=list(CAPTIONS), images=pictures)
    with torch.no_grad():
        output = model(**inputs, return_loss=True)
        image_features = model.vision_model(inputs["pixel_values"]).pooler_output.double().numpy()
        text_features = model.text_model(inputs["input_ids"], inputs["attention_mask"]).pooler_output.double().numpy()
    image_rows = image_features @ model.visual_projection.weight.detach().double().numpy().T
    text_rows = text_features @ model.text_projection.weight.detach().double().numpy().T
    image_units = image_rows / np.sqrt((image_rows**2).sum(1, keepdims=True))
    text_units = text_rows / np.sqrt((text_rows**2).sum(1, keepdims=True))
    logits = math.exp(1.5) * image_units @ text_units.T
    mistakes = {
        "logit_scale used without exp": 1.5 * image_units @ text_units.T,
        "no unit norm": math.exp(1.5) * image_rows @ text_rows.T,
        "no temperature": image_units @ text_units.T,
        "transposed": logits.T,
    }
    fails_like(output.logits_per_image, logits, mistakes, "logits_per_image")
    assert torch.equal(output.logits_per_text, output.logits_per_image.T)
    fails_like(output.image_embeds, image_units, {"no unit norm": image_rows}, "image_embeds")
    fails_like(output.text_embeds, text_units, {"no unit norm": text_rows}, "text_embeds")
    assert output.loss.item() == pytest.approx(slow_clip_loss(image_units, text_units, 1.5), abs=1e-5)


def test_features_are_projected_and_embeds_have_unit_norm(make_model, pictures):
    model = make_model()
    inputs = model.processor(text=list(CAPTIONS), images=pictures)
    pixel_values = inputs.pop("pixel_values")
    for features, embeds in (
        (model.get_image_features(pixel_values), model.encode_image(pixel_values)),
        (model.get_text_features(**inputs), model.encode_text(**inputs)),
    ):
        assert features.shape == embeds.shape == (4, 16)
        assert torch.allclose(embeds.norm(dim=1), torch.ones(4), atol=1e-6)
        assert not torch.allclose(features.norm(dim=1), torch.ones(4), atol=1e-2), "features must not be normalised"
        assert torch.allclose(F.cosine_similarity(features, embeds), torch.ones(4), atol=1e-6)


def test_one_side_alone_and_unequal_counts_work_without_a_loss(make_model, pictures):
    model = make_model()
    text, images = model.processor(text=list(CAPTIONS)), model.processor(images=pictures[:2])
    assert model(**text).logits_per_image is None and model(**text).text_embeds.shape == (4, 16)
    assert model(**images).text_embeds is None and model(**images).image_embeds.shape == (2, 16)
    both = model(**text, **images)
    assert both.logits_per_image.shape == (2, 4) and both.logits_per_text.shape == (4, 2) and both.loss is None


def test_forward_refuses_what_it_cannot_do(make_model, pictures):
    model = make_model()
    text, images = model.processor(text=list(CAPTIONS)), model.processor(images=pictures[:2])
    with pytest.raises(ValueError, match="nothing to encode"):
        model()
    with pytest.raises(ValueError, match="return_loss needs both"):
        model(**text, return_loss=True)
    with pytest.raises(ValueError, match=r"\(2, 16\).*\(4, 16\)"):
        model(**text, **images, return_loss=True)


def test_embeds_keep_full_precision_under_autocast(make_model, pictures):
    """Normalised in float32: unit norm to 1e-6, which bfloat16 cannot hold."""
    model = make_model()
    inputs = model.processor(text=list(CAPTIONS), images=pictures)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        embeds = model.encode_image(inputs["pixel_values"])
    assert embeds.dtype == torch.float32
    assert torch.allclose(embeds.norm(dim=1), torch.ones(4), atol=1e-6)


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_locked_tower_stays_in_eval_mode_without_gradients_while_the_rest_learns(make_model, pictures, tower):
    model = make_model(vision="test_resnet", text_dropout=0.5)
    model.lock(tower).train()
    locked, free = (model.vision_model, model.text_model)[:: 1 if tower == "vision" else -1]
    assert not any(weight.requires_grad for weight in locked.parameters()), "an optimiser would decay them"
    assert not any(module.training for module in locked.modules()) and free.training and model.training
    inputs = model.processor(text=list(CAPTIONS), images=pictures)
    model(**inputs, return_loss=True).loss.backward()
    assert all(weight.grad is None for weight in locked.parameters())
    assert any(weight.grad is not None and weight.grad.any() for weight in free.parameters())
    assert model.visual_projection.weight.grad.any() and model.text_projection.weight.grad.any()


def test_lock_refuses_other_towers(make_model):
    with pytest.raises(ValueError, match="unknown tower to lock 'visual'; expected vision, text"):
        make_model().lock("visual")


def test_configurations_survive_json_and_refuse_unknown_fields():
    import json

    config = dualenc.DualEncoderConfig(
        vision=dualenc.VisionConfig("resnet18", {"layers": [1, 1, 1, 1]}, 64),
        text=dualenc.TextConfig(width=32, heads=2),
        logit_bias_init=-3.0,
    )
    assert dualenc.DualEncoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="unknown field of TextConfig 'widht'.*did you mean width"):
        dualenc.DualEncoderConfig.from_dict({"text": {"widht": 3}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 30, "heads": 4}, "text width 30 is not a multiple of 4 heads"),
        ({"family": "gpt2"}, "unknown text family 'gpt2'"),
        ({"pooling": "max"}, "unknown text pooling 'max'; expected cls, mean, pooler"),
        ({"activation": "glu"}, "unknown activation 'glu'"),
    ],
)
def test_text_configurations_that_cannot_be_built_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dualenc.TextConfig(**fields)


def test_embedding_alone_computes_no_more_than_pooling_reads(make_model, pictures):
    """encode_image and encode_text take fewer products than forward, which also returns every token."""
    model = make_model(text_pooling="cls")
    inputs = model.processor(text=CAPTIONS, images=pictures)
    pixel_values, captions = inputs.pop("pixel_values"), inputs
    for alone, whole in (
        (lambda: model.encode_image(pixel_values), lambda: model(pixel_values=pixel_values)),
        (lambda: model.encode_text(**captions), lambda: model(**captions)),
    ):
        products = []
        for way in (alone, whole):
            with FlopCounterMode(display=False) as counter:
                way()
            products.append(counter.get_total_flops())
        assert products[0] < 0.8 * products[1]
