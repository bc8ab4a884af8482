"""Exercise 5, positions_after_pad: tables written out by hand."""

import pytest
import torch
from conftest import fails_like

import dualenc

pytestmark = pytest.mark.exercise

# 1 is padding: on the right, on the left, in the middle, nowhere, everywhere.
IDS = [[5, 8, 9, 1, 1], [1, 1, 5, 8, 9], [5, 1, 8, 1, 9], [5, 8, 9, 7, 6], [1, 1, 1, 1, 1]]
POSITIONS = [[2, 3, 4, 1, 1], [1, 1, 2, 3, 4], [2, 1, 3, 1, 4], [2, 3, 4, 5, 6], [1, 1, 1, 1, 1]]


def shifted(by):
    return [[position + by for position in row] for row in POSITIONS]


def test_exercise_5_real_tokens_count_up_from_pad_plus_1():
    mistakes = {
        "shifted by one, too low, or pad_token_id was not added": shifted(-1),
        "shifted by one, too high": shifted(1),
        "real tokens start at pad_token_id, not after it": [[max(p - 1, 1) for p in row] for row in POSITIONS],
        "columns counted, padding too": [[0, 1, 2, 3, 4]] * 5,
        "columns counted from pad_token_id + 1, padding too, or padding is looked for under another id": [
            [2, 3, 4, 5, 6]
        ]
        * 5,
        "padding goes on counting": [[2, 3, 4, 4, 4], [1, 1, 2, 3, 4], [2, 2, 3, 3, 4], POSITIONS[3], POSITIONS[4]],
        "padding at 0, not at pad_token_id": [[2, 3, 4, 0, 0], [0, 0, 2, 3, 4], [2, 0, 3, 0, 4], POSITIONS[3], [0] * 5],
        "columns counted, on real tokens": [[2, 3, 4, 1, 1], [1, 1, 4, 5, 6], [2, 1, 4, 1, 6], POSITIONS[3], [1] * 5],
        "counted down the batch, not along the caption": [
            [2, 2, 2, 1, 1],
            [1, 1, 3, 2, 2],
            [3, 1, 4, 1, 3],
            [4, 3, 5, 3, 4],
            [1, 1, 1, 1, 1],
        ],
        "padding counted, real tokens not": [
            [1, 1, 1, 2, 3],
            [2, 3, 1, 1, 1],
            [1, 2, 1, 3, 1],
            [1, 1, 1, 1, 1],
            [2, 3, 4, 5, 6],
        ],
    }
    got = dualenc.positions_after_pad(torch.tensor(IDS), 1)
    fails_like(got, POSITIONS, mistakes, "positions_after_pad", 0)


def test_exercise_5_any_number_may_mean_padding():
    """With padding 0, real tokens count from 1; with padding 9, from 10."""
    right = {0: [[1, 2, 0, 3]], 9: [[10, 11, 12, 9]]}
    got = dualenc.positions_after_pad(torch.tensor([[4, 9, 0, 3]]), 0)
    fails_like(got, right[0], {"pad_token_id taken to be 1": [[2, 3, 4, 5]]}, "positions after padding 0", 0)
    got = dualenc.positions_after_pad(torch.tensor([[4, 0, 2, 9]]), 9)
    fails_like(got, right[9], {"pad_token_id taken to be 1": [[2, 3, 4, 5]]}, "positions after padding 9", 0)


def test_exercise_5_positions_are_whole_numbers_of_the_same_shape():
    ids = torch.tensor(IDS)
    got = dualenc.positions_after_pad(ids, 1)
    assert got.dtype == torch.int64, f"positions are {got.dtype}: an embedding is looked up by int64"
    assert got.shape == ids.shape and torch.equal(ids, torch.tensor(IDS)), "the ids themselves must stay as they were"
    assert dualenc.positions_after_pad(ids[:, :0], 1).shape == (5, 0), "no tokens, no positions"


def test_exercise_5_long_captions_are_counted_to_the_end():
    got = dualenc.positions_after_pad(torch.full((1, 600), 7), 1)
    mistakes = {"counted in int8, which ends at 127": [[(k + 128) % 256 - 127 for k in range(1, 601)]]}
    fails_like(got, [list(range(2, 602))], mistakes, "the positions of 600 tokens", 0)


def test_exercise_5_a_caption_counts_the_same_alone_and_in_a_batch():
    batch = dualenc.positions_after_pad(torch.tensor(IDS), 1)
    for row, ids in enumerate(IDS):
        alone = dualenc.positions_after_pad(torch.tensor([ids]), 1)[0]
        fails_like(batch[row], alone, {}, f"row {row} in a batch, against alone,", 0)
