"""Exercise 6, learning_rate: values from a table of cosines."""

import math

import pytest
from conftest import fails_like

import train

pytestmark = pytest.mark.exercise

# 16 steps, a quarter of them warm-up, peak 1: then half a cosine at 0, 15, 30, ... degrees.
RISE = [0.25, 0.5, 0.75, 1.0]
FALL = [1.0, 0.98296, 0.93301, 0.85355, 0.75, 0.62941, 0.5, 0.37059, 0.25, 0.14645, 0.06699, 0.01704]
MISTAKES = {
    "the first step gets nothing": [0.0, 0.25, 0.5, 0.75, *FALL],
    "a line down, not a cosine": RISE + [1 - k / 12 for k in range(12)],
    "a quarter of a cosine": RISE
    + [1.0, 0.99144, 0.96593, 0.92388, 0.86603, 0.79335, 0.70711, 0.60876, 0.5, 0.38268, 0.25882, 0.13053],
    "a whole cosine, which rises again": RISE
    + [1.0, 0.93301, 0.75, 0.5, 0.25, 0.06699, 0.0, 0.06699, 0.25, 0.5, 0.75, 0.93301],
    "not halved: twice the peak": RISE + [2 * value for value in FALL],
    "no 1 added: rates below 0": RISE + [2 * value - 1 for value in FALL],
    "the cosine counts from step 0, not from the end of the warm-up": RISE
    + [0.85355, 0.77779, 0.69134, 0.59755, 0.5, 0.40245, 0.30866, 0.22221, 0.14645, 0.08427, 0.03806, 0.00961],
    "the cosine is as long as the whole run": RISE
    + [1.0, 0.99039, 0.96194, 0.91573, 0.85355, 0.77779, 0.69134, 0.59755, 0.5, 0.40245, 0.30866, 0.22221],
    "the cosine ends a step early, at 0": RISE + [(1 + math.cos(math.pi * k / 11)) / 2 for k in range(12)],
    "the cosine starts a step early": RISE + [(1 + math.cos(math.pi * k / 12)) / 2 for k in range(1, 13)],
    "the cosine the other way round": RISE + [1 - value for value in FALL],
    "the rise ends a step late": [value * 4 / 5 for value in RISE] + FALL,
    "no warm-up": [1.0, 0.99039, 0.96194, 0.91573, 0.85355, 0.77779, 0.69134, 0.59755]
    + [0.5, 0.40245, 0.30866, 0.22221, 0.14645, 0.08427, 0.03806, 0.00961],
    "warm-up taken as a number of steps, not as a share": [1.0, 1.0, 0.98907, 0.95677, 0.90451, 0.83457, 0.75, 0.65451]
    + [0.55226, 0.44774, 0.34549, 0.25, 0.16543, 0.09549, 0.04323, 0.01093],
    "peak does not count": [value / 3 for value in RISE + FALL],
}


def rates(steps, warmup, peak):
    return [train.learning_rate(step, steps, warmup, peak) for step in range(steps)]


def test_exercise_6_a_line_up_and_half_a_cosine_down():
    mistakes = {name: [3 * value for value in values] for name, values in MISTAKES.items()}
    fails_like(rates(16, 0.25, 3.0), [3 * value for value in RISE + FALL], mistakes, "the schedule", 2e-5)


def test_exercise_6_the_values_are_exact_where_cosines_are():
    got = rates(16, 0.25, 1.0)
    assert [got[4], got[8], got[10], got[12]] == pytest.approx([1.0, 0.75, 0.5, 0.25], abs=1e-12)


def test_exercise_6_the_fall_ends_near_0():
    assert train.learning_rate(999, 1000, 0.1, 1.0) < 1e-5, (
        "the last of many steps gets almost nothing: there is no floor"
    )


def test_exercise_6_without_warm_up_the_first_step_gets_the_peak():
    """One step of warm-up is the least there is."""
    mistakes = {"the first step gets nothing": [0.0, *FALL]}
    fails_like(rates(13, 0.0, 1.0), [1.0, *FALL], mistakes, "the schedule without warm-up", 2e-5)


def test_exercise_6_the_warm_up_is_a_share_rounded_to_whole_steps():
    """0.3 of 12 steps are 4, 0.2 of them are 2, and one step is the least."""
    for warmup, rising in ((0.3, 4), (0.2, 2), (0.01, 1)):
        got = rates(12, warmup, 1.0)[:rising]
        mistakes = {
            f"the share is rounded {way}": [min(1, (i + 1) / n) for i in range(rising)]
            for way, n in (("down", max(rising - 1, 1)), ("up", rising + 1))
        }
        message = f"the rise over {rising} steps"
        fails_like(got, [(i + 1) / rising for i in range(rising)], mistakes, message, 1e-9)


def test_exercise_6_runs_of_a_step_or_of_warm_up_alone_do_not_divide_by_0():
    assert rates(1, 0.5, 2.0) == [2.0], "a run of one step takes it at the peak"
    assert rates(4, 1.0, 2.0) == pytest.approx([0.5, 1.0, 1.5, 2.0])
    after = train.learning_rate(4, 4, 1.0, 2.0)
    assert 0 <= after <= 2.0, "a step after the last one of warm-up alone"
