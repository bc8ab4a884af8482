"""Exercise 11, GatherRows: rows of two processes, and where the gradients of each go."""

import functools

import pytest
import torch
from conftest import fails_like, in_processes

import dualenc

pytestmark = pytest.mark.exercise

COUNTS = ((2, 2), (3, 1), (1, 3), (3, 0))  # rows of process 0 and of process 1


def all_rows(counts):
    return torch.arange(2.0 * sum(counts)).view(-1, 2) + 1


def loss_weights(rank, n):
    """What the loss of a process makes of each gathered row: another weight in each process."""
    return torch.arange(1.0, n + 1)[:, None] * (rank + 1)


def gather_and_go_back(own, gradient):
    """(gathered rows, the gradient of this process's own), None where any process has not got all rows, or no graph."""
    gathered = dualenc.gather_embeds(own)
    is_whole = gathered.requires_grad and gathered.shape == gradient.shape
    if dualenc.tell_all(None if is_whole else "not whole"):  # backward waits for all processes
        return gathered.tolist(), None
    own.grad = None
    gathered.backward(gradient)
    return gathered.tolist(), own.grad.tolist()


def gather_in_one_process(rank):
    """For each share what gather_and_go_back gives; gathered ids; and rows and gradients of other shape and layout."""
    results = []
    for counts in COUNTS:
        start, n = sum(counts[:rank]), sum(counts)
        own = all_rows(counts)[start : start + counts[rank]].requires_grad_()
        results.append(gather_and_go_back(own, loss_weights(rank, n).expand(-1, 2).contiguous()))
    ids = dualenc.gather_embeds(torch.tensor([7, 8]) + 10 * rank)
    rows, given = torch.arange(6.0).view(3, 2), torch.ones(6, 2)
    others = {"transposed": dualenc.gather_embeds((rows + 10 * rank).T).tolist()}
    others["deep"] = tuple(dualenc.gather_embeds(torch.zeros(2 - rank, 2, 3)).shape)
    own = rows.clone().requires_grad_()
    gather_and_go_back(own, given)
    others["given"] = given.tolist()
    others["gradient"] = gather_and_go_back(own, torch.ones(()).expand(6, 2))[1]  # one number, seen as if it were many
    return results, ids.tolist(), str(ids.dtype), others


@functools.cache
def outcome():
    """What each of two processes got, or the error: with an answer that hangs, once is enough."""
    try:
        return in_processes(2, gather_in_one_process), None
    except (Exception, pytest.fail.Exception) as error:
        return None, error


def gathered():
    results, error = outcome()
    if error:
        raise error
    return results


def test_exercise_11_every_process_gets_all_rows_in_the_order_of_ranks():
    for rank, (results, *_) in enumerate(gathered()):
        for counts, (got, _) in zip(COUNTS, results):
            right = all_rows(counts)
            filling = torch.zeros(2 * max(counts) - sum(counts), 2)
            own = right[: counts[0]] if rank == 0 else right[counts[0] :]
            other = right[counts[0] :] if rank == 0 else right[: counts[0]]
            mistakes = {
                "own rows only": own,
                "own rows first, whatever the rank": torch.cat([own, other]),
                "ranks in the wrong order": torch.cat([right[counts[0] :], right[: counts[0]]]),
                "own rows twice": torch.cat([own, own]),
                "rows that only fill up a short share are left in": torch.cat(
                    [right[: counts[0]], filling, right[counts[0] :]] if counts[0] < counts[1] else [right, filling]
                ),
            }
            fails_like(torch.tensor(got), right, mistakes, f"rows of shares {counts} in process {rank}", 0)


def test_exercise_11_a_rows_gradient_is_the_sum_of_what_all_processes_make_of_it():
    for rank, (results, *_) in enumerate(gathered()):
        for counts, (_, got) in zip(COUNTS, results):
            assert got is not None, "no gradient to compare: rows are missing, or gathered without autograd"
            n = sum(counts)
            mine = slice(0, counts[0]) if rank == 0 else slice(counts[0], n)
            shares = [loss_weights(process, n).expand(-1, 2) for process in (0, 1)]
            right = sum(shares)
            mistakes = {
                "only this process's loss counts (the others' share is lost)": shares[rank][mine],
                "only the other process's loss counts": shares[1 - rank][mine],
                "divided by the process count": right[mine] / 2,
                "a factor of the process count": 2 * right[mine],
                "the gradient of the other process's rows": right[: len(right[mine])] if rank else right[-counts[0] :],
            }
            what = f"the gradient of process {rank}'s rows, shares {counts},"
            fails_like(torch.tensor(got).view(-1, 2), right[mine], mistakes, what, 1e-6)


def test_exercise_11_numbers_that_have_no_gradient_are_gathered_too():
    for _, ids, dtype, _ in gathered():
        assert ids == [7, 8, 17, 18] and dtype == "torch.int64", f"group ids come back as {ids} of {dtype}"


def test_exercise_11_rows_may_have_any_shape_and_layout():
    for _, _, _, others in gathered():
        assert others["deep"] == (3, 2, 3), f"rows of shape (2, 3) come back as {others['deep']}, expected (3, 2, 3)"
        right = [[0, 2, 4], [1, 3, 5], [10, 12, 14], [11, 13, 15]]
        fails_like(others["transposed"], right, {}, "gathered rows of a transposed matrix", 0)


def test_exercise_11_a_gradient_may_have_any_layout_and_is_left_as_it_was():
    for _, _, _, others in gathered():
        assert others["gradient"] is not None, "no gradient"
        fails_like(others["gradient"], [[2.0, 2.0]] * 3, {}, "the gradient of a plain sum in two processes", 1e-6)
        assert others["given"] == [[1.0, 1.0]] * 6, "the incoming gradient was changed in place"
