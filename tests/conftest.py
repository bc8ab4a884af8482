"""Fixtures that the tests share."""

import numpy as np
import pytest
import torch
from PIL import Image
from support import CAPTIONS, build_model

import dualenc

pytest_plugins = ["scores"]


@pytest.fixture
def tokenizer():
    return dualenc.train_tokenizer(CAPTIONS, vocab_size=500, max_length=32)


@pytest.fixture
def make_model(tokenizer):
    """A function that builds a tiny dual encoder with a processor; arguments override fields."""

    def make(*towers, **overrides):
        model = build_model(tokenizer, *towers, **overrides)
        # Published weights start at 0.02, which makes towers this narrow nearly constant.
        for weight in model.text_model.parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.3)
        return model.eval()

    return make


@pytest.fixture
def images():
    """Four random RGB images of different sizes."""
    rng = np.random.default_rng(0)
    sizes = ((40, 60), (33, 33), (70, 35), (32, 90))
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
