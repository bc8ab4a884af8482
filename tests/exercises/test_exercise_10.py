"""Exercise 10, MicroBatches.forward: pieces against one graph over the whole batch."""

import pytest
import torch
from support import fails_like
from torch import nn

import dualenc

BATCH = torch.randn(2, 11, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Towers(nn.Module):
    """Small networks in a DualEncoder's place; notes the first one's outputs and random states."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.images = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(dropout))
        self.texts, self.logit_scale = nn.Linear(6, 6), nn.Parameter(torch.tensor(0.5))
        self.double()
        self.outputs, self.states = [], []

    def project_image(self, rows):
        assert self.training, "in evaluation mode: dropout and batch norm must be at work"
        self.states.append(torch.get_rng_state())
        self.outputs.append(self.images(rows))
        return self.outputs[-1] * 1

    def project_text(self, rows):
        return self.texts(rows)

    def encode_text(self, input_ids):
        return self.texts(input_ids)

    def go_back(self, image_embeds, text_embeds):
        """The backward pass of a loss in which every row needs all others; what came in."""
        loss = (self.logit_scale * image_embeds @ text_embeds.T).sin().sum().exp()
        loss.backward()
        return image_embeds.detach(), text_embeds.detach(), loss.detach()

    def gradients(self):
        return {name: weight.grad for name, weight in self.named_parameters()}


def in_pieces(model, size=4, name="features"):
    images, texts = BATCH
    return model.go_back(*dualenc.MicroBatches(model, size)(images, {name: texts}))


def one_graph(dropout=0.0, states=(None,), learning=slice(None)):
    """(model, image_embeds, text_embeds, loss): pieces in one graph, each from its random state."""
    model, sides = Towers(dropout), []
    for state, *piece in zip(states, *(side.split(-(-11 // len(states))) for side in BATCH)):
        if state is not None:
            torch.set_rng_state(state)
        sides.append((model.project_image(piece[0]), model.project_text(piece[1])))
    embeds = [torch.cat(side) for side in zip(*sides)]
    learns = torch.zeros(11, 1, dtype=torch.bool).index_fill(0, torch.arange(11)[learning], True)
    return model, *model.go_back(*(torch.where(learns, side, side.detach()) for side in embeds))


@pytest.mark.parametrize("name", ["features", "input_ids"])
def test_exercise_10_loss_and_gradients_equal_those_of_one_graph(name):
    model, (plain, *right) = Towers(), one_graph()
    got = in_pieces(model, name=name)
    for name, one, other in zip(("image_embeds", "text_embeds"), got, right):
        mistakes = {
            "the last piece only": other[8:],
            "the last piece is left out": other[:8],
            "pieces in the wrong order": torch.cat([other[8:], other[4:8], other[:4]]),
        }
        fails_like(one, other, mistakes, name, 1e-12)
    fails_like(got[2], right[2], {}, "the loss", 1e-12)
    last = one_graph(learning=slice(8, None))[0].gradients()
    for name, gradient in plain.gradients().items():
        found, mistakes = model.gradients()[name], {"only the last piece learns": last[name]}
        assert found is not None, f"no gradient reaches {name}: was a piece embedded in no_grad?"
        fails_like(found, gradient, mistakes, f"the gradient of {name}", 1e-10)


def test_exercise_10_pieces_keep_their_inputs_only():
    model, kept = Towers(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        embeds = dualenc.MicroBatches(model, 4)(BATCH[0], {"features": BATCH[1]})
    numbers = sum(tensor.numel() for tensor in kept)
    assert numbers <= BATCH.numel(), f"{numbers} numbers wait for the backward pass: no checkpoint"
    model.go_back(*embeds)
    calls = len(model.outputs)
    assert calls == 6, f"{calls} calls for 3 pieces, expected two for each"


def test_exercise_10_each_weight_gets_its_gradient_once():
    """DistributedDataParallel sends a gradient off as soon as it comes."""
    model, came = Towers(), []
    for name, weight in model.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda _, name=name: came.append(name))
    in_pieces(model)
    assert len(came) == len(set(came)), "gradients came a piece at a time"


def test_exercise_10_the_second_pass_drops_what_the_first_dropped():
    model = Towers(0.4)
    torch.manual_seed(2)
    in_pieces(model)
    masks = [output == 0 for output in model.outputs]
    for again in masks[3:]:  # in any order
        is_same = any(torch.equal(again, first) for first in masks[:3])
        assert is_same, "the passes drop different numbers: the generator's state is not restored"
    assert not torch.equal(*masks[:2]), "every piece drops the same numbers: a fixed seed"
    plain, *_ = one_graph(0.4, model.states[:3])
    for name, right in plain.gradients().items():
        fails_like(model.gradients()[name], right, {}, f"the gradient of {name}, dropout", 1e-10)


@pytest.mark.parametrize(("size", "calls"), [(0, 1), (11, 1), (12, 1), (10, 4)])
def test_exercise_10_a_batch_no_larger_than_a_piece_is_embedded_at_once(size, calls):
    in_pieces(model := Towers(), size)
    assert len(model.outputs) == calls, f"{len(model.outputs)} calls with pieces of {size}"
