"""Exercise 5, positions_after_pad: tables written out by hand."""

import pytest
import torch
from support import fails_like

import dualenc

pytestmark = pytest.mark.exercise

# 1 is padding: on the right, on the left, in the middle, nowhere, everywhere.
IDS = [[5, 8, 9, 1, 1], [1, 1, 5, 8, 9], [5, 1, 8, 1, 9], [5, 8, 9, 7, 6], [1] * 5]
POSITIONS = [[2, 3, 4, 1, 1], [1, 1, 2, 3, 4], [2, 1, 3, 1, 4], [2, 3, 4, 5, 6], [1] * 5]


def shifted(by):
    return [[position + by for position in row] for row in POSITIONS]


def test_exercise_5_real_tokens_count_up_from_pad_plus_1():
    full = POSITIONS[3]
    mistakes = {
        "shifted by one, too low, or pad_token_id was not added": shifted(-1),
        "shifted by one, too high": shifted(1),
        "real tokens start at pad_token_id": [[max(p - 1, 1) for p in row] for row in POSITIONS],
        "columns counted, padding too": [[0, 1, 2, 3, 4]] * 5,
        "columns counted from pad_token_id + 1, padding too": [full] * 5,
        "padding goes on counting": [
            [2, 3, 4, 4, 4],
            [1, 1, 2, 3, 4],
            [2, 2, 3, 3, 4],
            full,
            [1] * 5,
        ],
        "padding at 0, not at pad_token_id": [
            [p * (p > 1) for p in row] if 1 in row else row for row in POSITIONS
        ],
        "columns counted, on real tokens": [
            [full[k] if p > 1 else 1 for k, p in enumerate(row)] for row in POSITIONS
        ],
        "counted down the batch, not along the caption": [
            [2, 2, 2, 1, 1],
            [1, 1, 3, 2, 2],
            [3, 1, 4, 1, 3],
            [4, 3, 5, 3, 4],
            [1] * 5,
        ],
        "padding counted, real tokens not": [
            [1, 1, 1, 2, 3],
            [2, 3, 1, 1, 1],
            [1, 2, 1, 3, 1],
            [1] * 5,
            full,
        ],
    }
    got = dualenc.positions_after_pad(torch.tensor(IDS), 1)
    fails_like(got, POSITIONS, mistakes, "positions_after_pad", 0)


@pytest.mark.parametrize(
    ("pad", "ids", "right"), [(0, [4, 9, 0, 3], [1, 2, 0, 3]), (9, [4, 0, 2, 9], [10, 11, 12, 9])]
)
def test_exercise_5_any_number_may_mean_padding(pad, ids, right):
    got = dualenc.positions_after_pad(torch.tensor([ids]), pad)
    mistakes = {"pad_token_id taken to be 1": [[2, 3, 4, 5]]}
    fails_like(got, [right], mistakes, f"positions after padding {pad}", 0)


def test_exercise_5_positions_are_whole_numbers_of_the_same_shape():
    ids = torch.tensor(IDS)
    got = dualenc.positions_after_pad(ids, 1)
    assert got.dtype == torch.int64, f"positions are {got.dtype}: an embedding wants int64"
    assert got.shape == ids.shape and torch.equal(ids, torch.tensor(IDS)), "the ids were changed"
    assert dualenc.positions_after_pad(ids[:, :0], 1).shape == (5, 0), "no tokens, no positions"


def test_exercise_5_long_captions_are_counted_to_the_end():
    got = dualenc.positions_after_pad(torch.full((1, 600), 7), 1)
    mistakes = {
        "counted in int8, which ends at 127": [[(k + 128) % 256 - 127 for k in range(1, 601)]]
    }
    fails_like(got, [list(range(2, 602))], mistakes, "the positions of 600 tokens", 0)
