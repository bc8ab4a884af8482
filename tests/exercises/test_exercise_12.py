"""Exercise 12, DualEncoder.lock and train: what a locked tower does and does not do."""

import pytest
import torch
from torch import nn

import dualenc

pytestmark = pytest.mark.exercise

INPUTS = {"vision": torch.randn(6, 5, generator=torch.Generator().manual_seed(0))}
INPUTS["text"] = INPUTS["vision"] + 1


class Tower(nn.Module):
    """A tower with everything that training mode changes: batch norm and dropout."""

    width = 4

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def forward(self, inputs, *_, **extras):
        return dualenc.TowerOutput(None, self.layers(inputs))


def make_model():
    torch.manual_seed(0)
    return dualenc.DualEncoder(dualenc.DualEncoderConfig(projection_dim=3), Tower(), Tower())


def towers(model, locked):
    pair = {"vision": model.vision_model, "text": model.text_model}
    return pair.pop(locked), *pair.values()


def step(model):
    """A step of plain gradient descent on whatever has a gradient."""
    (model.get_image_features(INPUTS["vision"]) * model.get_text_features(INPUTS["text"])).sum().backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight -= 0.1 * weight.grad


@pytest.mark.parametrize("name", ["vision", "text"])
def test_exercise_12_a_step_of_training_changes_nothing_in_a_locked_tower(name):
    model = make_model()
    model.lock(name)
    model.train()
    locked, free = towers(model, name)
    before = {key: value.clone() for key, value in locked.state_dict().items()}
    free_before = {key: value.clone() for key, value in free.state_dict().items()}
    step(model)
    for key, value in locked.state_dict().items():
        kind = "batch-norm statistics are weights too" if "running" in key or "num_batches" in key else "a weight moved"
        assert torch.equal(before[key], value), f"{key} of the locked tower changed: {kind}"
    for key, value in free.state_dict().items():
        assert not torch.equal(free_before[key], value), f"{key} of the other tower did not change: it looks locked too"


@pytest.mark.parametrize("name", ["vision", "text"])
def test_exercise_12_a_locked_tower_stays_in_evaluation_mode_and_the_rest_does_not(name):
    model = make_model()
    model.train()
    model.lock(name)
    for _ in range(2):
        locked, free = towers(model, name)
        assert not any(module.training for module in locked.modules()), (
            "a locked tower is in training mode: its dropout and batch norm are active"
        )
        assert model.training and all(module.training for module in free.modules()), "the rest left training mode"
        model.train()
    model.eval()
    assert not any(module.training for module in model.modules()), "after eval() nothing is in training mode"
    model.train(False)
    assert not model.training, "train(False) is eval()"


def test_exercise_12_locking_in_evaluation_mode_does_not_start_training_mode():
    model = make_model()
    for module in model.modules():
        module.training = False
    model.lock("vision")
    assert not any(module.training for module in model.modules()), "lock put the model into training mode"


@pytest.mark.parametrize("name", ["vision", "text"])
def test_exercise_12_weights_of_a_locked_tower_ask_for_no_gradient(name):
    """An optimiser would otherwise decay them; the projection and the temperature go on learning."""
    model = make_model()
    model.lock(name)
    locked, free = towers(model, name)
    assert not any(weight.requires_grad for weight in locked.parameters()), "a locked weight still requires a gradient"
    heads = [model.visual_projection.weight, model.text_projection.weight, model.logit_scale, *free.parameters()]
    assert all(weight.requires_grad for weight in heads), "more than the tower was locked: its projection still learns"
    assert model.locked == {name}, "model.locked names the locked towers"
    model.train().eval().train()
    assert not any(weight.requires_grad for weight in locked.parameters()), "train() has unlocked the weights"


def test_exercise_12_both_towers_can_be_locked():
    model = make_model()
    model.lock("vision").lock("text").train()
    assert model.locked == {"vision", "text"}
    step(model)
    learned = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert learned == {"visual_projection.weight", "text_projection.weight"}, f"these learned: {sorted(learned)}"


def test_exercise_12_lock_and_train_return_the_model():
    model = make_model()
    for name, result in (("lock", model.lock("text")), ("train", model.train()), ("eval", model.eval())):
        assert result is model, f"{name} returns {result!r}, expected the model, so that calls can be chained"


def test_exercise_12_other_towers_are_refused():
    model = make_model()
    model.lock("text")
    for name in ("visual", "vis", ""):
        with pytest.raises(ValueError):
            model.lock(name)
    assert model.locked == {"text"}, "a refused name must not be remembered as locked"
