"""Slow versions and stand-ins that several test files share."""

import inspect
import math
import weakref

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dualenc


def unit_rows(n, width, seed):
    rows = np.random.default_rng(seed).normal(size=(n, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def tensors(*arrays):
    return [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in arrays]


def slow_row_loss(logits, row, right):
    """Minus the log of the probability that a softmax over a row gives the right columns, shared evenly."""
    total = sum(math.exp(value) for value in logits[row])
    return -sum(math.log(math.exp(logits[row][j]) / total) for j in right) / len(right)


def slow_clip_loss(images, texts, log_scale, exp=True, both=True, transpose=True, groups=None):
    n = len(images)
    scale = math.exp(log_scale) if exp else log_scale
    logits = [[scale * float(images[i] @ texts[j]) for j in range(n)] for i in range(n)]
    columns = [list(column) for column in zip(*logits)] if transpose else logits
    groups = groups or list(range(n))
    right = [[j for j in range(n) if groups[j] == groups[i]] for i in range(n)]
    forward = sum(slow_row_loss(logits, i, right[i]) for i in range(n)) / n
    backward = sum(slow_row_loss(columns, i, right[i]) for i in range(n)) / n
    return (forward + backward) / 2 if both else forward


def slow_gradient(function, arrays, step=1e-5):
    """Central differences of a function of numpy arrays, one number at a time; a list of arrays."""
    arrays = [np.array(array, dtype=float) for array in arrays]
    gradients = [np.zeros_like(array) for array in arrays]
    for array, gradient in zip(arrays, gradients):
        for i in np.ndindex(array.shape):
            value = array[i]
            array[i] = value + step
            up = function(*arrays)
            array[i] = value - step
            gradient[i] = (up - function(*arrays)) / (2 * step)
            array[i] = value
    return gradients


class FixedTower(nn.Module):
    """A tower that answers with the features (B, W) it was given, and notes what it was called with, and how often.

    like  the class whose forward says what it may be called with
    """

    calls = 0

    def __init__(self, features, like):
        super().__init__()
        self.width = features.shape[1]
        self.features = nn.Parameter(torch.as_tensor(features))
        self.signature = inspect.signature(like.forward)

    def forward(self, *inputs, **extras):
        got = self.signature.bind(self, *inputs, **extras)
        rows = got.args[1]
        got.apply_defaults()
        self.got, self.calls = got.arguments, self.calls + 1
        features = self.features[: len(rows)]
        return dualenc.TowerOutput(-features[:, None], features)


class Memory(TorchDispatchMode):
    """Notes the most numbers that any operation inside puts into one tensor, and the most that are alive at a time."""

    largest = alive = most_alive = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                if tensor._base is None and not any(tensor is argument for argument in arguments):
                    self.add(tensor.numel())
                    weakref.finalize(tensor, self.add, -tensor.numel())
        return out

    def add(self, numbers):
        self.alive += numbers
        self.most_alive = max(self.most_alive, self.alive)
