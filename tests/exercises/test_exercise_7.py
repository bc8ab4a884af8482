"""Exercise 7, ranks: recall with several captions a picture. A plain matrix of all scores is answer enough.

The pictures' embeddings are the scores themselves, the captions' are the columns of an identity: each test can show the
whole matrix. (The library itself works in tiles, so that the matrix need not fit into memory.)
"""

import pytest
import torch
from conftest import fails_like

import eval as evaluation

pytestmark = pytest.mark.exercise

# Captions 0 and 1 belong to picture 0, captions 2 and 3 to picture 1, caption 4 to picture 2.
SCORES = [[0.1, 0.9, 0.5, 0.3, 0.2], [0.8, 0.7, 0.6, 0.2, 0.4], [0.3, 0.6, 0.5, 0.7, 0.45]]
IMAGE_GROUPS, TEXT_GROUPS = [0, 1, 2], [0, 0, 1, 1, 2]


def ranks(scores, image_groups, text_groups):
    """What the function under test makes of a matrix of scores."""
    scores = torch.as_tensor(scores)
    groups = torch.tensor(image_groups), torch.tensor(text_groups)
    return evaluation.ranks(scores, torch.eye(scores.shape[1], dtype=scores.dtype), *groups)


def test_exercise_7_a_rank_is_that_of_the_best_right_answer():
    image_ranks, text_ranks = ranks(SCORES, IMAGE_GROUPS, TEXT_GROUPS)
    mistakes = {
        "the two results exchanged": [3, 1, 1, 3, 1],
        "counted from 0": [0, 2, 3],
        "only a picture's first caption counts as right": [5, 3, 4],
        "the worst right answer, not the best": [4, 4, 4],
        "caption i taken for picture i": [5, 2, 3],
        "lowest score first": [1, 1, 2],
    }
    fails_like(image_ranks, [1, 3, 4], mistakes, "image_ranks", 0)
    mistakes = {
        "counted from 0": [2, 0, 0, 2, 0],
        "lowest score first": [1, 3, 3, 1, 3],
    }
    fails_like(text_ranks, [3, 1, 1, 3, 1], mistakes, "text_ranks", 0)


def test_exercise_7_recall_is_the_share_of_queries_whose_rank_is_low_enough():
    """Through retrieval, which counts what ranks returns."""
    groups = torch.tensor(IMAGE_GROUPS), torch.tensor(TEXT_GROUPS)
    numbers = evaluation.retrieval(torch.tensor(SCORES), torch.eye(5), *groups)
    got = [numbers[name] for name in ("i2t_r1", "i2t_r5", "i2t_medr", "t2i_r1", "t2i_r5", "t2i_medr")]
    fails_like(got, [1 / 3, 1, 3, 3 / 5, 1, 1], {}, "recall at 1, at 5 and the median rank, both ways,", 1e-9)


def test_exercise_7_ties_count_against_the_model():
    """A model that gives everything one embedding finds nothing, rather than everything."""
    n = 6
    image_ranks, text_ranks = ranks(torch.ones(n, n), list(range(n)), list(range(n)))
    for got, name in ((image_ranks, "image_ranks"), (text_ranks, "text_ranks")):
        mistakes = {
            "ties count for the model": [1] * n,
            "ties are decided by the order": list(range(1, n + 1)),
            "ties are decided by the reversed order": list(range(n, 0, -1)),
        }
        fails_like(got, [n] * n, mistakes, f"{name} of equal scores", 0)


def test_exercise_7_a_tie_among_right_answers_costs_nothing():
    image_ranks, _ = ranks([[0.9, 0.9, 0.1], [0.2, 0.3, 0.8]], [0, 1], [0, 0, 1])
    fails_like(image_ranks, [1, 1], {"a right answer counts as a rival": [2, 1]}, "image_ranks", 0)


def test_exercise_7_a_caption_may_fit_several_pictures_and_groups_are_any_numbers():
    scores = [[0.2, 0.9], [0.8, 0.1], [0.6, 0.3]]
    image_ranks, text_ranks = ranks(scores, [70, 3, 70], [3, 70])
    mistakes = {"group numbers taken for places": [2, 2, 1]}
    fails_like(image_ranks, [1, 1, 2], mistakes, "image_ranks", 0)
    fails_like(text_ranks, [1, 1], {}, "text_ranks", 0)
    image_ranks, _ = ranks([[0.2, 0.9], [0.8, 0.1]], [-7, 2**40], [2**40, -7])
    fails_like(image_ranks, [1, 1], {}, "image_ranks with groups -7 and 2**40", 0)


def by_hand(scores, image_groups, text_groups):
    """The ranks of both ways, one query at a time."""

    def one_way(rows, own, others):
        for row, group in zip(rows, own):
            best = max(score for score, other in zip(row, others) if other == group)
            yield 1 + sum(score >= best for score, other in zip(row, others) if other != group)

    return [*one_way(scores, image_groups, text_groups)], [*one_way(zip(*scores), text_groups, image_groups)]


@pytest.mark.parametrize("tile", [64, 1024])
def test_exercise_7_many_ranks_equal_those_counted_one_by_one(tile):
    """80 pictures, 159 captions in no order; embeddings of any length, whose scores are whole numbers and often tie."""
    rng = torch.Generator().manual_seed(0)
    image_groups = torch.arange(80).flip(0)
    text_groups = torch.cat([torch.full((1 + i % 3,), i) for i in range(80)])[torch.randperm(159, generator=rng)]
    images, texts = (torch.randint(-2, 3, (n, 4), generator=rng).float() for n in (80, 159))
    got = evaluation.ranks(images, texts, image_groups, text_groups, tile=tile)
    right = by_hand((images @ texts.T).tolist(), image_groups.tolist(), text_groups.tolist())
    for ranked, counted, name in zip(got, right, ("image_ranks", "text_ranks")):
        fails_like(ranked, counted, {}, f"{name} of 80 pictures and 159 captions, tiles of {tile}", 0)


def test_exercise_7_scores_may_be_below_0():
    image_ranks, text_ranks = ranks([[score - 1 for score in row] for row in SCORES], IMAGE_GROUPS, TEXT_GROUPS)
    mistakes = {"wrong answers were scored 0, not lowest": [1, 1, 1]}
    fails_like(image_ranks, [1, 3, 4], mistakes, "image_ranks of scores below 0", 0)
    fails_like(text_ranks, [3, 1, 1, 3, 1], {}, "text_ranks of scores below 0", 0)


def test_exercise_7_a_small_difference_is_no_tie():
    image_ranks, _ = ranks([[0.5, 0.4999], [0.4999, 0.5]], [0, 1], [0, 1])
    fails_like(image_ranks, [1, 1], {"near scores taken for ties, or rounded": [2, 2]}, "image_ranks", 0)


def test_exercise_7_the_order_of_pictures_and_captions_changes_nothing():
    """80 pictures with 1 to 3 captions; scores are few whole numbers, so that many tie."""
    rng = torch.Generator().manual_seed(0)
    image_groups = torch.arange(80)
    text_groups = torch.cat([torch.full((1 + i % 3,), i) for i in range(80)])
    images, texts = (torch.randint(-2, 3, (n, 4), generator=rng).float() for n in (80, len(text_groups)))
    first = evaluation.ranks(images, texts, image_groups, text_groups)
    orders = [torch.randperm(n, generator=rng) for n in (80, len(text_groups))]
    second = evaluation.ranks(images[orders[0]], texts[orders[1]], image_groups[orders[0]], text_groups[orders[1]])
    for one, two, order, name in zip(first, second, orders, ("image_ranks", "text_ranks")):
        fails_like(two, one[order], {}, f"{name} after shuffling", 0)
        assert one.min() >= 1 and one.float().std() > 1, f"{name} are hardly different: {one[:10].tolist()}"


def test_exercise_7_scores_that_are_not_numbers_come_last():
    """Comparisons with nan are all false: a count of what is better would call every rank the first."""
    image_ranks, _ = ranks(torch.full((4, 4), torch.nan), [0, 1, 2, 3], [0, 1, 2, 3])
    fails_like(image_ranks, [4] * 4, {"nan counts for the model": [1] * 4}, "image_ranks of nan", 0)
    texts = torch.eye(3)
    texts[1] = torch.nan
    image_ranks, text_ranks = evaluation.ranks(torch.eye(3), texts, torch.arange(3), torch.arange(3))
    mistakes = {"nan counts as the lowest score": [1, 3, 1], "nan counts for the model": [1, 1, 1]}
    fails_like(image_ranks, [2, 3, 2], mistakes, "image_ranks where one caption's embedding is nan", 0)
    fails_like(text_ranks, [1, 3, 1], {}, "text_ranks where one caption's embedding is nan", 0)


def test_exercise_7_ranks_are_whole_numbers_one_a_query():
    image_ranks, text_ranks = ranks(SCORES, IMAGE_GROUPS, TEXT_GROUPS)
    assert image_ranks.shape == (3,) and text_ranks.shape == (5,)
    assert image_ranks.dtype == text_ranks.dtype == torch.int64, f"ranks are {image_ranks.dtype}, expected int64"


def test_exercise_7_a_query_without_a_right_answer_is_refused():
    ranks(SCORES, IMAGE_GROUPS, TEXT_GROUPS)
    for image_groups, text_groups in (([0, 1, 2], [0, 0, 1, 1, 1]), ([0, 1, 1], [0, 0, 1, 1, 2]), ([0, 1, 2], [1] * 5)):
        with pytest.raises(ValueError):
            ranks(SCORES, image_groups, text_groups)
