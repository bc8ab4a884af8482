"""Exercise 6, learning_rate: a line and half a cosine, a value a step."""

import math

import pytest
from support import fails_like

import train


def half_cosine(step, count, start=0):
    """(1 + cos) / 2 at `count` angles, `step` degrees apart."""
    return [(1 + math.cos(math.radians(step * k))) / 2 for k in range(start, start + count)]


# 16 steps, a quarter of them warm-up, peak 1: then half a cosine at 0, 15, 30, ... degrees.
RISE, FALL = [0.25, 0.5, 0.75, 1.0], half_cosine(15, 12)
MISTAKES = {
    "the first step gets nothing": [0.0, 0.25, 0.5, 0.75, *FALL],
    "a line down, not a cosine": RISE + [1 - k / 12 for k in range(12)],
    "a quarter of a cosine": RISE + [math.cos(math.radians(7.5 * k)) for k in range(12)],
    "a whole cosine, which rises again": RISE + half_cosine(30, 12),
    "not halved: twice the peak": RISE + [2 * value for value in FALL],
    "no 1 added: rates below 0": RISE + [2 * value - 1 for value in FALL],
    "the cosine counts from step 0, not from the end of the warm-up": RISE
    + half_cosine(11.25, 12, 4),
    "the cosine is as long as the whole run": RISE + half_cosine(11.25, 12),
    "the cosine ends a step early, at 0": RISE + half_cosine(180 / 11, 12),
    "the cosine starts a step early": RISE + half_cosine(15, 12, 1),
    "the rise ends a step late": [value * 4 / 5 for value in RISE] + FALL,
    "no warm-up": half_cosine(11.25, 16),
    "warm-up taken as a number of steps": [1.0] + half_cosine(12, 15),
    "peak does not count": [value / 3 for value in RISE + FALL],
}


def rates(steps, warmup, peak):
    return [train.learning_rate(step, steps, warmup, peak) for step in range(steps)]


def test_exercise_6_a_line_up_and_half_a_cosine_down():
    mistakes = {name: [3 * value for value in values] for name, values in MISTAKES.items()}
    right = [3 * value for value in RISE + FALL]
    fails_like(rates(16, 0.25, 3.0), right, mistakes, "the schedule", 2e-5)
    last = train.learning_rate(999, 1000, 0.1, 1.0)
    assert last < 1e-5, "the last of many steps gets almost nothing: there is no floor"


@pytest.mark.parametrize(("warmup", "rising"), [(0.3, 4), (0.2, 2), (0.01, 1), (0.0, 1)])
def test_exercise_6_the_warm_up_is_a_share_rounded_to_whole_steps(warmup, rising):
    """Of 12 steps; one step is the least there is."""

    def rise(n):
        return [min(1, (i + 1) / n) for i in range(rising + 1)]

    mistakes = {"the share is rounded down": rise(max(rising - 1, 1))}
    mistakes |= {"the share is rounded up": rise(rising + 1), "the first step gets nothing": [0, 1]}
    got = rates(12, warmup, 1.0)[: rising + 1]
    fails_like(got, rise(rising), mistakes, f"the rise over {rising} steps", 1e-9)


def test_exercise_6_runs_of_a_step_or_of_warm_up_alone_do_not_divide_by_0():
    assert rates(1, 0.5, 2.0) == [2.0], "a run of one step takes it at the peak"
    assert rates(4, 1.0, 2.0) == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert 0 <= train.learning_rate(4, 4, 1.0, 2.0) <= 2.0, "a step after warm-up alone"
