"""Exercise 2, DualEncoder.forward and _normalize: the figure of the paper, with towers that answer as they are told."""

import math

import numpy as np
import pytest
import torch
from conftest import fails_like
from references import FixedTower, slow_clip_loss

import dualenc

pytestmark = pytest.mark.exercise

PIXELS, IDS = torch.zeros(3, 3, 8, 8), torch.zeros(4, 6, dtype=torch.long)


def make_model(dtype=torch.float64, log_scale=1.5):
    """Vision features of width 6, text features of width 5, embeddings of width 4; IDS has a row more than PIXELS."""
    rng = np.random.default_rng(0)
    config = dualenc.DualEncoderConfig(projection_dim=4, logit_scale_init=log_scale)
    torch.manual_seed(0)
    sides = (((3, 6), dualenc.VisionEncoder), ((4, 5), dualenc.TextEncoder))
    towers = [FixedTower(rng.normal(size=size), like) for size, like in sides]
    return dualenc.DualEncoder(config, *towers).to(dtype)


def by_hand(model):
    """Projected rows and unit rows of both sides, one number at a time."""
    sides = (
        (model.vision_model.features, model.visual_projection.weight),
        (model.text_model.features, model.text_projection.weight),
    )
    projected = [
        np.array([[sum(w * x for w, x in zip(out, row)) for out in weight.tolist()] for row in features.tolist()])
        for features, weight in sides
    ]
    return projected, [np.array([row / math.sqrt(sum(row * row)) for row in rows]) for rows in projected]


def test_exercise_2_logits_are_exp_of_the_scale_times_cosines():
    model = make_model()
    (image_rows, text_rows), (image_units, text_units) = by_hand(model)
    output = model(IDS, PIXELS)
    for got, right, rows, name in (
        (output.image_embeds, image_units, image_rows, "image_embeds"),
        (output.text_embeds, text_units, text_rows, "text_embeds"),
    ):
        mistakes = {
            "no unit norm": rows,
            "normalised over the batch, not over each row": rows / np.sqrt((rows**2).sum(0)),
            "sums of 1": rows / np.abs(rows).sum(1, keepdims=True),
            "divided by the square of the norm": rows / (rows**2).sum(1, keepdims=True),
            "the first token of last_hidden_state, not pooler_output": -right,
        }
        fails_like(got.detach(), right, mistakes, name, 1e-6)
    right = math.exp(1.5) * image_units @ text_units.T
    mistakes = {
        "logit_scale used without exp": 1.5 * image_units @ text_units.T,
        "divided by exp(logit_scale), not multiplied": math.exp(-1.5) * image_units @ text_units.T,
        "no temperature": image_units @ text_units.T,
        "no unit norm": math.exp(1.5) * image_rows @ text_rows.T,
        "transposed": right.T,
    }
    fails_like(output.logits_per_image.detach(), right, mistakes, "logits_per_image", 1e-6)
    mistakes = {"not transposed": right, "no temperature": text_units @ image_units.T}
    fails_like(output.logits_per_text.detach(), right.T, mistakes, "logits_per_text", 1e-6)


def stand_in_loss(image_embeds, text_embeds, logit_scale):
    inputs = image_embeds, text_embeds, logit_scale
    return torch.tensor(slow_clip_loss(*(tensor.detach().numpy() for tensor in inputs)), dtype=torch.float64)


def test_exercise_2_the_loss_comes_when_asked_for(monkeypatch):
    """clip_loss is an exercise of its own: here a slow one stands in for it."""
    monkeypatch.setattr(dualenc, "clip_loss", stand_in_loss)
    model = make_model()
    assert model(IDS[:3], PIXELS).loss is None, "no loss unless return_loss"
    _, (image_units, text_units) = by_hand(model)
    right = slow_clip_loss(image_units, text_units[:3], 1.5)
    mistakes = {
        "clip_loss takes the logarithm: exp was taken twice": slow_clip_loss(image_units, text_units[:3], math.exp(1.5))
    }
    fails_like(model(IDS[:3], PIXELS, return_loss=True).loss.detach(), right, mistakes, "loss", 1e-6)
    for alone in ({"input_ids": IDS}, {"pixel_values": PIXELS}):
        with pytest.raises(ValueError):
            model(**alone, return_loss=True)


def test_exercise_2_one_side_alone_leaves_the_other_out():
    model = make_model()
    text, images = model(input_ids=IDS), model(pixel_values=PIXELS)
    for output, given, missing in ((text, "text", "image"), (images, "image", "text")):
        assert getattr(output, f"{given}_embeds") is not None and getattr(output, f"{missing}_embeds") is None
        assert output.logits_per_image is None and output.logits_per_text is None and output.loss is None
    assert text.vision_model_output is None and images.text_model_output is None
    assert torch.equal(text.text_model_output.pooler_output, model.text_model.features), "what the tower returned"
    assert torch.equal(images.vision_model_output.pooler_output, model.vision_model.features), "what the tower returned"
    with pytest.raises(ValueError):
        model()


def test_exercise_2_towers_get_what_they_need():
    model = make_model()
    mask, types, positions = IDS + 1, IDS + 2, IDS + 3
    model(IDS, PIXELS, mask, types, positions, output_hidden_states=True, output_attentions=True)
    expected = {"input_ids": IDS, "attention_mask": mask, "token_type_ids": types, "position_ids": positions}
    for name, value in expected.items():
        assert model.text_model.got[name] is value, f"the text tower did not get {name}, or in another place"
    assert model.vision_model.got["pixel_values"] is PIXELS
    for tower in (model.vision_model, model.text_model):
        for name in ("output_hidden_states", "output_attentions"):
            assert tower.got[name] is True, f"{name} did not reach a tower"
        assert tower.calls == 1, f"a tower ran {tower.calls} times"


def test_exercise_2_embeds_keep_full_precision_under_autocast():
    """Projections give bfloat16 there, whose unit norms are right to two or three digits only."""
    model = make_model(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        embeds = model(pixel_values=PIXELS).image_embeds
    assert embeds.dtype == torch.float32, f"image_embeds are {embeds.dtype} under autocast: back to float32 first"
    norms = embeds.detach().norm(dim=1)
    assert torch.allclose(norms, torch.ones(3), atol=1e-6), "normalised in bfloat16: back to float32 before the norm"


def test_exercise_2_a_row_of_zeros_does_not_become_nan():
    model = make_model()
    with torch.no_grad():
        model.vision_model.features.zero_()
    embeds = model(pixel_values=PIXELS).image_embeds
    assert not embeds.isnan().any(), "0 / 0: keep the norm that rows are divided by above 0"
    assert torch.equal(embeds, torch.zeros(3, 4).double())


def test_exercise_2_gradients_reach_everything_that_learns():
    model = make_model()
    model(IDS, PIXELS).logits_per_image.square().sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.any(), f"no gradient reaches {name}"


def test_exercise_2_the_norm_is_part_of_the_gradient():
    """The length of a row changes nothing, so the gradient of the row stands at right angles to it."""
    rows = torch.tensor(np.random.default_rng(1).normal(size=(3, 4)), requires_grad=True)
    (make_model()._normalize(rows) * torch.arange(12.0).view(3, 4)).sum().backward()
    assert (rows.grad * rows).sum(dim=1).abs().max() < 1e-5, "the norm was detached"


@pytest.mark.parametrize("name", ["vision", "text"])
def test_exercise_2_a_locked_tower_runs_without_a_graph(name):
    model = make_model()
    model.locked.add(name)
    model(IDS, PIXELS).logits_per_image.square().sum().backward()
    gradients = {"vision": model.vision_model.features.grad, "text": model.text_model.features.grad}
    assert gradients.pop(name) is None, "a locked tower got gradients: run towers by _run_tower"
    heads = model.visual_projection.weight.grad, model.text_projection.weight.grad
    assert all(gradient is not None for gradient in (*gradients.values(), *heads)), "more than the tower was locked"
