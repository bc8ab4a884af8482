"""Exercise 1, clip_loss: value, gradients and edges of the symmetric loss."""

import math

import numpy as np
import pytest
import torch
from conftest import fails_like
from references import slow_clip_loss, slow_gradient, tensors, unit_rows

import dualenc

pytestmark = pytest.mark.exercise


def slow_loss_without_the_pair(images, texts, log_scale):
    """Each pair's score against those of the wrong answers alone, in both directions."""
    scores = math.exp(log_scale) * images @ texts.T
    wrong = np.exp(scores) * (1 - np.eye(len(images)))
    return float(np.mean(np.log(wrong.sum(0)) + np.log(wrong.sum(1))) / 2 - np.diagonal(scores).mean())


def test_exercise_1_the_loss_is_the_mean_cross_entropy_of_both_directions():
    images, texts = unit_rows(5, 8, 0), unit_rows(5, 8, 1)
    n, right = len(images), slow_clip_loss(images, texts, 1.3)
    cosines = images @ texts.T
    pairs = math.exp(1.3) * cosines.trace() / n
    mistakes = {
        "one direction only": slow_clip_loss(images, texts, 1.3, both=False),
        "one direction only, text to image": slow_clip_loss(texts, images, 1.3, both=False),
        "no transpose for the second direction": slow_clip_loss(images, texts, 1.3, transpose=False),
        "logit_scale used without exp": slow_clip_loss(images, texts, 1.3, exp=False),
        "divided by exp(logit_scale), not multiplied": slow_clip_loss(images, texts, -1.3),
        "no temperature": slow_clip_loss(images, texts, 0.0),
        "both directions added, not averaged": 2 * right,
        "sum over the batch, not mean": n * right,
        "the sign is the other way round": -right,
        "the right answer is left out of the denominator": slow_loss_without_the_pair(images, texts, 1.3),
        "a mean over the whole matrix, not over its diagonal": right / n,
        "exp was taken twice": slow_clip_loss(images, texts, math.exp(1.3)),
        "one softmax over the whole matrix, not over each row": math.log(np.exp(math.exp(1.3) * cosines).sum()) - pairs,
    }
    fails_like(dualenc.clip_loss(*tensors(images, texts, 1.3)).detach(), right, mistakes, "clip_loss", 1e-10)


def test_exercise_1_the_gradients_are_those_of_the_definition():
    """Embeddings and logit_scale alike; the temperature learns too."""
    images, texts = unit_rows(4, 3, 2), unit_rows(4, 3, 3)
    inputs = tensors(images, texts, 0.7)
    dualenc.clip_loss(*inputs).backward()
    for name, got, right in zip(
        ("image_embeds", "text_embeds", "logit_scale"), inputs, slow_gradient(slow_clip_loss, [images, texts, 0.7])
    ):
        assert got.grad is not None, f"no gradient reaches {name}: was it detached, or read with .item()?"
        fails_like(got.grad, right, {"no gradient": 0 * right}, f"the gradient of {name}", 1e-7)


def test_exercise_1_the_loss_is_ln_of_the_batch_when_nothing_is_learned_and_0_when_all_is():
    same = torch.ones(7, 4) / 2
    fails_like(dualenc.clip_loss(same, same, torch.tensor(2.0)), math.log(7), {}, "the loss of equal rows", 1e-6)
    apart = torch.eye(7)
    loss = dualenc.clip_loss(apart, apart, torch.tensor(math.log(100.0)))
    assert loss.isfinite(), "exp of a logit of 100 overflows float32: take the log of a softmax in one function"
    fails_like(loss, 0.0, {}, "the loss of perfect rows", 1e-6)


def test_exercise_1_a_pair_that_scores_lowest_costs_what_its_scores_differ_by():
    """Scores of -100 on the diagonal, of 100 beside it: a pair has probability 0 in float32, but a finite logarithm."""
    images = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    loss = dualenc.clip_loss(images, -images.detach(), torch.tensor(math.log(100.0)))
    assert loss.isfinite(), "the logarithm of a softmax that is 0 in float32: take log_softmax or logsumexp"
    fails_like(loss.detach(), 200.0, {}, "the loss of the worst rows", 1e-5)
    loss.backward()
    assert images.grad.isfinite().all(), "the gradient of the worst rows overflows"


def test_exercise_1_any_scale_is_taken_as_it_is():
    images, texts = unit_rows(5, 8, 0), unit_rows(5, 8, 1)
    mistakes = {"clamped: train.py does that, after each step": slow_clip_loss(images, texts, math.log(100))}
    got = dualenc.clip_loss(*tensors(images, texts, 5.0)).detach()
    fails_like(got, slow_clip_loss(images, texts, 5.0), mistakes, "clip_loss at a scale of 148", 1e-10)


def test_exercise_1_everything_is_made_where_the_embeddings_are():
    """On torch's meta device, whose tensors have no numbers: like a GPU, it takes none from the CPU."""
    rows = torch.empty(3, 4, device="meta")
    try:
        assert dualenc.clip_loss(rows, rows, torch.empty((), device="meta")).device.type == "meta"
    except RuntimeError as error:
        pytest.fail(f"it runs on the CPU only: are the labels made with device=...? {error}")


def test_exercise_1_the_loss_sees_which_row_belongs_to_which():
    """Shuffling one side must cost: a loss that pairs rows wrongly cannot tell."""
    apart = torch.eye(6)
    right = dualenc.clip_loss(apart, apart, torch.tensor(2.6592))
    shuffled = dualenc.clip_loss(apart, apart.roll(1, 0), torch.tensor(2.6592))
    assert shuffled > right + 5, "shuffled captions cost nothing: row i of one side must be the answer of row i"


def test_exercise_1_the_loss_is_one_number_of_its_inputs_type():
    for dtype in (torch.float32, torch.float64):
        rows = torch.eye(3, 5, dtype=dtype)
        loss = dualenc.clip_loss(rows, rows, torch.tensor(1.0, dtype=dtype))
        assert loss.shape == (), f"the loss has shape {tuple(loss.shape)}, expected (): a mean over the batch"
        assert loss.dtype == dtype, f"the loss of {dtype} embeddings is {loss.dtype}"
        alone = dualenc.clip_loss(rows[:1], rows[:1], torch.tensor(1.0, dtype=dtype))
        assert alone == 0, "a single pair has no wrong answer: its loss is 0"


def test_exercise_1_sides_of_different_shape_are_refused():
    dualenc.clip_loss(torch.eye(3), torch.eye(3), torch.tensor(0.0))
    for shape in ((2, 4), (3, 5)):
        with pytest.raises(ValueError):
            dualenc.clip_loss(torch.ones(3, 4), torch.ones(shape), torch.tensor(0.0))
