"""Exercise 9, TiledLogSumExp: sums of every row and column, and their gradients, tile by tile."""

import math

import numpy as np
import pytest
import torch
from support import Memory, fails_like, slow_gradient, tensors, unit_rows

import dualenc


def slow_sums(images, texts):
    """The log-sum-exp of each row and each column of the scores."""
    scores = [[sum(image * text) for text in texts] for image in images]
    return [[math.log(sum(map(math.exp, row))) for row in rows] for rows in (scores, zip(*scores))]


def mistaken_sums(images, texts, tile):
    """{mistake: (of rows, of columns)}."""
    cuts = [[side[i : i + tile] for i in range(0, len(side), tile)] for side in (images, texts)]
    rows = np.stack([slow_sums(images, part)[0] for part in cuts[1]])
    columns = np.stack([slow_sums(part, texts)[1] for part in cuts[0]])
    return {
        "the last tile only": (rows[-1], columns[-1]),
        "sums of tiles added after the logarithm": (rows.sum(0), columns.sum(0)),
        "the largest tile only": (rows.max(0), columns.max(0)),
        "no logarithm": [np.exp(sums) for sums in slow_sums(images, texts)],
    }


@pytest.mark.parametrize("tile", [1, 3, 4, 100])
def test_exercise_9_sums_over_tiles_are_sums_over_all(tile):
    """7 images, 5 captions: the tiles at the edges are smaller."""
    images, texts = 4 * unit_rows(7, 3, 0), unit_rows(5, 3, 1)
    got = dualenc.TiledLogSumExp.apply(*tensors(images, texts), tile)
    mistakes = mistaken_sums(images, texts, tile)
    for side, name in enumerate(("rows", "columns")):
        wrong = {mistake: values[side] for mistake, values in mistakes.items()}
        right = slow_sums(images, texts)[side]
        what = f"log-sum-exp of {name} with tiles of {tile}"
        fails_like(got[side].detach(), right, wrong, what, 1e-10)


def test_exercise_9_the_gradients_are_those_of_the_definition():
    """Each sum counts with a weight of its own, so that a forgotten outer gradient shows."""
    images, texts, rng = 2 * unit_rows(5, 3, 2), unit_rows(4, 3, 3), np.random.default_rng(4)
    weights = rng.normal(size=5), rng.normal(size=4)

    def gradients(*weights):
        def weighted(*inputs):
            return sum(float(w @ sums) for w, sums in zip(weights, slow_sums(*inputs)))

        return slow_gradient(weighted, [images, texts])

    inputs = tensors(images, texts)
    sums, given = dualenc.TiledLogSumExp.apply(*inputs, 2), [*map(torch.tensor, weights)]
    torch.autograd.backward(sums, given)
    is_same = all(np.array_equal(now, old) for now, old in zip(given, weights))
    assert is_same, "the incoming gradients were changed in place"
    right, only_rows = gradients(*weights), gradients(weights[0], 0 * weights[1])
    only_columns = gradients(0 * weights[0], weights[1])
    unweighted = gradients(np.ones(5), np.ones(4))
    for i, name in enumerate(("images", "texts")):
        assert inputs[i].grad is not None, f"no gradient reaches {name}"
        mistakes = {
            "no gradient": 0 * right[i],
            "only rows count, not columns": only_rows[i],
            "only columns count, not rows": only_columns[i],
            "a forgotten outer gradient": unweighted[i],
        }
        fails_like(inputs[i].grad, right[i], mistakes, f"the gradient of {name}", 1e-7)


def test_exercise_9_scores_of_100_either_way_neither_overflow_nor_vanish():
    rows = torch.cat([torch.eye(6), -torch.eye(6)])
    inputs = [tensor.requires_grad_() for tensor in (100 * rows, rows)]
    sums = dualenc.TiledLogSumExp.apply(*inputs, 5)
    for side in sums:
        is_fine = side.isfinite().all() and side.dtype == torch.float32
        assert is_fine, "exp of 100 overflows float32: add logarithms"
        fails_like(side.detach(), [100.0] * 12, {}, "log-sum-exp of scores of 100", 1e-5)
    sum(side.sum() for side in sums).backward()
    assert all(tensor.grad.isfinite().all() for tensor in inputs), "a gradient overflows"
    ones, mistakes = torch.ones(6, 1), {"sums start at 0, not at minus infinity": [0.0] * 6}
    for side in dualenc.TiledLogSumExp.apply(100 * ones, -ones, 4):
        fails_like(side, [math.log(6) - 100] * 6, mistakes, "scores of -100")


def test_exercise_9_the_whole_matrix_is_never_in_memory():
    """Also on the meta device, which like a GPU mixes with no tensor of the CPU."""
    B, tile = 64, 8
    rows = [torch.tensor(unit_rows(B, 4, seed)) for seed in (7, 8)]
    for device in ("meta", "cpu"):
        images, texts = (side.to(device).requires_grad_() for side in rows)
        with Memory() as seen:
            sums = dualenc.TiledLogSumExp.apply(images, texts, tile)
            sum(side.sum() for side in sums).backward()
    matrix = f"the whole matrix has {B * B:,} numbers; it looks like:"
    assert seen.largest <= B * tile, f"one tensor has {seen.largest:,}, {matrix} not tiled"
    assert seen.most_alive <= B * B // 2, f"{seen.most_alive:,} are kept, {matrix} every tile kept"
