"""Exercise 1, clip_loss: value, gradients and edges of the symmetric loss."""

import math

import numpy as np
import pytest
import torch
from support import fails_like, slow_clip_loss, slow_gradient, tensors, unit_rows

import dualenc


def test_exercise_1_the_loss_is_the_mean_cross_entropy_of_both_directions():
    images, texts = unit_rows(5, 8, 0), unit_rows(5, 8, 1)

    def slow(log_scale=1.3, **how):
        return slow_clip_loss(images, texts, log_scale, **how)

    right, scores = slow(), math.exp(1.3) * images @ texts.T
    mistakes = {
        "one direction only": slow(both=False),
        "no transpose for the second direction": slow(transpose=False),
        "logit_scale used without exp": slow(exp=False),
        "divided by exp(logit_scale), not multiplied": slow(-1.3),
        "no temperature": slow(0.0),
        "exp was taken twice": slow(math.exp(1.3)),
        "both directions added, not averaged": 2 * right,
        "sum over the batch, not mean": 5 * right,
        "the sign is the other way round": -right,
        "a mean over the whole matrix, not over its diagonal": right / 5,
        "one softmax over the whole matrix": np.log(np.exp(scores).sum()) - scores.trace() / 5,
    }
    got = dualenc.clip_loss(*tensors(images, texts, 1.3)).detach()
    fails_like(got, right, mistakes, "clip_loss", 1e-10)
    got = dualenc.clip_loss(*tensors(images, texts, 5.0)).detach()
    mistakes = {"clamped: train.py does that, after each step": slow(math.log(100))}
    fails_like(got, slow(5.0), mistakes, "clip_loss at a scale of 148", 1e-10)


def test_exercise_1_the_gradients_are_those_of_the_definition():
    """Embeddings and logit_scale alike; the temperature learns too."""
    images, texts = unit_rows(4, 3, 2), unit_rows(4, 3, 3)
    inputs = tensors(images, texts, 0.7)
    dualenc.clip_loss(*inputs).backward()
    slow = slow_gradient(slow_clip_loss, [images, texts, 0.7])
    for name, got, right in zip(("image_embeds", "text_embeds", "logit_scale"), inputs, slow):
        assert got.grad is not None, f"no gradient reaches {name}: was it detached, or an .item()?"
        fails_like(got.grad, right, {"no gradient": 0 * right}, f"the gradient of {name}", 1e-7)


def test_exercise_1_extreme_scores_stay_finite_and_exact():
    """ln(B) when nothing is learned, 0 when everything is, 200 when every pair scores lowest."""
    same, apart, scale = torch.ones(7, 4) / 2, torch.eye(7), torch.tensor(math.log(100.0))
    got = dualenc.clip_loss(same, same, torch.tensor(2.0))
    fails_like(got, math.log(7), {}, "the loss of equal rows", 1e-6)
    loss = dualenc.clip_loss(apart, apart, scale)
    assert loss.isfinite(), "exp of a logit of 100 overflows float32: take the log of a softmax"
    fails_like(loss, 0.0, {}, "the loss of perfect rows", 1e-6)
    images = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    loss = dualenc.clip_loss(images, -images.detach(), scale)
    assert loss.isfinite(), "log of a softmax that is 0 in float32: take log_softmax or logsumexp"
    fails_like(loss.detach(), 200.0, {}, "the loss of the worst rows", 1e-5)
    loss.backward()
    assert images.grad.isfinite().all(), "the gradient of the worst rows overflows"


def test_exercise_1_the_loss_is_one_number_of_its_inputs_type_and_device():
    """Also on the meta device, whose tensors have no numbers: like a GPU, it mixes with no CPU."""
    for dtype in (torch.float32, torch.float64):
        rows, scale = torch.eye(3, 5, dtype=dtype), torch.tensor(1.0, dtype=dtype)
        loss = dualenc.clip_loss(rows, rows, scale)
        assert loss.shape == (), f"the loss has shape {tuple(loss.shape)}, expected ()"
        assert loss.dtype == dtype, f"the loss of {dtype} embeddings is {loss.dtype}"
        assert dualenc.clip_loss(rows[:1], rows[:1], scale) == 0, "one pair has no wrong answer"
    rows = torch.empty(3, 4, device="meta")
    try:
        dualenc.clip_loss(rows, rows, rows[0, 0])
    except RuntimeError as error:
        pytest.fail(f"it runs on the CPU only: are the labels made with device=...? {error}")
    for shape in ((2, 4), (3, 5)):
        with pytest.raises(ValueError):  # sides of different shape
            dualenc.clip_loss(torch.ones(3, 4), torch.ones(shape), torch.tensor(0.0))
