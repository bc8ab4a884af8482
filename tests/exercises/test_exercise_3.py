"""Exercise 3, masked_attention: one query at a time, in loops."""

import math

import numpy as np
import pytest
import torch
from support import fails_like

import dualenc

# Three captions of five tokens: padding on the right, on the left, on both sides.
IS_REAL = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 1, 1, 1, 0]], bool)
EVERYWHERE, MASK = np.ones_like(IS_REAL), torch.tensor(IS_REAL)[:, None, None, :]
ARRAYS = np.random.default_rng(0).normal(size=(3, 3, 2, 5, 4))  # query, key and value
both_ways = pytest.mark.parametrize("return_weights", [False, True])


def slow_attention(query, key, value, is_real, scale=None, bias=None):
    """(mixed values, weights): each query asks the keys that it may see."""
    (B, H, T, D), weights = query.shape, np.zeros((*query.shape[:3], query.shape[2]))
    for b, h, t in np.ndindex(B, H, T):
        seen = [s for s in range(T) if is_real[b, s]]
        scores = [query[b, h, t] @ key[b, h, s] * (scale or 1 / math.sqrt(D)) for s in seen]
        if bias is not None:
            scores = [score + bias[b, h, t, s] for score, s in zip(scores, seen)]
        total = sum(math.exp(score) for score in scores)
        for s, score in zip(seen, scores):
            weights[b, h, t, s] = math.exp(score) / total
    return weights @ value, weights


def as_tensors(dtype=None):
    return [torch.tensor(array, dtype=dtype) for array in ARRAYS]


def mistaken(query, key, value):
    """What well-known mistakes make of the mixed values."""
    full = slow_attention(query, key, value, EVERYWHERE)[1]
    real = IS_REAL[:, None, None, :]
    scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
    inverted = np.exp(scores) * ~real
    scales = {
        "scores are not divided by the root of the head size": 1.0,
        "divided by the head size, not by its root": 1 / query.shape[-1],
        "divided by the root of the whole width": 8**-0.5,
        "divided by the root of the number of heads": 2**-0.5,
    }
    return {
        "the mask is not used": full @ value,
        "inverted mask": inverted / inverted.sum(-1, keepdims=True) @ value,
        "no softmax": np.where(real, scores, 0) @ value,
        "weights set to 0 after the softmax, no longer adding up to 1": full * real @ value,
        **{n: slow_attention(query, key, value, IS_REAL, scale)[0] for n, scale in scales.items()},
    }


@both_ways
def test_exercise_3_padding_gets_no_weight_and_inputs_stay(return_weights):
    right, right_weights = slow_attention(*ARRAYS, IS_REAL)
    given = [*as_tensors(), MASK.clone()]
    got, weights = dualenc.masked_attention(*given, 0.0, return_weights)
    for name, old, now in zip(("query", "key", "value", "mask"), (*as_tensors(), MASK), given):
        assert torch.equal(old, now), f"{name} was changed in place"
    fails_like(got, right, mistaken(*ARRAYS), "the mixed values", 1e-10)
    if not return_weights:
        assert weights is None, "weights only on request"
        return
    assert weights is not None, "weights were asked for"
    fails_like(weights, right_weights, {}, "the weights", 1e-10)
    assert (weights[~MASK.expand_as(weights)] == 0).all(), "exactly 0 on padding"


def test_exercise_3_without_a_mask_every_token_is_seen():
    query, key, value = ARRAYS
    right, right_weights = slow_attention(query, key, value, EVERYWHERE)
    got, weights = dualenc.masked_attention(*as_tensors(), return_weights=True)
    scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
    over_queries = np.exp(scores) / np.exp(scores).sum(-2, keepdims=True)
    mistakes = {"softmax over the wrong axis": over_queries @ value, "no softmax": scores @ value}
    fails_like(got, right, mistakes, "the mixed values without a mask", 1e-10)
    mistakes = {"scores, before the softmax": scores}
    fails_like(weights, right_weights, mistakes, "the weights without a mask", 1e-10)


@both_ways
def test_exercise_3_a_mask_of_numbers_is_added_and_may_learn(return_weights):
    numbers = np.random.default_rng(1).normal(size=(3, 2, 5, 5))
    right, _ = slow_attention(*ARRAYS, IS_REAL, bias=numbers)
    bias = torch.tensor(np.where(IS_REAL[:, None, None], numbers, -1e30), requires_grad=True)
    got, _ = dualenc.masked_attention(*as_tensors(), bias, 0.0, return_weights)
    mistakes = {
        "numbers used as yes and no": slow_attention(*ARRAYS, EVERYWHERE)[0],
        "the numbers subtracted, not added": slow_attention(*ARRAYS, IS_REAL, bias=-numbers)[0],
        "only whether a key may be seen is used": slow_attention(*ARRAYS, IS_REAL)[0],
    }
    fails_like(got.detach(), right, mistakes, "the mixed values under a float mask", 1e-10)
    assert got.requires_grad, "no gradient reaches the mask's numbers: were they detached?"
    got.square().sum().backward()
    assert bias.grad.any(), "the gradient of the mask's numbers is 0"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_exercise_3_types_stay_and_large_scores_do_not_overflow(dtype):
    right, _ = slow_attention(*ARRAYS, IS_REAL)
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
    for learns in (False, True):
        query, key, value = (tensor.requires_grad_(learns) for tensor in as_tensors(dtype))
        got, _ = dualenc.masked_attention(query, key, value, MASK)
        assert got.dtype == dtype and got.requires_grad == learns, f"{dtype} gives {got.dtype}"
        fails_like(got.detach(), right, {}, f"the mixed values in {dtype}", tolerance)
    got, weights = dualenc.masked_attention(200 * query, key, value, return_weights=True)
    assert got.isfinite().all(), "exp overflows on large scores: use softmax"


@both_ways
def test_exercise_3_dropout_drops_a_share_and_rescales_the_rest(return_weights):
    """Equal weights of 1/16, seen through values that are an identity; a quarter is dropped."""
    torch.manual_seed(0)
    query, value = torch.zeros(8, 4, 16, 4), torch.eye(16).expand(8, 4, 16, 16)
    got, weights = dualenc.masked_attention(query, query, value, None, 0.25, return_weights)
    share = (got == 0).float().mean().item()
    hint = "the share to keep was taken for the share to drop" if share > 0.5 else ""
    hint = hint or "dropout does nothing" * (share == 0)
    assert 0.2 < share < 0.3, f"dropout of 0.25 dropped {share:.2f} of the weights; {hint}"
    kept = got[got != 0]
    hint = {"the rest of the weights was not rescaled": torch.full_like(kept, 1 / 16)}
    fails_like(kept, torch.full_like(kept, 1 / 12), hint, "a weight that is not dropped", 1e-4)
    if return_weights:
        assert torch.equal(weights, got), "the weights returned are not those after dropout"
