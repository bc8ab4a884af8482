"""Tests of the exercises' tests: right answers of another style pass, wrong ones are named."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import support
from answers import ANSWERS, WRONG
from scores import find_exercises, message_of

pytestmark = pytest.mark.course
ROOT = Path(__file__).resolve().parents[2]
EXERCISES = find_exercises(ROOT)


def edited(source, edits):
    for old, new in [edits] if isinstance(edits, tuple) else edits:
        assert old in source, f"{old!r} is not in the answer"
        source = source.replace(old, new)
    return source


def install(answer, number, put):
    """Put the answer's function, or the methods of its class, in the place of ours.

    put  function of owner, name and value that keeps it
    """
    file, place = EXERCISES[number].places[0]
    owner, answers = importlib.import_module(Path(file).stem), {}
    exec(answer, vars(owner), answers)
    if "." in place:
        name = place.partition(".")[0]
        owner, answers = getattr(owner, name), vars(answers[name])
    for _, place in EXERCISES[number].places:
        name = place.rpartition(".")[2]
        put(owner, name, answers[name])


def with_answer(rank, answer, number, function, *arguments):
    """For a process of its own: install the answer there, then go on."""
    install(answer, number, setattr)
    return function(rank, *arguments)


class Failures(dict):
    """A plugin of pytest that keeps {name of a test: message}."""

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self[report.nodeid] = message_of(report)


def failures(number, answer, monkeypatch):
    """What the tests of an exercise say about an answer: {name of the test: message}."""
    install(answer, number, monkeypatch.setattr)
    in_processes = support.in_processes

    def start(count, *call):  # the processes need the answer too
        return in_processes(count, with_answer, answer, number, *call)

    monkeypatch.setattr(support, "in_processes", start)
    tests = ROOT / "tests" / "exercises" / f"test_exercise_{number}.py"
    monkeypatch.delitem(sys.modules, tests.stem, raising=False)  # for the other in_processes
    unused = ("terminal", "cacheprovider", "faulthandler", "unraisableexception")  # slow: gc
    plugins = (f"-pno:{name}" for name in unused)
    failed = Failures()
    status = pytest.main(["--override-ini=addopts=", *plugins, str(tests)], [failed])
    assert status == (1 if failed else 0), "the tests did not run"
    return failed


@pytest.mark.parametrize("number", ANSWERS)
def test_a_right_answer_in_other_words_passes(number, monkeypatch):
    assert failures(number, ANSWERS[number], monkeypatch) == {}


@pytest.mark.parametrize(("number", "mistake"), [(n, m) for n in WRONG for m in WRONG[n]])
def test_a_tempting_wrong_answer_is_red_and_named(number, mistake, monkeypatch):
    said = failures(number, edited(ANSWERS[number], WRONG[number][mistake]), monkeypatch)
    assert said, "this answer passes every test"
    assert any(re.search(mistake, message) for message in said.values()), said


def test_every_exercise_has_an_answer_and_at_least_four_wrong_ones():
    assert list(EXERCISES) == list(ANSWERS) == list(WRONG) == list(range(1, 13))
    assert min(map(len, WRONG.values())) >= 4
