"""Tests of the exercises' tests: a right answer of another style passes, and tempting wrong ones are named."""

import ast
import functools
import importlib
import inspect
import itertools
import re
import sys
from pathlib import Path

import pytest
from answers import ANSWERS, WRONG
from scores import find_exercises, functions

ROOT = Path(__file__).parent.parent
EXERCISES = find_exercises(ROOT)


for folder in ("notebooks", "tests/exercises"):
    sys.path.append(str(ROOT / folder))
make_assignment = importlib.import_module("make_assignment")


def edited(source, edits):
    for old, new in [edits] if isinstance(edits[0], str) else edits:
        assert old in source, f"{old!r} is not in the answer"
        source = source.replace(old, new)
    return source


@functools.cache
def definition(file, name):
    """The source of one function or class of a file."""
    source = (ROOT / file).read_text()
    node = next(node for node in ast.parse(source).body if getattr(node, "name", None) == name)
    return ast.get_source_segment(source, node)


def install(answer, number, put):
    """Define anew the function or class that the exercise is about, with the answer's bodies.

    put  function of module, name and value that keeps it
    """
    file, name = EXERCISES[number].places[0]
    module, name = sys.modules[Path(file).stem], name.partition(".")[0]
    bodies = {
        function: "\n".join(map(ast.unparse, make_assignment.statements(node)))
        for function, node in functions(ast.parse(answer)).items()
    }
    assert set(bodies) == {function for _, function in EXERCISES[number].places}
    scope, source = {}, make_assignment.replace_bodies(definition(file, name), bodies)
    exec(compile("from __future__ import annotations\n" + source, file, "exec"), vars(module), scope)
    put(module, name, scope[name])


def with_answer(rank, answer, number, function, *arguments):
    """For a process of its own: install the answer there, then go on."""
    import dualenc  # noqa: F401

    install(answer, number, setattr)
    return function(rank, *arguments)


def failures(number, answer, monkeypatch):
    """What the tests of an exercise say about an answer: {name of the test: message}."""
    tests = importlib.import_module(f"test_exercise_{number}")
    install(answer, number, monkeypatch.setattr)
    if hasattr(tests, "in_processes"):  # the processes need the answer too
        in_processes = sys.modules["conftest"].in_processes
        monkeypatch.setattr(
            tests, "in_processes", lambda count, *call: in_processes(count, with_answer, answer, number, *call)
        )
        tests.outcome.cache_clear()
    said = {}
    for name, test in inspect.getmembers(tests, inspect.isfunction):
        if name.startswith("test_"):
            for arguments in each_call(test):
                with monkeypatch.context() as patch:
                    try:
                        test(**provide(test, tests, patch), **arguments)
                    except (Exception, pytest.fail.Exception) as error:
                        said[f"{name} {arguments or ''}"] = f"{type(error).__name__}: {error}"
    return said


def each_call(test):
    """The arguments of each case of a test with @pytest.mark.parametrize, or of the only one."""
    cases = [[{mark.args[0]: value} for value in mark.args[1]] for mark in getattr(test, "pytestmark", ())]
    return [{name: value for case in chosen for name, value in case.items()} for chosen in itertools.product(*cases)]


def provide(test, module, patch):
    """The fixtures that a test asks for: monkeypatch, or one of its own module that needs only that."""
    asked = {}
    for name in inspect.signature(test).parameters:
        if name == "monkeypatch":
            asked[name] = patch
        elif hasattr(getattr(module, name, None), "__wrapped__"):
            asked[name] = inspect.unwrap(getattr(module, name))(patch)
    return asked


@pytest.mark.parametrize("number", ANSWERS)
def test_a_right_answer_in_other_words_passes(number, monkeypatch):
    assert failures(number, ANSWERS[number], monkeypatch) == {}


def wrong_answers():
    """Every (number, mistake); those that start two processes each are slow, but for one."""
    for number, mistakes in WRONG.items():
        for mistake in mistakes:
            is_slow = number == 11 and mistake != "only this process's loss counts"
            yield pytest.param(number, mistake, id=f"{number}: {mistake}", marks=[pytest.mark.slow] * is_slow)


@pytest.mark.parametrize(("number", "mistake"), list(wrong_answers()))
def test_a_tempting_wrong_answer_is_red_and_named(number, mistake, monkeypatch):
    said = failures(number, edited(ANSWERS[number], WRONG[number][mistake]), monkeypatch)
    assert said, "this answer passes every test"
    assert any(re.search(mistake, message, re.DOTALL) for message in said.values()), said


def test_every_exercise_has_an_answer_and_at_least_four_wrong_ones():
    assert list(EXERCISES) == list(ANSWERS) == list(WRONG) == list(range(1, 13))
    assert min(map(len, WRONG.values())) >= 4
