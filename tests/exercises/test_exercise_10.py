"""Exercise 10, MicroBatches.forward: pieces against one graph over the whole batch."""

import pytest
import torch
from support import fails_like
from torch import nn

import dualenc

pytestmark = pytest.mark.exercise


class Towers(nn.Module):
    """Two small networks in a DualEncoder's place; they note what passes through them.

    outputs  of the first network, one a call
    states   of the generator before each call
    """

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        parts = (nn.Linear(6, 6), nn.Tanh(), nn.Dropout(dropout))
        self.images, self.texts = nn.Sequential(*parts), nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.logit_scale = nn.Parameter(torch.tensor(0.5))
        self.double()
        self.outputs, self.states = [], []

    def project_image(self, rows):
        assert self.training, "in evaluation mode: dropout and batch norm must be at work"
        self.states.append(torch.get_rng_state())
        embeds = self.images(rows)
        self.outputs.append(embeds.detach().clone())
        return embeds

    def project_text(self, rows):
        return self.texts(rows)

    def encode_text(self, input_ids):
        return self.texts(input_ids)

    def loss(self, image_embeds, text_embeds):
        """Some loss in which every row needs all others."""
        scores = image_embeds @ text_embeds.T
        return self.logit_scale * scores.sin().sum().exp().add(1).log() + image_embeds.pow(4).mean()

    def gradients(self):
        return {name: weight.grad for name, weight in self.named_parameters()}


def batch(B=11):
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(B, 6, dtype=torch.float64, generator=rng) for _ in range(2)]


def in_pieces(model, size=4, is_dict=False):
    """(image_embeds, text_embeds, loss) of a step through the function under test."""
    images, texts = batch()
    texts = {"input_ids": texts} if is_dict else texts
    embeds = dualenc.MicroBatches(model, size)(images, texts)
    loss = model.loss(*embeds)
    loss.backward()
    return *(side.detach() for side in embeds), loss.detach()


def one_graph(dropout=0.0, states=(None,), learning=slice(None)):
    """The same for all pieces in one graph, each from its generator state."""
    model, sides = Towers(dropout), []
    for state, *piece in zip(states, *(side.split(-(-11 // len(states))) for side in batch())):
        if state is not None:
            torch.set_rng_state(state)
        sides.append((model.project_image(piece[0]), model.project_text(piece[1])))
    embeds = [torch.cat(side) for side in zip(*sides)]
    mask = torch.zeros(11, 1, dtype=torch.bool)
    mask[learning] = True
    loss = model.loss(*(torch.where(mask, side, side.detach()) for side in embeds))
    loss.backward()
    return model, *(side.detach() for side in embeds), loss.detach()


@pytest.mark.parametrize("is_dict", [False, True])
def test_exercise_10_loss_and_gradients_equal_those_of_one_graph(is_dict):
    model, (plain, *right) = Towers(), one_graph()
    got = in_pieces(model, is_dict=is_dict)
    for name, one, other in zip(("image_embeds", "text_embeds", "loss"), got, right):
        mistakes = (
            {}
            if name == "loss"
            else {
                "the last piece only": other[8:],
                "the last piece is left out": other[:8],
                "pieces in the wrong order": torch.cat([other[8:], other[4:8], other[:4]]),
            }
        )
        fails_like(one, other, mistakes, name, 1e-12)
    last = one_graph(learning=slice(8, None))[0].gradients()
    for name, gradient in plain.gradients().items():
        found = model.gradients()[name]
        assert found is not None, f"no gradient reaches {name}: was a piece embedded in no_grad?"
        mistakes = {
            "only the last piece learns": last[name],
            "a factor of the number of pieces": 3 * gradient,
            "divided by the number of pieces": gradient / 3,
        }
        fails_like(found, gradient, mistakes, f"the gradient of {name}", 1e-10)


def test_exercise_10_pieces_keep_their_inputs_only():
    model, kept = Towers(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        embeds = dualenc.MicroBatches(model, 4)(*batch())
    numbers = sum(tensor.numel() for tensor in kept)
    assert numbers <= 2 * 11 * 6, f"{numbers} numbers wait for the backward pass: no checkpoint"
    model.loss(*embeds).backward()
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
    first, again = model.outputs[:3], model.outputs[3:]
    for two in again:  # in any order
        is_same = any(one.shape == two.shape and torch.equal(one, two) for one in first)
        assert is_same, "the passes drop different numbers: the generator's state is not restored"
    masks = [(output == 0) for output in first[:2]]
    assert not torch.equal(*masks), "every piece drops the same numbers: a fixed seed"
    plain, *_ = one_graph(0.4, model.states[:3])
    for name, right in plain.gradients().items():
        fails_like(model.gradients()[name], right, {}, f"the gradient of {name}, dropout", 1e-10)


def test_exercise_10_batch_norm_counts_each_image_once():
    model, right = Towers(), torch.zeros(6, dtype=torch.float64)
    model.images.append(nn.BatchNorm1d(6).double())
    for piece in batch()[0].split(4):
        right = 0.9 * right + 0.1 * model.images[:2](piece).mean(dim=0).detach()
    in_pieces(model)
    fails_like(
        model.images[-1].running_mean, right, {}, "batch norm's mean: images count twice?", 1e-10
    )


@pytest.mark.parametrize(("size", "calls"), [(0, 1), (11, 1), (12, 1), (10, 4)])
def test_exercise_10_a_batch_that_is_no_larger_than_a_piece_is_embedded_at_once(size, calls):
    model = Towers()
    in_pieces(model, size)
    assert len(model.outputs) == calls, f"{len(model.outputs)} calls with pieces of {size}"
