"""Exercise 11, GatherRows: rows of two processes, and where the gradients of each go."""

import functools

import pytest
import torch
from support import fails_like, in_processes

import dualenc

COUNTS = (2, 1)  # rows of each rank


def all_rows(count):
    return torch.arange(4.0 * count).view(-1, 2) + 1


def own_part(rows, rank):
    return rows.chunk(2)[rank]


def loss_weights(rank, n):
    """The gradient of each gathered row in a rank's loss: another one in each."""
    return (torch.arange(1.0, n + 1)[:, None] * (rank + 1)).expand(-1, 2).contiguous()


def gather_and_go_back(own, gradient):
    """(gathered rows, gradient of the own rows); None where a rank lacks rows or a graph."""
    gathered, own.grad = dualenc.gather_embeds(own), None
    is_whole = torch.tensor(gathered.requires_grad and gathered.shape == gradient.shape).long()
    torch.distributed.all_reduce(is_whole)
    if is_whole < 2:  # the backward pass would wait for the other rank
        return gathered.tolist(), None
    gathered.backward(gradient)
    return gathered.tolist(), own.grad.tolist()


def gather_in_one_process(rank):
    """What gather_and_go_back gives for each of COUNTS, and some odd inputs."""
    results = []
    for count in COUNTS:
        own = own_part(all_rows(count), rank).clone().requires_grad_()
        results.append(gather_and_go_back(own, loss_weights(rank, 2 * count)))
    ids = dualenc.gather_embeds(torch.tensor([7, 8]) + 10 * rank)
    rows, given = torch.arange(6.0).view(3, 2).requires_grad_(), torch.ones(6, 2)
    others = {"ids": ids.tolist(), "type": str(ids.dtype)}
    others["deep"] = tuple(dualenc.gather_embeds(torch.zeros(3, 2).mT[:, None]).shape)
    gather_and_go_back(rows, given)
    others["given"] = given.tolist()
    others["gradient"] = gather_and_go_back(rows, torch.ones(()).expand(6, 2))[1]
    return results, others


@functools.cache
def outcome():
    """What each of two processes got, or the error: with an answer that hangs, once is enough."""
    try:
        return in_processes(2, gather_in_one_process), None
    except (Exception, pytest.fail.Exception) as error:
        return None, error


def each_share():
    """(rank, count, gathered rows, gradient) of every share."""
    results, error = outcome()
    if error:
        raise error
    for rank, (pairs, _) in enumerate(results):
        for count, (rows, gradient) in zip(COUNTS, pairs):
            yield rank, count, rows, gradient


def test_exercise_11_every_process_gets_all_rows_in_the_order_of_ranks():
    for rank, count, got, _ in each_share():
        right = all_rows(count)
        own, other = own_part(right, rank), own_part(right, 1 - rank)
        mistakes = {
            "own rows only": own,
            "own rows first, whatever the rank": torch.cat([own, other]),
            "ranks in the wrong order": torch.cat([own, other] if rank else [other, own]),
        }
        fails_like(got, right, mistakes, f"rows in rank {rank}", 0)


def test_exercise_11_a_rows_gradient_is_the_sum_over_all_processes():
    for rank, count, _, got in each_share():
        assert got is not None, "rows are missing, or gathered without autograd"
        mine, theirs = loss_weights(rank, 2 * count), loss_weights(1 - rank, 2 * count)
        right = own_part(mine + theirs, rank)
        mistakes = {
            "only this process's loss counts": own_part(mine, rank),
            "divided by the process count": right / 2,
            "a factor of the process count": 2 * right,
            "the gradient of the other process's rows": own_part(mine + theirs, 1 - rank),
        }
        what = f"the gradient of rank {rank}'s rows"
        fails_like(torch.tensor(got).view(-1, 2), right, mistakes, what, 1e-6)


def test_exercise_11_rows_and_gradients_may_have_any_type_shape_and_layout():
    list(each_share())
    for _, others in outcome()[0]:
        is_right = others["ids"] == [7, 8, 17, 18] and others["type"] == "torch.int64"
        assert is_right, f"group ids come back as {others['ids']} of {others['type']}"
        assert others["deep"] == (4, 1, 3), f"rows of shape (1, 3) come back as {others['deep']}"
        assert others["gradient"] == [[2.0, 2.0]] * 3, "the gradient of a plain sum, not contiguous"
        assert others["given"] == [[1.0, 1.0]] * 6, "the incoming gradient was changed in place"
