"""Exercise 7, ranks. Queries are rows of scores and the gallery is an identity: scores are seen."""

import pytest
import torch
from support import fails_like, unit_rows

import eval as evaluation

# Captions 0 and 1 belong to image 0, captions 2 and 3 to image 1, caption 4 to image 2.
SCORES = [[0.1, 0.9, 0.5, 0.3, 0.2], [0.8, 0.7, 0.6, 0.2, 0.4], [0.3, 0.6, 0.5, 0.7, 0.45]]
RIGHT = [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4)]


def ranks(scores, right):
    scores = torch.as_tensor(scores)
    gallery = torch.eye(scores.shape[1], dtype=scores.dtype)
    return evaluation.ranks(scores, gallery, torch.tensor(right))


def by_hand(scores, right):
    """One query at a time; a tie within rounding counts against the model."""
    for query, row in enumerate(scores):
        best = max(row[j] for i, j in right if i == query)
        yield 1 + sum(row[j] >= best - 1e-6 for j in range(len(row)) if (query, j) not in right)


def test_exercise_7_a_rank_is_that_of_the_best_right_answer():
    mistakes = {
        "counted from 0": [0, 2, 3],
        "only a query's first right answer counts": [5, 3, 4],
        "the worst right answer, not the best": [4, 4, 4],
        "right answers count as rivals": [2, 4, 5],
        "item i taken for the answer of query i": [5, 2, 3],
        "lowest score first": [1, 1, 2],
    }
    assert [*by_hand(SCORES, RIGHT)] == [1, 3, 4]
    fails_like(ranks(SCORES, RIGHT), [1, 3, 4], mistakes, "ranks of images", 0)
    below_0 = [[score - 1 for score in row] for row in SCORES]
    mistakes = {"wrong answers were scored 0, not lowest": [1, 1, 1]}
    fails_like(ranks(below_0, RIGHT), [1, 3, 4], mistakes, "ranks of scores below 0", 0)
    mistakes = {"counted from 0": [2, 0, 0, 2, 0], "lowest score first": [1, 3, 3, 1, 3]}
    got = ranks([*zip(*SCORES)], [(caption, image) for image, caption in RIGHT])
    fails_like(got, [3, 1, 1, 3, 1], mistakes, "ranks of captions", 0)
    assert got.dtype == torch.int64, f"ranks are {got.dtype}, expected int64"


def test_exercise_7_ties_count_against_the_model():
    """A model that gives everything one embedding finds nothing, rather than everything."""
    n = 6
    mistakes = {
        "ties count for the model": [1] * n,
        "ties are decided by the order": list(range(1, n + 1)),
    }
    same = [(i, i) for i in range(n)]
    fails_like(ranks(torch.ones(n, n), same), [n] * n, mistakes, "ranks of equal scores", 0)
    mistakes = {"scores that differ by rounding are no tie": [1, 1]}
    close = [[0.5, 0.5 - 5e-7], [0.5 - 5e-7, 0.5]]
    got = ranks(torch.tensor(close, dtype=torch.float64), same[:2])
    fails_like(got, [2, 2], mistakes, "ranks of scores that differ by rounding", 0)
    mistakes = {"near scores taken for ties": [2, 2]}
    near = [[0.5, 0.5 - 2e-6], [0.5 - 2e-6, 0.5]]
    got = ranks(torch.tensor(near, dtype=torch.float64), same[:2])
    fails_like(got, [1, 1], mistakes, "ranks of near scores", 0)
    twice = torch.tensor(unit_rows(70, 384, 1)).float().repeat(2, 1)
    got = evaluation.ranks(twice, twice, torch.arange(140)[:, None].repeat(1, 2), 64)
    fails_like(got, [2] * 140, {}, "ranks of rows that occur twice", 0)


@pytest.mark.parametrize("rows", [7, 1024])
def test_exercise_7_many_ranks_equal_those_counted_one_by_one(rows):
    """80 queries with up to 3 answers, in no order; whole numbers of any size, which often tie."""
    rng = torch.Generator().manual_seed(0)
    queries, gallery = (torch.randint(-2, 3, (n, 4), generator=rng).float() for n in (80, 159))
    owners = torch.cat([torch.full((1 + i % 3,), i) for i in range(80)])
    right = torch.stack([owners, torch.randperm(159, generator=rng)[: len(owners)]], dim=1)
    right = right[torch.randperm(len(right), generator=rng)]
    got = evaluation.ranks(queries, gallery, right, rows)
    slow = [*by_hand((queries @ gallery.T).tolist(), {tuple(pair) for pair in right.tolist()})]
    fails_like(got, slow, {}, f"ranks of 80 queries among 159, {rows} rows at a time", 0)


def test_exercise_7_scores_that_are_not_numbers_come_last():
    """Comparisons with nan are all false: a count of better scores would make every rank 1."""
    same = [(i, i) for i in range(4)]
    mistakes = {"nan counts for the model": [1] * 4}
    fails_like(ranks(torch.full((4, 4), torch.nan), same), [4] * 4, mistakes, "ranks of nan", 0)
    gallery = torch.eye(3)
    gallery[1] = torch.nan
    got = evaluation.ranks(torch.eye(3), gallery, torch.tensor(same[:3]))
    mistakes = {"nan counts as the lowest score": [1, 3, 1], "nan counts for the model": [1, 1, 1]}
    fails_like(got, [2, 3, 2], mistakes, "ranks where one embedding is nan", 0)


def test_exercise_7_a_query_without_a_right_answer_is_refused():
    ranks(SCORES, RIGHT)
    with pytest.raises(ValueError):
        ranks(SCORES, RIGHT[:-1])
