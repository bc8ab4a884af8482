"""Exercise 3, masked_attention: one query at a time, in loops."""

import math

import numpy as np
import pytest
import torch
from conftest import fails_like
from references import slow_gradient

import dualenc

pytestmark = pytest.mark.exercise

# Three captions of five tokens: padding on the right, on the left, on both sides.
IS_REAL = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 1, 1, 1, 0]], bool)


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


def inputs(B=3, H=2, T=5, D=4):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(B, H, T, D)) for _ in range(3)]


def mistaken(query, key, value):
    """What well-known mistakes make of the mixed values."""
    everywhere = np.ones_like(IS_REAL)
    full = slow_attention(query, key, value, everywhere)[1]
    real = IS_REAL[:, None, None, :]
    scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
    masked = np.where(real, scores, -1e30)
    inverted = np.where(~real, scores, -1e30)
    inverted = np.exp(inverted - inverted.max(-1, keepdims=True))
    plus_one = np.exp(scores + real)
    return {
        "the mask is not used": full @ value,
        "inverted mask": inverted / inverted.sum(-1, keepdims=True) @ value,
        "scores are not divided by the root of the head size": slow_attention(query, key, value, IS_REAL, 1.0)[0],
        "divided by the head size, not by its root": slow_attention(query, key, value, IS_REAL, 1 / query.shape[-1])[0],
        "divided by the root of the whole width": slow_attention(query, key, value, IS_REAL, 8**-0.5)[0],
        "divided by the root of the number of heads": slow_attention(query, key, value, IS_REAL, 2**-0.5)[0],
        "divided by the root of the number of tokens": slow_attention(query, key, value, IS_REAL, 5**-0.5)[0],
        "key and value exchanged": slow_attention(query, value, key, IS_REAL)[0],
        "no softmax": np.where(masked > -1e29, scores, 0) @ value,
        "weights set to 0 after the softmax, no longer adding up to 1": full * real @ value,
        "the mask added as 1 and 0": plus_one / plus_one.sum(-1, keepdims=True) @ value,
    }


@pytest.mark.parametrize("return_weights", [False, True])
def test_exercise_3_padding_gets_no_weight(return_weights):
    query, key, value = inputs()
    right, right_weights = slow_attention(query, key, value, IS_REAL)
    mask = torch.tensor(IS_REAL)[:, None, None, :]
    got, weights = dualenc.masked_attention(*map(torch.tensor, (query, key, value)), mask, 0.0, return_weights)
    fails_like(got, right, mistaken(query, key, value), "the mixed values", 1e-10)
    if not return_weights:
        assert weights is None, "weights only on request"
        return
    assert weights is not None, "weights were asked for"
    fails_like(weights, right_weights, {}, "the weights", 1e-10)
    assert (weights.numpy()[~np.broadcast_to(IS_REAL[:, None, None], weights.shape)] == 0).all(), "exactly 0 on padding"


def test_exercise_3_without_a_mask_every_token_is_seen():
    query, key, value = inputs()
    right, right_weights = slow_attention(query, key, value, np.ones_like(IS_REAL))
    got, weights = dualenc.masked_attention(*map(torch.tensor, (query, key, value)), return_weights=True)
    scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
    over_queries = np.exp(scores) / np.exp(scores).sum(-2, keepdims=True)
    mistakes = {"softmax over the wrong axis": over_queries @ value, "no softmax": scores @ value}
    fails_like(got, right, mistakes, "the mixed values without a mask", 1e-10)
    fails_like(weights, right_weights, {"scores, before the softmax": scores}, "the weights without a mask", 1e-10)


def test_exercise_3_one_query_may_ask_all_keys():
    """As the last layer does where only the first token is read."""
    query, key, value = inputs()
    right, _ = slow_attention(query, key, value, IS_REAL)
    mask = torch.tensor(IS_REAL)[:, None, None, :]
    got, _ = dualenc.masked_attention(torch.tensor(query[:, :, :1]), torch.tensor(key), torch.tensor(value), mask)
    fails_like(got, right[:, :, :1], {}, "the mixed values of the first query", 1e-10)


@pytest.mark.parametrize("return_weights", [False, True])
def test_exercise_3_a_mask_of_numbers_is_added_to_the_scores(return_weights):
    query, key, value = inputs()
    bias = np.random.default_rng(1).normal(size=(3, 2, 5, 5))
    right, _ = slow_attention(query, key, value, IS_REAL, bias=bias)
    mask = torch.tensor(np.where(IS_REAL[:, None, None], bias, np.finfo(float).min))
    got, _ = dualenc.masked_attention(*map(torch.tensor, (query, key, value)), mask, 0.0, return_weights)
    mistakes = {
        "numbers used as yes and no": slow_attention(query, key, value, np.ones_like(IS_REAL))[0],
        "the numbers divided by the root of the head size, too": slow_attention(
            query, key, value, IS_REAL, bias=bias / math.sqrt(query.shape[-1])
        )[0],
        "the numbers subtracted, not added": slow_attention(query, key, value, IS_REAL, bias=-bias)[0],
        "only whether a key may be seen is used, not the number": slow_attention(query, key, value, IS_REAL)[0],
    }
    fails_like(got, right, mistakes, "the mixed values under a mask of numbers", 1e-10)


def test_exercise_3_numbers_in_the_mask_may_be_learned():
    query, key, value = map(torch.tensor, inputs())
    bias = torch.zeros(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    got, _ = dualenc.masked_attention(query, key, value, bias)
    assert got.requires_grad, "no gradient reaches the mask's numbers: were they detached?"
    got.square().sum().backward()
    assert bias.grad.any(), "the gradient of the mask's numbers is 0"


@pytest.mark.parametrize("return_weights", [False, True])
def test_exercise_3_the_inputs_are_left_as_they_were(return_weights):
    given = [*map(torch.tensor, inputs()), torch.tensor(IS_REAL)[:, None, None, :]]
    before = [tensor.clone() for tensor in given]
    dualenc.masked_attention(*given, 0.0, return_weights)
    for name, old, now in zip(("query", "key", "value", "mask"), before, given):
        assert torch.equal(old, now), f"{name} was changed in place"


def test_exercise_3_the_gradients_are_those_of_the_definition():
    arrays = inputs(B=1, T=5, D=2)
    query, key, value = (torch.tensor(array, requires_grad=True) for array in arrays)
    mix = np.random.default_rng(2).normal(size=arrays[0].shape)
    got, _ = dualenc.masked_attention(query, key, value, torch.tensor(IS_REAL[:1])[:, None, None, :])
    (got * torch.tensor(mix)).sum().backward()
    slow = slow_gradient(lambda q, k, v: float((slow_attention(q, k, v, IS_REAL[:1])[0] * mix).sum()), arrays)
    for name, tensor, right in zip(("query", "key", "value"), (query, key, value), slow):
        assert tensor.grad is not None, f"no gradient reaches {name}: was it detached?"
        fails_like(tensor.grad, right, {"no gradient": 0 * right}, f"the gradient of {name}", 1e-7)


def test_exercise_3_the_result_has_the_type_of_its_inputs():
    for dtype in (torch.bfloat16, torch.float32):
        for learns in (False, True):
            query, key, value = (torch.tensor(array, dtype=dtype, requires_grad=learns) for array in inputs())
            mask = torch.tensor(IS_REAL)[:, None, None, :]
            got, _ = dualenc.masked_attention(query, key, value, mask)
            assert got.dtype == dtype, f"attention over {dtype} gives {got.dtype}"
            right, _ = slow_attention(*inputs(), IS_REAL)
            fails_like(
                got.detach(), right, {}, f"the mixed values in {dtype}", 5e-2 if dtype == torch.bfloat16 else 1e-5
            )


def test_exercise_3_large_scores_do_not_overflow():
    query, key, value = (torch.tensor(array, dtype=torch.float32) for array in inputs())
    got, weights = dualenc.masked_attention(200 * query, key, value, return_weights=True)
    assert got.isfinite().all(), "exp overflows on large scores: take off the largest first, as softmax does"
    assert torch.allclose(weights.sum(-1), torch.ones(3, 2, 5))


def test_exercise_3_dropout_drops_weights_and_rescales_the_rest():
    query, key, value = (torch.tensor(array) for array in inputs())
    plain, plain_weights = dualenc.masked_attention(query, key, value, return_weights=True)
    torch.manual_seed(0)
    got, weights = dualenc.masked_attention(query, key, value, dropout=0.5, return_weights=True)
    assert not torch.allclose(got, plain), "dropout does nothing"
    assert not torch.equal(weights, plain_weights), "the weights that are returned are those before dropout"
    dropped = weights == 0
    assert 0.2 < dropped.double().mean() < 0.8 and torch.allclose(weights[~dropped], 2 * plain_weights[~dropped]), (
        "half of the weights are dropped and the other half doubled, after the softmax"
    )
    assert torch.allclose(weights @ value, got), "the weights that are returned are not those that were used"


@pytest.mark.parametrize("return_weights", [False, True])
def test_exercise_3_dropout_is_the_share_that_is_dropped(return_weights):
    """A quarter goes and the rest grows by 4/3: equal weights, seen through values that are an identity."""
    torch.manual_seed(0)
    query = torch.zeros(8, 4, 16, 4)
    got, _ = dualenc.masked_attention(query, query, torch.eye(16).expand(8, 4, 16, 16), None, 0.25, return_weights)
    dropped = got == 0
    share = dropped.float().mean().item()
    hint = "the share to keep was taken for the share to drop" if share > 0.5 else "dropout does nothing" * (share == 0)
    assert 0.2 < share < 0.3, f"dropout of 0.25 dropped {share:.2f} of the weights; {hint}"
    fails_like(got[~dropped].mean(), 1 / 16 / 0.75, {}, "a weight that is not dropped", 1e-4)
