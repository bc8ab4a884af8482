"""Small towers, captions and pictures that the tests share."""

import datetime
import multiprocessing
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scores import (  # noqa: F401  pytest finds them here
    pytest_addoption,
    pytest_collection_finish,
    pytest_configure,
    pytest_terminal_summary,
)

import dualenc

CAPTIONS = (
    "a small red circle left of a large blue star",
    "two dogs",
    "the quick brown fox jumps over the lazy dog",
    "a photo of a café",
)
TINY_TEXT = {"text_width": 32, "text_depth": 2, "text_heads": 4, "text_pooling": "mean", "text_max_positions": 32}
TINY_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8}


@pytest.fixture
def tokenizer():
    return dualenc.train_tokenizer(CAPTIONS, vocab_size=200, max_length=32)


@pytest.fixture
def make_model(tokenizer):
    """A function that builds a tiny dual encoder with a processor; its arguments override the defaults."""

    def make(vision="vit_tiny_patch16_224", image_size=32, vision_args=None, projection_dim=16, seed=0, **overrides):
        torch.manual_seed(seed)
        if vision_args is None:
            vision_args = TINY_VIT if vision.startswith("vit") else {}
        model = dualenc.DualEncoder.from_vision_text_pretrained(
            vision,
            "scratch",
            projection_dim=projection_dim,
            pretrained=False,
            vision_args=vision_args,
            vision_image_size=image_size,
            text_vocab_size=tokenizer.get_vocab_size(),
            **{**TINY_TEXT, **overrides},
        )
        # The published start of 0.02 makes towers this narrow nearly constant; larger weights tell captions apart.
        for weight in model.text_model.parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.3)
        model.processor = dualenc.Processor(model.vision_model.image_transform(), tokenizer)
        return model.eval()

    return make


@pytest.fixture
def one_thread():
    """In this process as in those of in_processes: several threads sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pictures():
    """Four random RGB pictures of different sizes."""
    rng = np.random.default_rng(0)
    sizes = ((40, 60), (33, 33), (70, 35), (32, 90))
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def fails_like(got, right, mistakes, what, tolerance=1e-5):
    """Assert that got equals right; if not, the message names the well-known mistake whose value it has."""
    __tracebackhide__ = True  # the message says it all
    got, right = (torch.as_tensor(value, dtype=torch.float64) for value in (got, right))
    if got.shape == right.shape and torch.allclose(got, right, rtol=tolerance, atol=tolerance):
        return
    looks = []
    for name, value in mistakes.items():
        value = torch.as_tensor(value, dtype=torch.float64)
        tells = value.shape != right.shape or not torch.allclose(value, right, atol=1e-3)  # from a right answer
        if tells and got.shape == value.shape and torch.allclose(got, value, atol=1e-4):
            looks.append(name)
    if got.shape == right.shape and torch.allclose(got, right, rtol=1e-5, atol=1e-5):
        looks.append("right to a few digits: computed in float32, or with a small number added where none belongs")
    if got.isnan().any() and not right.isnan().any():
        looks.append("nan, as from 0 times infinity or 0 divided by 0")
    hint = f"it looks like: {', or '.join(looks)}" if looks else "it matches no well-known mistake"
    assert got.shape == right.shape, f"{what} has shape {tuple(got.shape)}, expected {tuple(right.shape)}; {hint}"
    pytest.fail(f"{what} is off by up to {(got - right).abs().max():.2g}; {hint}")


def in_processes(count, function, *arguments):
    """function(rank, *arguments) in so many gloo processes; what each returned, in the order of ranks."""
    multiprocessing.set_forkserver_preload(["torch", "timm", "dualenc"])  # imported once, not in every process
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.start_processes(
                _in_one_process, (count, Path(folder), function, arguments), count, start_method="forkserver"
            )
        except torch.multiprocessing.ProcessExitedException as error:
            pytest.fail(f"a process died, as when they send each other tensors of different shapes: {error}")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _in_one_process(rank, count, folder, function, arguments):
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=60)  # who waits in vain fails the test
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", patience, world_size=count, rank=rank)
    torch.save(function(rank, *arguments), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
