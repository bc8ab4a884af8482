"""Exercise 4, masked_mean."""

import numpy as np
import torch
from support import fails_like

import dualenc

HIDDEN = np.random.default_rng(0).normal(size=(3, 4, 5))
MASK = np.array([[1, 1, 0, 0], [0, 1, 1, 1], [0, 1, 0, 0]])  # padding right, left, on both sides


def slow_mean():
    rows = [[token for token, real in zip(*row) if real] for row in zip(HIDDEN, MASK)]
    return np.stack([sum(row) / len(row) for row in rows])


def test_exercise_4_padding_does_not_count():
    weighted, counts = HIDDEN * MASK[:, :, None], MASK.sum(1)[:, None]
    unmasked = 1 - MASK[:, :, None]
    first_ones = [row[:n].mean(0) for row, n in zip(HIDDEN, MASK.sum(1))]
    mistakes = {
        "mean over padding too": HIDDEN.mean(1),
        "padding left out of the sum, but counted in the number": weighted.mean(1),
        "sum, not mean": weighted.sum(1),
        "divided by the real tokens of the whole batch": weighted.sum(1) / MASK.sum(),
        "first token, not mean": HIDDEN[:, 0],
        "padding in the sum, real tokens counted": HIDDEN.sum(1) / counts,
        "padding taken to be on the right": np.stack(first_ones),
        "inverted mask": (HIDDEN * unmasked).sum(1) / unmasked.sum(1),
        "all captions together": np.tile(weighted.sum((0, 1)) / MASK.sum(), (3, 1)),
        "mean over the wrong axis": weighted.sum(2) / counts,
    }
    hidden, mask = torch.tensor(HIDDEN), torch.tensor(MASK)
    fails_like(dualenc.masked_mean(hidden, mask), slow_mean(), mistakes, "masked_mean", 1e-12)
    is_same = torch.equal(hidden, torch.tensor(HIDDEN)) and torch.equal(mask, torch.tensor(MASK))
    assert is_same, "inputs were changed"
    got, mistakes = dualenc.masked_mean(hidden), {"sum, not mean": HIDDEN.sum(1)}
    fails_like(got, sum(HIDDEN.swapaxes(0, 1)) / 4, mistakes, "masked_mean without a mask", 1e-12)
    got, one = dualenc.masked_mean(hidden[:1], mask[:1]), slow_mean()[:1]
    mistakes = {"the axis of the batch is gone": one[0]}
    fails_like(got, one, mistakes, "the mean of one caption", 1e-12)


def test_exercise_4_the_result_has_the_type_of_the_hidden_states():
    """Masks are whole numbers or bools; the mean of bfloat16 rows stays bfloat16."""
    for dtype, tolerance in ((torch.bfloat16, 3e-2), (torch.float32, 1e-6)):
        for mask_type in (torch.int64, torch.bool, torch.float32):
            mask = torch.tensor(MASK).to(mask_type)
            got = dualenc.masked_mean(torch.tensor(HIDDEN, dtype=dtype), mask)
            assert got.dtype == dtype, f"{dtype} hidden states, {mask_type} mask give {got.dtype}"
            fails_like(got, slow_mean(), {}, f"masked_mean, {mask_type} mask", tolerance)


def test_exercise_4_each_real_token_gets_its_share_of_the_gradient():
    hidden = torch.tensor(HIDDEN, requires_grad=True)
    dualenc.masked_mean(hidden, torch.tensor(MASK)).sum().backward()
    right = np.array([[0.5, 0.5, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3], [0, 1, 0, 0]])
    mistakes = {"padding gets a share": np.full((3, 4), 0.25), "the sum's gradient": MASK}
    fails_like(hidden.grad[:, :, 0], right, mistakes, "the gradient of hidden", 1e-12)
