"""Slow versions, stand-ins and helpers that several test files share."""

import csv
import datetime
import inspect
import json
import math
import multiprocessing
import tempfile
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.multiprocessing import start_processes
from torch.utils._python_dispatch import TorchDispatchMode

import dualenc

CAPTIONS = (
    "a small red circle left of a large blue star",
    "two dogs",
    "the quick brown fox jumps over the lazy dog",
    "a photo of a café",
)
TINY_TEXT = {"text_width": 32, "text_depth": 2, "text_heads": 4, "text_max_positions": 32}
TINY_TEXT["text_pooling"] = "mean"
TINY_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8}

# What takes seconds is imported once and forked into every process.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch", "timm", "dualenc", "train", "pytest"])


def write_table(folder, pairs):
    """captions.csv of (image, captions), beside images 0.png, 1.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "captions.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "caption"))
        for i, (image, captions) in enumerate(pairs):
            image.save(folder / f"{i}.png")
            table.writerows((f"{i}.png", caption) for caption in captions)
    return folder / "captions.csv"


def build_model(tokenizer, vision="vit_tiny_patch16_224", seed=0, **overrides):
    """A tiny dual encoder of random weights with a processor, for images of 32 pixels a side."""
    torch.manual_seed(seed)
    fields = {"projection_dim": 16, "vision_image_size": 32, **TINY_TEXT}
    fields["vision_args"] = TINY_VIT if vision.startswith("vit") else {}
    fields["text_vocab_size"] = tokenizer.get_vocab_size()
    build = dualenc.DualEncoder.from_vision_text_pretrained
    model = build(vision, "scratch", pretrained=False, **{**fields, **overrides})
    model.processor = dualenc.Processor(model.vision_model.image_transform(), tokenizer)
    return model


def class_folders(folder, *names, n_test=6):
    """A folder of nearly plain images, a colour for each class, in train/ and test/."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", n_test)):
        for k, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = 40 + 160 * np.eye(3)[k] + rng.integers(-40, 40, (32, 32, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")
    return folder


def log_of(out, only=""):
    """The lines of a run's metrics that have this one, without clocks."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    clocks = ("pairs_per_s", "data_share")
    lines = [line for line in lines if not only or only in line]
    return [{name: v for name, v in line.items() if name not in clocks} for line in lines]


def unit_rows(n, width, seed):
    rows = np.random.default_rng(seed).normal(size=(n, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def tensors(*arrays):
    return [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in arrays]


def slow_row_loss(logits, row, right):
    """Cross-entropy of one row of logits against its right columns, in equal shares."""
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
    """A tower that returns fixed features (B, W) and notes the arguments and number of its calls.

    like  the class whose forward has the signature to accept
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
    """Notes the largest tensor (in numbers) made inside, and the most numbers alive at once."""

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


def fails_like(got, right, mistakes, what, tolerance=1e-5):
    """Assert that got equals right; else fail and name the well-known mistake with that value."""
    __tracebackhide__ = True  # the message says enough
    got, right = (torch.as_tensor(value, dtype=torch.float64) for value in (got, right))
    if got.shape == right.shape and torch.allclose(got, right, rtol=tolerance, atol=tolerance):
        return
    looks = []
    for name, value in mistakes.items():
        value = torch.as_tensor(value, dtype=torch.float64)
        differs = value.shape != right.shape or not torch.allclose(value, right, atol=1e-3)
        if differs and got.shape == value.shape and torch.allclose(got, value, atol=1e-4):
            looks.append(name)
    if got.shape == right.shape and torch.allclose(got, right, rtol=1e-5, atol=1e-5):
        looks.append("right to a few digits: computed in float32, or a small number was added")
    if got.isnan().any() and not right.isnan().any():
        looks.append("nan, as from 0 times infinity or 0 divided by 0")
    hint = f"it looks like: {', or '.join(looks)}" if looks else "it matches no well-known mistake"
    assert got.shape == right.shape, (
        f"{what} has shape {tuple(got.shape)}, expected {tuple(right.shape)}; {hint}"
    )
    pytest.fail(f"{what} is off by up to {(got - right).abs().max():.2g}; {hint}")


def in_processes(count, function, *arguments):
    """Run function(rank, *arguments) in count gloo processes; their results in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        job = (count, Path(folder), function, arguments)
        try:
            start_processes(_in_one_process, job, count, start_method="forkserver")
        except torch.multiprocessing.ProcessExitedException as error:
            pytest.fail(f"a process died, as when ranks send tensors of different shapes: {error}")
        files = [Path(folder) / f"{rank}.pt" for rank in range(count)]
        return [torch.load(file, weights_only=False) for file in files]


def _in_one_process(rank, count, folder, function, arguments):
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=60)  # a rank that hangs fails the test
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meet", patience, world_size=count, rank=rank
    )
    torch.save(function(rank, *arguments), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
