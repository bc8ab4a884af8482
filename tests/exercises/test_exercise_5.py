"""Exercise 5, positions_after_pad: tables written out by hand."""

import pytest
import torch
from support import fails_like

import dualenc


def table(digits):
    return [[int(digit) for digit in row] for row in digits.split()]


# 1 is padding: on the right, on the left, in the middle, nowhere, everywhere.
IDS, POSITIONS = table("58911 11589 51819 58976 11111"), table("23411 11234 21314 23456 11111")


def test_exercise_5_real_tokens_count_up_from_pad_plus_1():
    mistakes = {
        "shifted by one, too low": table("12300 00123 10203 12345 00000"),
        "shifted by one, too high": table("34522 22345 32425 34567 22222"),
        "real tokens start at pad_token_id": table("12311 11123 11213 12345 11111"),
        "columns counted, padding too": table("01234 01234 01234 01234 01234"),
        "columns counted from pad_token_id + 1": table("23456 23456 23456 23456 23456"),
        "padding goes on counting": table("23444 11234 22334 23456 11111"),
        "padding at 0, not at pad_token_id": table("23400 00234 20304 23456 00000"),
        "columns counted, on real tokens": table("23411 11456 21416 23456 11111"),
        "counted down the batch, not along the caption": table("22211 11322 31413 43534 11111"),
        "padding counted, real tokens not": table("11123 23111 12131 11111 23456"),
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
    in_int8 = [[(k + 128) % 256 - 127 for k in range(1, 601)]]
    mistakes = {"counted in int8, which ends at 127": in_int8}
    fails_like(got, [list(range(2, 602))], mistakes, "the positions of 600 tokens", 0)
