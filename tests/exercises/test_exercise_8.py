"""Exercise 8, class_embeds: captions on a circle, where a mean of directions can be seen."""

import math
from types import SimpleNamespace

import pytest
import torch
from support import fails_like

import eval as evaluation

CLASSES, TEMPLATES = ["cat", "dog"], ("a {}", "the {}", "my {}, {}")
# Degrees: the three captions of a class lie evenly around it, at 30 and at 110.
ANGLES = {"a cat": 10, "the cat": 30, "my cat, cat": 50}
ANGLES |= {"a dog": 60, "the dog": 160, "my dog, dog": 110}
ODD = {"a Hot_Dog 2": 70}  # a name is taken as it is
MODEL = SimpleNamespace(logit_scale=torch.tensor(0.0))  # where its weights are


def direction(degrees):
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


@pytest.fixture
def asked(monkeypatch):
    """Every caption that is embedded, and with what options; ANGLES says where it goes."""
    embedded, options = [], []

    def embed_captions(model, captions, precision="fp32", batch_size=0):
        unknown = [caption for caption in captions if caption not in ANGLES | ODD]
        assert not unknown, f"templates are filled in wrongly: {unknown[0]!r}"
        embedded.extend(captions)
        options.append((model, precision, batch_size))
        return torch.tensor([direction((ANGLES | ODD)[caption]) for caption in captions])

    monkeypatch.setattr(evaluation, "embed_captions", embed_captions)
    return embedded, options


def mean(*angles):
    return [sum(part) / len(angles) for part in zip(*map(direction, angles))]


def unit(row):
    return [value / math.hypot(*row) for value in row]


def test_exercise_8_a_class_is_the_mean_direction_of_its_captions(asked):
    got = evaluation.class_embeds(MODEL, CLASSES, TEMPLATES)
    means = [mean(10, 30, 50), mean(60, 160, 110)]
    mistakes = {
        "not normalised after the mean": means,
        "first template only": [direction(10), direction(60)],
        "last template only": [direction(50), direction(110)],
        "normalised over the classes, not each": [*zip(*map(unit, zip(*means)))],
        "a row a caption, not averaged": [direction(angle) for angle in ANGLES.values()],
    }
    fails_like(got, [direction(30), direction(110)], mistakes, "class_embeds", 1e-6)
    assert got.dtype == torch.float32 and sorted(asked[0]) == sorted(ANGLES), "each caption once"


def test_exercise_8_one_class_and_one_template_are_enough(asked):
    got = evaluation.class_embeds(MODEL, ["cat"], ["the {}"])
    fails_like(got, [direction(30)], {}, "class_embeds of one caption", 1e-6)
    got = evaluation.class_embeds(MODEL, ["Hot_Dog 2"], ["a {}"])
    fails_like(got, [direction(70)], {}, "class_embeds of an odd name", 1e-6)
    got = evaluation.class_embeds(MODEL, ["dog", "cat"], ["a {}"])
    mistakes = {"classes in another order": [direction(10), direction(60)]}
    fails_like(got, [direction(60), direction(10)], mistakes, "rows", 1e-6)


def test_exercise_8_model_precision_and_batch_size_are_handed_on(asked):
    evaluation.class_embeds(MODEL, CLASSES, TEMPLATES, "bf16", 7)
    for model, *options in asked[1]:
        assert model is MODEL and options == ["bf16", 7], "embed_captions got other options"
