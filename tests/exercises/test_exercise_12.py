"""Exercise 12, DualEncoder.lock and train: what a locked tower does and does not do."""

import pytest
import torch
from torch import nn

import dualenc

TOWERS = {"vision", "text"}


class Tower(nn.Module):
    """A tower with everything that training mode changes: batch norm and dropout."""

    width = 4

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def forward(self, inputs, *_, **extras):
        return dualenc.TowerOutput(None, self.layers(inputs))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return dualenc.DualEncoder(dualenc.DualEncoderConfig(projection_dim=3), Tower(), Tower())


def step(model):
    """A step of plain gradient descent on whatever has a gradient."""
    inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    loss = model.get_image_features(inputs) * model.get_text_features(inputs + 1)
    loss.sum().backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight -= 0.1 * weight.grad


@pytest.mark.parametrize("name", ["vision", "text", "both"])
def test_exercise_12_a_step_of_training_changes_nothing_in_a_locked_tower(model, name):
    model.lock(name)
    model.train()
    locked = TOWERS if name == "both" else {name}
    assert model.locked == locked, "model.locked names the locked towers"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    step(model)
    for key, value in model.state_dict().items():
        is_same = torch.equal(before[key], value)
        if key.partition("_model")[0] in locked:
            kind = "a weight moved" if key.endswith(("weight", "bias")) else "running statistics"
            assert is_same, f"{key} of a locked tower changed: {kind} of batch norm are weights too"
        elif key != "logit_scale":
            assert not is_same, f"{key} did not change: more than the tower was locked"


@pytest.mark.parametrize("name", ["vision", "text", "both"])
def test_exercise_12_a_locked_tower_stays_in_evaluation_mode(model, name):
    model.train()
    model.lock(name)
    for _ in range(2):
        for tower in TOWERS:
            modes = {module.training for module in getattr(model, f"{tower}_model").modules()}
            if tower in model.locked:
                assert modes == {False}, "its dropout and batch norm are active"
            else:
                assert modes == {True}, "the rest left training mode"
        assert model.training, "the rest left training mode"
        model.train()
    model.eval()
    assert not any(module.training for module in model.modules()), "eval() left training mode on"
    model.train(False)
    assert not model.training, "train(False) is eval()"
    model.lock("vision")
    assert not any(m.training for m in model.modules()), "lock put the model into training mode"


def test_exercise_12_weights_of_a_locked_tower_ask_for_no_gradient(model):
    """An optimiser would decay them otherwise; projections and temperature go on learning."""
    model.lock("vision").train().eval().train()
    for name, weight in model.named_parameters():
        if name.startswith("vision_model"):
            assert not weight.requires_grad, "a locked weight still requires a gradient"
        else:
            assert weight.requires_grad, f"more than the tower was locked: {name}"
    model.lock("text").train()
    assert model.locked == TOWERS, "a second tower can be locked"
    step(model)
    learned = {n for n, weight in model.named_parameters() if weight.grad is not None}
    projections = {"visual_projection.weight", "text_projection.weight"}
    assert learned == projections, f"these learned: {sorted(learned)}"


def test_exercise_12_the_model_is_returned_and_other_towers_are_refused(model):
    for name, result in (("lock", model.lock("text")), ("train", model.train())):
        assert result is model, f"{name} returns {result!r}, expected the model"
    for name in ("visual", "vis", ""):
        with pytest.raises(ValueError):
            model.lock(name)
    assert model.locked == {"text"}, "a refused name must not be remembered as locked"
