"""Tests of the exercises' tests: right answers of another style pass, wrong ones are named."""

import ast
import importlib
import inspect
import itertools
import re
import sys
from pathlib import Path

import pytest
from answers import ANSWERS, WRONG
from scores import find_exercises, functions

import dualenc  # noqa: F401  the processes of Exercise 11 install an answer in it

pytestmark = pytest.mark.course
ROOT = Path(__file__).resolve().parents[2]
EXERCISES = find_exercises(ROOT)
sys.path += [str(ROOT / "notebooks"), str(ROOT / "tests" / "exercises")]
make_assignment = importlib.import_module("make_assignment")


def edited(source, edits):
    for old, new in [edits] if isinstance(edits, tuple) else edits:
        assert old in source, f"{old!r} is not in the answer"
        source = source.replace(old, new)
    return source


def definition(file, name):
    """The source of one function or class of a file."""
    source = (ROOT / file).read_text()
    node = next(node for node in ast.parse(source).body if getattr(node, "name", None) == name)
    return ast.get_source_segment(source, node)


def install(answer, number, put):
    """Define the exercise's function or class anew, with the answer's bodies.

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
    exec(
        compile("from __future__ import annotations\n" + source, file, "exec"), vars(module), scope
    )
    put(module, name, scope[name])


def with_answer(rank, answer, number, function, *arguments):
    """For a process of its own: install the answer there, then go on."""
    install(answer, number, setattr)
    return function(rank, *arguments)


def failures(number, answer, monkeypatch):
    """What the tests of an exercise say about an answer: {name of the test: message}."""
    tests = importlib.import_module(f"test_exercise_{number}")
    install(answer, number, monkeypatch.setattr)
    if hasattr(tests, "in_processes"):  # the processes need the answer too
        in_processes = sys.modules["support"].in_processes

        def start(count, *call):
            return in_processes(count, with_answer, answer, number, *call)

        monkeypatch.setattr(tests, "in_processes", start)
        tests.outcome.cache_clear()
    said = {}
    for name, test in inspect.getmembers(tests, inspect.isfunction):
        for arguments in each_call(test) if name.startswith("test_") else ():
            with monkeypatch.context() as patch:
                try:
                    test(**provide(test, tests, patch, arguments), **arguments)
                except (Exception, pytest.fail.Exception) as error:
                    said[f"{name} {arguments or ''}"] = f"{type(error).__name__}: {error}"
    return said


def each_call(test):
    """The arguments of each case of a parametrized test, or of the only one."""
    cases = []
    for mark in getattr(test, "pytestmark", ()):
        names, values = mark.args
        if isinstance(names, str):
            names, values = [names], [[value] for value in values]
        cases.append([dict(zip(names, row)) for row in values])
    return [
        {k: v for case in chosen for k, v in case.items()} for chosen in itertools.product(*cases)
    ]


def provide(test, module, patch, arguments):
    """The fixtures that a test asks for: monkeypatch, or one of its own module."""
    asked = {}
    for name in inspect.signature(test).parameters:
        if name == "monkeypatch":
            asked[name] = patch
        elif name not in arguments:
            fixture = inspect.unwrap(getattr(module, name))
            asked[name] = fixture(*[patch] * len(inspect.signature(fixture).parameters))
    return asked


@pytest.mark.parametrize("number", ANSWERS)
def test_a_right_answer_in_other_words_passes(number, monkeypatch):
    assert failures(number, ANSWERS[number], monkeypatch) == {}


@pytest.mark.parametrize(("number", "mistake"), [(n, m) for n in WRONG for m in WRONG[n]])
def test_a_tempting_wrong_answer_is_red_and_named(number, mistake, monkeypatch):
    said = failures(number, edited(ANSWERS[number], WRONG[number][mistake]), monkeypatch)
    assert said, "this answer passes every test"
    assert any(re.search(mistake, message, re.DOTALL) for message in said.values()), said


def test_every_exercise_has_an_answer_and_at_least_four_wrong_ones():
    assert list(EXERCISES) == list(ANSWERS) == list(WRONG) == list(range(1, 13))
    assert min(map(len, WRONG.values())) >= 4
