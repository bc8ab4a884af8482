"""Exercise 10, cached_backward: two passes against one graph over all pieces."""

import math
from contextlib import contextmanager

import pytest
import torch
from conftest import fails_like
from torch import nn

import dualenc

pytestmark = pytest.mark.exercise


class Towers(nn.Module):
    """Two small networks with dropout, a temperature, and notes of every call."""

    def __init__(self, dropout=0.4):
        super().__init__()
        torch.manual_seed(0)
        self.images, self.texts = (nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(dropout)) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.double()
        self.calls, self.unsynced = [], False

    def forward(self, piece):
        state = torch.get_rng_state()
        embeds = self.images(piece[0]), self.texts(piece[1])
        assert self.training, "embed was called in evaluation mode: its dropout and batch norm must be at work"
        self.calls.append((torch.is_grad_enabled(), self.unsynced, state, embeds[0].detach(), embeds[1].detach()))
        return embeds

    @contextmanager
    def no_sync(self):
        self.unsynced = True
        yield
        self.unsynced = False

    def loss(self, image_embeds, text_embeds):
        """Some loss in which every row needs all others."""
        return self.scale * (image_embeds @ text_embeds.T).sin().sum().exp().add(1).log() + image_embeds.pow(4).mean()

    def gradients(self):
        return {name: weight.grad.clone() for name, weight in self.named_parameters() if weight.grad is not None}


def some_pieces(*sizes):
    rng = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(b, 6, dtype=torch.float64, generator=rng) for _ in range(2)) for b in sizes]


def cached(model, pieces):
    return dualenc.cached_backward(model, pieces, model.loss, [model.scale])


def one_graph(dropout, pieces, states=None):
    """(model with gradients, loss, embeddings) of all pieces in one graph, from the generator states that are given."""
    model, sides = Towers(dropout), []
    for i, piece in enumerate(pieces):
        if states:
            torch.set_rng_state(states[i])
        sides.append(model(piece))
    embeds = [torch.cat(side) for side in zip(*sides)]
    loss = model.loss(*embeds)
    loss.backward()
    return model, loss.detach(), [side.detach() for side in embeds]


def piece_by_piece(pieces):
    """Naive accumulation: the losses of the pieces, and {name: sum of their gradients}."""
    model = Towers(0.0)
    losses = [model.loss(*model(piece)) for piece in pieces]
    sum(losses).backward()
    return torch.stack(losses).detach(), model.gradients()


def test_exercise_10_gradients_equal_those_of_one_graph():
    pieces = some_pieces(4, 4, 3)
    model = Towers(0.0)
    loss, *embeds = cached(model, pieces)
    plain, right_loss, right_embeds = one_graph(0.0, pieces)
    (losses, naive), (_, last) = piece_by_piece(pieces), piece_by_piece(pieces[-1:])
    mistakes = {
        "the sum of small losses (naive accumulation)": losses.sum(),
        "the mean of small losses (naive accumulation)": losses.mean(),
        "the loss of the last piece alone": losses[-1],
    }
    fails_like(loss, right_loss, mistakes, "the loss", 1e-12)
    for got, right, name in zip(embeds, right_embeds, ("image embeddings", "text embeddings")):
        fails_like(got, right, {"the last piece only": right[-3:]}, f"the {name} returned", 1e-12)
    found = model.gradients()
    for name, right in plain.gradients().items():
        left_out = "loss_weights are left out" if name == "scale" else f"the gradients of the {name.split('.')[0]} are"
        assert name in found, f"{name} got no gradient: it looks like: {left_out}"
        mistakes = {
            "the sum of small losses (naive accumulation)": naive[name],
            "the mean of small losses (naive accumulation)": naive[name] / 3,
            "the loss of the last piece alone": last[name],
            "a factor of the number of pieces": 3 * right,
            "divided by the number of pieces": right / 3,
            "counted twice": 2 * right,
            "no gradient": 0 * right,
        }
        fails_like(found[name], right, mistakes, f"the gradient of {name}", 1e-10)


def test_exercise_10_the_second_pass_drops_what_the_first_dropped():
    pieces = some_pieces(4, 4, 3)
    model = Towers()
    torch.manual_seed(2)
    cached(model, pieces)
    first, second = model.calls[:3], model.calls[3:]
    assert len(second) == 3, f"embed was called {len(model.calls)} times for 3 pieces, expected twice for each"
    for two in second:  # in any order
        same = any(torch.equal(one[3], two[3]) and torch.equal(one[4], two[4]) for one in first)
        assert same, "the passes drop different numbers: it looks like: the generator's state is not restored"
    masks = [call[3] == 0 for call in first[:2]]
    assert not torch.equal(*masks), "every piece drops the same numbers: each needs random numbers of its own"
    plain, _, _ = one_graph(0.4, pieces, [call[2] for call in first])
    for name, right in plain.gradients().items():
        fails_like(model.gradients()[name], right, {}, f"the gradient of {name} under dropout", 1e-10)


def test_exercise_10_two_steps_drop_different_numbers():
    model, pieces = Towers(), some_pieces(4, 4)
    torch.manual_seed(3)
    first, second = (cached(model, pieces)[1] for _ in range(2))
    assert not torch.equal(first == 0, second == 0), (
        "each step drops the same numbers: it looks like: a fixed seed, or the generator was put back"
    )


def test_exercise_10_one_piece_has_a_graph_at_a_time():
    model = Towers()
    loss, *embeds = cached(model, some_pieces(4, 4, 3))
    graphs = [call[0] for call in model.calls]
    assert graphs == [False] * 3 + [True] * 3, (
        "the first pass must not build a graph: it looks like: no torch.no_grad, so all pieces are in memory at once"
    )
    assert not any(tensor.requires_grad for tensor in (loss, *embeds)), "what is returned still holds a graph"


@pytest.mark.parametrize("sizes", [(3, 4, 4), (1, 4, 2)])
def test_exercise_10_pieces_may_be_of_any_size(sizes):
    pieces, model = some_pieces(*sizes), Towers(0.0)
    cached(model, pieces)
    for name, right in one_graph(0.0, pieces)[0].gradients().items():
        fails_like(model.gradients()[name], right, {}, f"the gradient of {name}, pieces of {sizes}", 1e-10)


def test_exercise_10_a_piece_goes_back_before_the_next_is_embedded():
    """Otherwise all their graphs are in memory at once, which is what this exercise is about."""
    model, has_gradient = Towers(), []
    model.register_forward_pre_hook(lambda *_: has_gradient.append(model.images[0].weight.grad is not None))
    cached(model, some_pieces(4, 4, 3))
    assert has_gradient == [False] * 4 + [True] * 2, "all graphs are kept: run backward for a piece before the next one"


def test_exercise_10_batch_norm_counts_each_picture_once():
    """A mean over all batches it has counted, which their order does not change."""
    model, pieces = Towers(0.0), some_pieces(4, 4, 3)
    model.images.append(nn.BatchNorm1d(6, momentum=None).double())
    cached(model, pieces)
    counted = model.images[-1]
    assert counted.num_batches_tracked == 3, "the first pass must leave buffers as they were: pictures count twice"
    right = torch.stack([model.images[:-1](piece[0]).mean(dim=0) for piece in pieces]).mean(dim=0).detach()
    fails_like(counted.running_mean, right, {}, "batch norm's mean", 1e-10)


def test_exercise_10_weights_of_the_loss_learn_once_and_with_the_last_piece():
    """As DistributedDataParallel wants it, which takes note of each backward pass that ends in a weight."""
    model, calls = Towers(), []
    model.scale.register_post_accumulate_grad_hook(lambda _: calls.append(len(model.calls)))
    cached(model, some_pieces(4, 4, 3))
    assert calls == [6], f"the scale got a gradient after {calls} of 6 calls of embed, expected once, after the last"


def test_exercise_10_the_mode_stays_as_it_was():
    model = nn.Identity().eval()
    weight, pieces = torch.tensor(2.0, requires_grad=True), [torch.ones(2, 3)] * 2
    model.forward = lambda piece: (weight * piece, weight * piece)
    dualenc.cached_backward(model, pieces, lambda images, texts: (images * texts).sum())
    assert not model.training, "the model was left in another mode"


def test_exercise_10_gradients_are_added_to_what_is_there():
    pieces = some_pieces(4, 3)
    model = Towers(0.0)
    cached(model, pieces)
    once = model.gradients()
    cached(model, pieces)
    for name, gradient in model.gradients().items():
        fails_like(gradient, 2 * once[name], {"the old gradient is overwritten": once[name]}, name, 1e-10)


def test_exercise_10_processes_average_gradients_with_the_last_piece_only():
    """DistributedDataParallel waits for the other processes at each backward pass that is not inside no_sync."""
    model = Towers()
    cached(model, some_pieces(4, 4, 3))
    waits = [not call[1] for call in model.calls[3:]]
    assert waits == [False, False, True], "all pieces but the last belong inside embed.no_sync()"


def test_exercise_10_a_plain_function_and_no_weights_of_the_loss_will_do():
    weight = torch.tensor(2.0, requires_grad=True)
    pieces = [(torch.ones(2, 3), torch.ones(2, 3))] * 2
    loss, images, texts = dualenc.cached_backward(
        lambda piece: (weight * piece[0], weight * piece[1]), pieces, lambda images, texts: (images * texts).sum()
    )
    assert math.isclose(loss.item(), 48) and weight.grad.item() == 48 and images.shape == texts.shape == (4, 3)
