"""Exercise 7, ranks. Images are rows of scores and captions an identity: scores are seen."""

import math

import pytest
import torch
from support import fails_like, unit_rows

import eval as evaluation

# Captions 0 and 1 belong to image 0, captions 2 and 3 to image 1, caption 4 to image 2.
SCORES = [[0.1, 0.9, 0.5, 0.3, 0.2], [0.8, 0.7, 0.6, 0.2, 0.4], [0.3, 0.6, 0.5, 0.7, 0.45]]
RIGHT = [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4)]


def ranks(scores, right):
    scores = torch.as_tensor(scores)
    captions = torch.eye(scores.shape[1], dtype=scores.dtype)
    return evaluation.ranks(scores, captions, torch.tensor(right))


def by_hand(scores, right):
    """One image at a time; a tie within rounding counts against the model."""
    for image, row in enumerate(scores):
        best = max((row[j] for i, j in right if i == image), default=-math.inf)
        yield 1 + sum(row[j] >= best - 1e-6 for j in range(len(row)) if (image, j) not in right)


def test_exercise_7_a_rank_is_that_of_the_best_right_answer():
    mistakes = {
        "counted from 0": [0, 2, 3],
        "only an image's first right caption counts": [5, 3, 4],
        "the worst right answer, not the best": [4, 4, 4],
        "right answers count as rivals": [2, 4, 5],
        "caption i taken for the answer of image i": [5, 2, 3],
        "lowest score first": [1, 1, 2],
    }
    assert [*by_hand(SCORES, RIGHT)] == [1, 3, 4]
    of_images, of_captions = ranks(SCORES, RIGHT)
    fails_like(of_images, [1, 3, 4], mistakes, "ranks of images", 0)
    below_0 = [[score - 1 for score in row] for row in SCORES]
    mistakes = {"wrong answers were scored 0, not lowest": [1, 1, 1]}
    fails_like(ranks(below_0, RIGHT)[0], [1, 3, 4], mistakes, "ranks of scores below 0", 0)
    mistakes = {"counted from 0": [2, 0, 0, 2, 0], "lowest score first": [1, 3, 3, 1, 3]}
    fails_like(of_captions, [3, 1, 1, 3, 1], mistakes, "ranks of captions", 0)
    assert of_images.dtype == of_captions.dtype == torch.int64, "ranks must be of type int64"


def test_exercise_7_ties_count_against_the_model():
    """A model that gives everything one embedding finds nothing, rather than everything."""
    n = 6
    mistakes = {
        "ties count for the model": [1] * n,
        "ties are decided by the order": list(range(1, n + 1)),
    }
    same = [(i, i) for i in range(n)]
    for found in ranks(torch.ones(n, n), same):
        fails_like(found, [n] * n, mistakes, "ranks of equal scores", 0)
    mistakes = {"scores that differ by rounding are no tie": [1, 1]}
    close = [[0.5, 0.5 - 5e-7], [0.5 - 5e-7, 0.5]]
    for found in ranks(torch.tensor(close, dtype=torch.float64), same[:2]):
        fails_like(found, [2, 2], mistakes, "ranks of scores that differ by rounding", 0)
    mistakes = {"near scores taken for ties": [2, 2]}
    near = [[0.5, 0.5 - 2e-6], [0.5 - 2e-6, 0.5]]
    for found in ranks(torch.tensor(near, dtype=torch.float64), same[:2]):
        fails_like(found, [1, 1], mistakes, "ranks of near scores", 0)
    twice = torch.tensor(unit_rows(70, 384, 1)).float().repeat(2, 1)
    for found in evaluation.ranks(twice, twice, torch.arange(140)[:, None].repeat(1, 2), 64):
        fails_like(found, [2] * 140, {}, "ranks of rows that occur twice", 0)


@pytest.mark.parametrize("rows", [7, 1024])
def test_exercise_7_many_ranks_equal_those_counted_one_by_one(rows):
    """80 images with up to 3 captions, listed twice, in no order; whole numbers, so many ties."""
    rng = torch.Generator().manual_seed(0)
    images, captions = (torch.randint(-2, 3, (n, 4), generator=rng).float() for n in (80, 160))
    owners = torch.cat([torch.full((1 + i % 3,), i) for i in range(80)])
    right = torch.stack([owners, torch.randperm(160, generator=rng)[: len(owners)]], dim=1)
    right = right.repeat(2, 1)[torch.randperm(2 * len(right), generator=rng)]
    of_images, of_captions = evaluation.ranks(images, captions, right, rows)
    scores, cells = images @ captions.T, {tuple(pair) for pair in right.tolist()}
    what = f"ranks of 80 images and 160 captions, {rows} rows at a time"
    fails_like(of_images, [*by_hand(scores.tolist(), cells)], {}, what, 0)
    slow = [*by_hand(scores.T.tolist(), {(caption, image) for image, caption in cells})]
    fails_like(of_captions, slow, {}, what, 0)


def test_exercise_7_scores_that_are_not_numbers_come_last():
    """Comparisons with nan are all false: a count of better scores would make every rank 1."""
    same = [(i, i) for i in range(4)]
    mistakes = {"nan counts for the model": [1] * 4}
    for found in ranks(torch.full((4, 4), torch.nan), same):
        fails_like(found, [4] * 4, mistakes, "ranks of nan", 0)
    captions = torch.eye(3)
    captions[1] = torch.nan
    got, _ = evaluation.ranks(torch.eye(3), captions, torch.tensor(same[:3]))
    _, of_captions = evaluation.ranks(captions, torch.eye(3), torch.tensor(same[:3]))
    mistakes = {"nan counts as the lowest score": [1, 3, 1], "nan counts for the model": [1, 1, 1]}
    fails_like(got, [2, 3, 2], mistakes, "ranks where one embedding is nan", 0)
    fails_like(of_captions, [2, 3, 2], mistakes, "ranks where one embedding is nan", 0)


def test_exercise_7_an_image_without_a_right_answer_is_refused():
    ranks(SCORES, RIGHT)
    with pytest.raises(ValueError):
        ranks(SCORES, RIGHT[:-1])
