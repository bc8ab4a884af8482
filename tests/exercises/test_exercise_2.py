"""Exercise 2, DualEncoder.forward and _normalize, with towers that return fixed features."""

import math

import numpy as np
import pytest
import torch
from support import FixedTower, fails_like, slow_clip_loss

import dualenc

PIXELS, IDS = torch.zeros(3, 3, 8, 8), torch.zeros(4, 6, dtype=torch.long)  # 3 images, 4 captions


def make_model(dtype=torch.float64, log_scale=1.5):
    """Vision features of width 6, text features of width 5, embeddings of width 4."""
    rng = np.random.default_rng(0)
    config = dualenc.DualEncoderConfig(projection_dim=4, logit_scale_init=log_scale)
    torch.manual_seed(0)
    sides = (((3, 6), dualenc.VisionEncoder), ((4, 5), dualenc.TextEncoder))
    towers = [FixedTower(rng.normal(size=size), like) for size, like in sides]
    return dualenc.DualEncoder(config, *towers).to(dtype)


def by_hand(model):
    """Projected rows of both sides, and the same at unit norm, one number at a time."""
    towers = model.vision_model, model.text_model
    for tower, projection in zip(towers, (model.visual_projection, model.text_projection)):
        rows = [
            [sum(w * x for w, x in zip(out, row)) for out in projection.weight.tolist()]
            for row in tower.features.tolist()
        ]
        yield np.array(rows), np.array([row / math.sqrt(row @ row) for row in np.array(rows)])


def test_exercise_2_logits_are_exp_of_the_scale_times_cosines():
    model = make_model()
    (image_rows, images), (text_rows, texts) = by_hand(model)
    output = model(IDS, PIXELS)
    sides = ("image_embeds", images, image_rows), ("text_embeds", texts, text_rows)
    for name, right, rows in sides:
        mistakes = {
            "no unit norm": rows,
            "normalised over the batch, not over each row": rows / np.sqrt((rows**2).sum(0)),
            "divided by the square of the norm": rows / (rows**2).sum(1, keepdims=True),
            "the first token of last_hidden_state, not pooler_output": -right,
        }
        fails_like(getattr(output, name).detach(), right, mistakes, name, 1e-6)
    right = math.exp(1.5) * images @ texts.T
    mistakes = {
        "logit_scale used without exp": 1.5 * images @ texts.T,
        "divided by exp(logit_scale), not multiplied": math.exp(-1.5) * images @ texts.T,
        "no temperature": images @ texts.T,
        "transposed": right.T,
    }
    fails_like(output.logits_per_image.detach(), right, mistakes, "logits_per_image", 1e-6)
    mistakes = {"not transposed": right}
    fails_like(output.logits_per_text.detach(), right.T, mistakes, "logits_per_text", 1e-6)


def test_exercise_2_the_loss_comes_when_asked_for(monkeypatch):
    """clip_loss is an exercise of its own: here a slow one stands in for it."""

    def slow_loss(*inputs):
        return torch.tensor(slow_clip_loss(*(tensor.detach().numpy() for tensor in inputs)))

    monkeypatch.setattr(dualenc, "clip_loss", slow_loss)
    model = make_model()
    assert model(IDS[:3], PIXELS).loss is None, "no loss unless return_loss"
    (_, images), (_, texts) = by_hand(model)
    twice = slow_clip_loss(images, texts[:3], math.exp(1.5))
    mistakes = {"clip_loss takes the logarithm: exp was taken twice": twice}
    loss = model(IDS[:3], PIXELS, return_loss=True).loss
    fails_like(loss.detach(), slow_clip_loss(images, texts[:3], 1.5), mistakes, "loss", 1e-6)
    with pytest.raises(ValueError):
        model(IDS, return_loss=True)
    with pytest.raises(ValueError):
        model()


def test_exercise_2_one_side_alone_leaves_the_other_out():
    model = make_model()
    text, images = model(input_ids=IDS), model(pixel_values=PIXELS)
    assert text.image_embeds is text.logits_per_image is text.vision_model_output is None
    assert images.text_embeds is images.logits_per_text is images.text_model_output is None
    assert torch.equal(text.text_model_output.pooler_output, model.text_model.features)
    assert torch.equal(images.vision_model_output.pooler_output, model.vision_model.features)


def test_exercise_2_towers_get_what_they_need_and_learn():
    model = make_model()
    inputs = {"input_ids": IDS, "attention_mask": IDS + 1}
    inputs |= {"token_type_ids": IDS + 2, "position_ids": IDS + 3}
    output = model(**inputs, pixel_values=PIXELS, output_hidden_states=True, output_attentions=True)
    for name, value in inputs.items():
        assert model.text_model.got[name] is value, f"the text tower did not get {name}"
    for tower in (model.vision_model, model.text_model):
        assert tower.got["output_hidden_states"] is tower.got["output_attentions"] is True
        assert tower.calls == 1, f"a tower ran {tower.calls} times"
    output.logits_per_image.square().sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.any(), f"no gradient reaches {name}"


def test_exercise_2_the_norm_is_exact_and_has_a_gradient():
    """Under autocast projections are bfloat16, with two or three digits."""
    model = make_model(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        embeds = model(pixel_values=PIXELS).image_embeds.detach()
    assert embeds.dtype == torch.float32, f"embeds are {embeds.dtype}: back to float32 first"
    assert torch.allclose(embeds.norm(dim=1), torch.ones(3), atol=1e-6), "back to float32 first"
    zeros = model._normalize(torch.zeros(3, 4))
    assert not zeros.isnan().any(), "0 / 0: keep the norm that rows are divided by above 0"
    rows = torch.tensor(np.random.default_rng(1).normal(size=(3, 4)), requires_grad=True)
    (make_model()._normalize(rows) * torch.arange(12.0).view(3, 4)).sum().backward()
    # The length of a row changes nothing, so the gradient stands at right angles to the row.
    assert (rows.grad * rows).sum(dim=1).abs().max() < 1e-5, "the norm was detached"
