"""Exercise 9, TiledLogSumExp: the sums of every row and column, and their gradients, tile by tile."""

import math

import numpy as np
import pytest
import torch
from conftest import fails_like
from references import Memory, slow_clip_loss, slow_gradient, tensors, unit_rows

import dualenc

pytestmark = pytest.mark.exercise


def slow_sums(images, texts, log_scale):
    """The log-sum-exp of each row and each column of the scores."""
    scores = [[math.exp(log_scale) * sum(image * text) for text in texts] for image in images]
    return [[math.log(sum(map(math.exp, row))) for row in rows] for rows in (scores, zip(*scores))]


def mistaken_sums(images, texts, tile, log_scale):
    """{mistake: (of rows, of columns)}: one tile of many, tiles added wrongly, a forgotten scale."""
    cuts = [[side[start : start + tile] for start in range(0, len(side), tile)] for side in (images, texts)]
    rows = np.stack([slow_sums(images, part, log_scale)[0] for part in cuts[1]])
    columns = np.stack([slow_sums(part, texts, log_scale)[1] for part in cuts[0]])
    scale = math.exp(log_scale)
    whole = [len(side) // tile * tile for side in (images, texts)]
    edgeless = [np.full(len(side), -np.inf) for side in (images, texts)]
    if min(whole):
        sums = slow_sums(images[: whole[0]], texts[: whole[1]], log_scale)
        edgeless[0][: whole[0]], edgeless[1][: whole[1]] = sums
    return {
        "tiles at the edges are left out": edgeless,
        "the last tile only": (rows[-1], columns[-1]),
        "the first tile only": (rows[0], columns[0]),
        "sums of tiles added after the logarithm": (rows.sum(0), columns.sum(0)),
        "the largest tile only": (rows.max(0), columns.max(0)),
        "logit_scale used without exp": slow_sums(images, texts, math.log(log_scale)),
        "no temperature": slow_sums(images, texts, 0.0),
        "no logarithm": [np.exp(sums) for sums in slow_sums(images, texts, log_scale)],
        "sum over scores, without exp": (scale * (images @ texts.T).sum(1), scale * (images @ texts.T).sum(0)),
    }


@pytest.mark.parametrize("tile", [1, 3, 4, 100])
def test_exercise_9_sums_over_tiles_are_sums_over_all(tile):
    """7 pictures, 5 captions: the tiles at the edges are smaller."""
    images, texts = unit_rows(7, 3, 0), unit_rows(5, 3, 1)
    got = dualenc.TiledLogSumExp.apply(*tensors(images, texts, 1.3), tile)
    mistakes = mistaken_sums(images, texts, tile, 1.3)
    for side, name in enumerate(("rows", "columns")):
        wrong = {mistake: values[side] for mistake, values in mistakes.items()}
        what = f"log-sum-exp of {name} with tiles of {tile}"
        fails_like(got[side].detach(), slow_sums(images, texts, 1.3)[side], wrong, what, 1e-10)


@pytest.mark.parametrize("kept", [0, 10**6])
def test_exercise_9_the_gradients_are_those_of_the_definition(kept, monkeypatch):
    """Each sum counts with a weight of its own, so that a forgotten outer gradient shows."""
    monkeypatch.setattr(dualenc, "KEPT_SCORES", kept)
    images, texts, rng = unit_rows(5, 3, 2), unit_rows(4, 3, 3), np.random.default_rng(4)
    weights = rng.normal(size=5), rng.normal(size=4)

    def gradients(*weights):
        def weighted(*inputs):
            return sum(float(w @ sums) for w, sums in zip(weights, slow_sums(*inputs)))

        return slow_gradient(weighted, [images, texts, 0.7])

    inputs = tensors(images, texts, 0.7)
    sums = dualenc.TiledLogSumExp.apply(*inputs, 2)
    sum((torch.tensor(w) * side).sum() for w, side in zip(weights, sums)).backward()
    right, only_rows = gradients(*weights), gradients(weights[0], 0 * weights[1])
    only_columns, unweighted = gradients(0 * weights[0], weights[1]), gradients(np.ones(5), np.ones(4))
    for i, name in enumerate(("image_embeds", "text_embeds", "logit_scale")):
        assert inputs[i].grad is not None, f"no gradient reaches {name}"
        mistakes = {
            "no gradient": 0 * right[i],
            "only rows count, not columns": only_rows[i],
            "only columns count, not rows": only_columns[i],
            "a forgotten outer gradient": unweighted[i],
            "exp(logit_scale) left out": right[i] / math.exp(0.7),
            "exp(logit_scale) counted twice": right[i] * math.exp(0.7),
        }
        fails_like(inputs[i].grad, right[i], mistakes, f"the gradient of {name}", 1e-7)


def test_exercise_9_the_tiled_loss_equals_the_textbook_one():
    images, texts = unit_rows(7, 4, 5), unit_rows(7, 4, 6)
    inputs = tensors(images, texts, 1.3)
    loss = dualenc.tiled_clip_loss(*inputs, tile=3)
    fails_like(loss.detach(), slow_clip_loss(images, texts, 1.3), {}, "tiled_clip_loss", 1e-10)
    loss.backward()
    for tensor, right in zip(inputs, slow_gradient(slow_clip_loss, [images, texts, 1.3])):
        fails_like(tensor.grad, right, {}, "a gradient of tiled_clip_loss", 1e-7)


def test_exercise_9_large_scores_do_not_overflow():
    rows = torch.cat([torch.eye(6), -torch.eye(6)])
    inputs = [tensor.requires_grad_() for tensor in (rows, rows.clone(), torch.tensor(math.log(100.0)))]
    sums = dualenc.TiledLogSumExp.apply(*inputs, 5)
    for side in sums:
        assert side.isfinite().all() and side.dtype == torch.float32, "exp of 100 overflows float32: add logarithms"
        fails_like(side.detach(), [100.0] * 12, {}, "log-sum-exp of scores of 100", 1e-5)
    sum(side.sum() for side in sums).backward()
    assert all(tensor.grad.isfinite().all() for tensor in inputs), "a gradient overflows"


def test_exercise_9_scores_that_are_all_very_low_are_no_zeros():
    ones = torch.ones(6, 1)
    for side in dualenc.TiledLogSumExp.apply(ones, -ones, torch.tensor(math.log(100.0)), 4):
        fails_like(
            side, [math.log(6) - 100] * 6, {"sums start at 0, not at minus infinity": [0.0] * 6}, "scores of -100"
        )


def test_exercise_9_everything_is_made_where_the_embeddings_are():
    """On torch's meta device, whose tensors have no numbers: like a GPU, it takes none from the CPU."""
    rows, scale = (torch.empty(shape, device="meta", requires_grad=True) for shape in ((6, 3), ()))
    try:
        sums = dualenc.TiledLogSumExp.apply(rows, rows.detach(), scale, 4)
        sum(side.sum() for side in sums).backward()
    except RuntimeError as error:
        pytest.fail(f"it runs on the CPU only: is something made without device=...? {error}")


def test_exercise_9_the_gradients_that_come_in_are_left_as_they_were():
    sums = dualenc.TiledLogSumExp.apply(*tensors(unit_rows(5, 3, 2), unit_rows(4, 3, 3), 0.7), 2)
    given = [torch.ones_like(side) for side in sums]
    torch.autograd.backward(sums, given)
    assert all((gradient == 1).all() for gradient in given), "the incoming gradients were changed in place"


def test_exercise_9_the_whole_matrix_is_never_in_memory(monkeypatch):
    """A row of tiles at a time is fine; all of them are what this exercise is about."""
    monkeypatch.setattr(dualenc, "KEPT_SCORES", 0)
    B, tile = 256, 8
    rows = [torch.tensor(unit_rows(B, 4, seed), requires_grad=True) for seed in (7, 8)]
    with Memory() as seen:
        sums = dualenc.TiledLogSumExp.apply(*rows, torch.tensor(1.0, dtype=torch.float64, requires_grad=True), tile)
        sum(side.sum() for side in sums).backward()
    assert seen.largest <= B * tile, (
        f"a tensor of {seen.largest:,} numbers was made, the whole matrix has {B * B:,}: it looks like: not tiled"
    )
    assert seen.most_alive <= B * B // 2, (
        f"{seen.most_alive:,} numbers at a time, the whole matrix has {B * B:,}: it looks like: every tile kept"
    )
