"""Claims about the losses beside clip_loss (Exercise 1), each against slow loops."""

import math

import numpy as np
import pytest
import torch
from support import fails_like, slow_clip_loss, slow_gradient, tensors, unit_rows

import dualenc

GROUPS = [0, 1, 0, 2, 1, 0]
ARRAYS = [unit_rows(6, 8, 4), unit_rows(6, 8, 5), 1.1]


def slow_siglip_loss(images, texts, log_scale, bias):
    """Each cell of the matrix asks on its own whether it is a pair."""
    total = 0.0
    for i, j in np.ndindex(len(images), len(texts)):
        logit = math.exp(log_scale) * float(images[i] @ texts[j]) + bias
        total += math.log(1 + math.exp(-logit if i == j else logit))
    return total / len(images)


def slow_multi_positive_loss(images, texts, log_scale):
    entropy = sum(math.log(GROUPS.count(group)) for group in GROUPS) / len(GROUPS)
    return slow_clip_loss(images, texts, log_scale, groups=GROUPS) - entropy


def multi_positive_loss(*inputs):
    return dualenc.multi_positive_clip_loss(*inputs, torch.tensor(GROUPS))


LOSSES = {  # the loss, a slow one, their inputs, and what a mistake gives
    "siglip": (
        *(dualenc.siglip_loss, slow_siglip_loss, [*ARRAYS, -2.0]),
        {"bias subtracted": slow_siglip_loss(*ARRAYS, 2.0)},
    ),
    "multi-positive": (
        *(multi_positive_loss, slow_multi_positive_loss, ARRAYS),
        {"plain clip_loss": slow_clip_loss(*ARRAYS)},
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_those_of_the_definition(name):
    loss, slow, arrays, mistakes = LOSSES[name]
    inputs = tensors(*arrays)
    got = loss(*inputs)
    fails_like(got.detach(), slow(*arrays), mistakes, name, 1e-10)
    got.backward()
    for tensor, right in zip(inputs, slow_gradient(slow, arrays), strict=True):
        fails_like(tensor.grad, right, {}, f"a gradient of {name}", 1e-7)


def test_multi_positive_loss_is_clip_loss_where_no_pair_repeats():
    single = dualenc.multi_positive_clip_loss(*tensors(*ARRAYS), torch.tensor([7, 3, 5, 0, 9, 1]))
    assert single.item() == pytest.approx(dualenc.clip_loss(*tensors(*ARRAYS)).item(), abs=1e-12)


@pytest.mark.parametrize(
    ("loss", "extra"),
    [
        (dualenc.siglip_loss, torch.tensor(0.0)),
        (dualenc.multi_positive_clip_loss, torch.arange(3)),
        (dualenc.tiled_clip_loss, 16),
    ],
)
def test_losses_refuse_sides_of_different_shape(loss, extra):
    with pytest.raises(ValueError, match=r"image_embeds \(3, 4\), text_embeds \(2, 4\) differ"):
        loss(torch.ones(3, 4), torch.ones(2, 4), torch.tensor(0.0), extra)
