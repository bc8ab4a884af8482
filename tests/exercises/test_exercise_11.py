"""Exercise 11, GatherRows: rows of two processes, and where the gradients of each go."""

import functools

import pytest
import torch
from support import fails_like, in_processes

import dualenc

ROWS = torch.arange(12.0).view(6, 2) + 1  # three of each rank


def part(rows, rank):
    return rows[3 * rank : 3 * rank + 3]


def loss_weights(rank):
    """The gradient of each gathered row in a rank's loss: another one in each."""
    return (torch.arange(1.0, 7)[:, None] * (rank + 1)).repeat(1, 2)


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
    """{what: what a rank gets} for its part of ROWS, and for odd inputs."""
    own, given = part(ROWS, rank).clone().requires_grad_(), loss_weights(rank)
    got = dict(zip(("rows", "gradient"), gather_and_go_back(own, given)))
    got["is_given_changed"] = not torch.equal(given, loss_weights(rank))
    got["of_plain_sum"] = gather_and_go_back(own, torch.ones(()).expand(6, 2))[1]
    ids = dualenc.gather_embeds(torch.tensor([7, 8]) + 10 * rank)
    got |= {"ids": ids.tolist(), "type": str(ids.dtype)}
    return {**got, "deep": dualenc.gather_embeds(own.detach().mT[:, None]).tolist()}


@functools.cache
def outcome():
    """What each of two processes got, or the error: with an answer that hangs, once is enough."""
    try:
        return in_processes(2, gather_in_one_process), None
    except (Exception, pytest.fail.Exception) as error:
        return None, error


def each_rank():
    """(rank, what it got)."""
    results, error = outcome()
    if error:
        raise error
    return enumerate(results)


def test_exercise_11_every_process_gets_all_rows_in_the_order_of_ranks():
    for rank, got in each_rank():
        exchanged = torch.cat([part(ROWS, 1), part(ROWS, 0)])
        mistakes = {"own rows only": part(ROWS, rank), "ranks in the wrong order": exchanged}
        if rank == 1:
            mistakes["own rows first, whatever the rank"] = exchanged
        fails_like(got["rows"], ROWS, mistakes, f"rows in rank {rank}", 0)


def test_exercise_11_a_rows_gradient_is_the_sum_over_all_processes():
    both = loss_weights(0) + loss_weights(1)
    for rank, got in each_rank():
        assert got["gradient"] is not None, "rows are missing, or gathered without autograd"
        right = part(both, rank)
        mistakes = {
            "only this process's loss counts": part(loss_weights(rank), rank),
            "divided by the process count": right / 2,
            "a factor of the process count": 2 * right,
            "the gradient of the other process's rows": part(both, 1 - rank),
        }
        fails_like(got["gradient"], right, mistakes, f"the gradient of rank {rank}'s rows", 1e-6)


def test_exercise_11_rows_and_gradients_may_have_any_type_shape_and_layout():
    for _, got in each_rank():
        is_right = got["ids"] == [7, 8, 17, 18] and got["type"] == "torch.int64"
        assert is_right, f"group ids come back as {got['ids']} of {got['type']}"
        right = [[[*row]] for own in ROWS.split(3) for row in zip(*own.tolist())]
        assert got["deep"] == right, f"rows of shape (1, 3) come back as {got['deep']}"
        assert got["of_plain_sum"] == [[2.0, 2.0]] * 3, "the gradient of a plain sum"
        assert not got["is_given_changed"], "the incoming gradient was changed in place"
