"""The exercises that the source announces in its docstrings, and the score that `pytest -m exercise` prints.

A row of a docstring marks an exercise: the body of that function, or of every method of that class, is the answer.

    Exercise 3   medium, 40 minutes: what there is to do, run `pytest -k exercise_3`
    Exercise 3   with masked_attention      (a second function of the same exercise)

Its tests are called test_exercise_3_...; its points are given when all of them pass.
"""

import ast
import json
import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SOURCES = ("dualenc.py", "train.py", "eval.py")
POINTS = {"easy": 5, "medium": 10, "hard": 15}
ROW = re.compile(r"Exercise (\d+) +(?:(\w+), (\d+) minutes: (.+), run `pytest -k exercise_\1`|with \w+)$", re.MULTILINE)


@dataclass
class Exercise:
    """One exercise, as its rows tell."""

    number: int
    difficulty: str = ""  # a key of POINTS
    minutes: int = 0
    task: str = ""
    places: list = field(default_factory=list)  # (file, name such as "DualEncoder.lock") of each function to write

    @property
    def points(self):
        return POINTS[self.difficulty]


def functions(tree):
    """{name: ast.FunctionDef} of a module's functions and of its classes' methods, such as "DualEncoder.lock"."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found.update({f"{node.name}.{name}": method for name, method in functions(node).items()})
    return found


def find_exercises(root):
    """{number: Exercise} of the sources below root, in the order of the numbers."""
    exercises = {}
    for file in SOURCES:
        tree = ast.parse((root / file).read_text())
        methods = functions(tree)
        classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        for name, node in {**methods, **classes}.items():
            for number, difficulty, minutes, task in ROW.findall(ast.get_docstring(node) or ""):
                exercise = exercises.setdefault(int(number), Exercise(int(number)))
                own = [method for method in methods if method.startswith(f"{name}.")] if name in classes else [name]
                exercise.places += [(file, function) for function in own]
                if difficulty:
                    exercise.difficulty, exercise.minutes, exercise.task = difficulty, int(minutes), task
    return dict(sorted(exercises.items()))


def score(exercise, outcomes):
    """What tests say about an exercise, for the table and for the results file.

    outcomes  {name of a test: None if it passed, else the message}
    """
    failures = {name: message for name, message in outcomes.items() if message is not None}
    return {
        "exercise": exercise.number,
        "task": exercise.task,
        "passed": len(outcomes) - len(failures),
        "tests": len(outcomes),
        "points": exercise.points if outcomes and not failures else 0,
        "out_of": exercise.points,
        "names": list(outcomes),
        "failures": failures,
    }


def total(scores):
    """The content of the results file."""
    points, out_of = (sum(row[name] for row in scores) for name in ("points", "out_of"))
    return {"points": points, "out_of": out_of, "exercises": scores}


def score_lines(results):
    """The table, a line an exercise, with what its first failure says."""
    width = max(len(row["task"]) for row in results["exercises"])
    yield f"{'exercise':<{width + 4}}  tests    points"
    for row in results["exercises"]:
        tests, points = f"{row['passed']}/{row['tests']}", f"{row['points']} of {row['out_of']}"
        said = textwrap.shorten(next(iter(row["failures"].values()), ""), 150)
        yield f"{row['exercise']:>2}  {row['task']:<{width}}  {tests:>5}  {points:>8}   {said}".rstrip()
    yield f"{'total':<{width + 4}}         {results['points']} of {results['out_of']}"


# ---- Hooks that conftest.py hands to pytest -------------------------------------------------------------------------


LONGEST_MESSAGE = 1000  # characters
COLLECTED = pytest.StashKey()  # names of the tests that were to run


def pytest_addoption(parser):
    parser.addoption("--score-file", type=Path, help="write the score of `-m exercise` to this JSON file")


def pytest_configure(config):
    # -k looks for parts of names, and exercise_1 is a part of exercise_12.
    config.option.keyword = re.sub(r"\bexercise_(\d+)\b", r"exercise_\1_", config.option.keyword)


def message_of(report):
    """The line of a failure that says most: the first, or the last where another process's traceback follows it."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else str(report.longrepr)).strip().splitlines()
    return (lines[-1] if lines[0].rstrip().endswith("ProcessRaisedException:") else lines[0])[:LONGEST_MESSAGE]


def pytest_collection_finish(session):
    session.config.stash[COLLECTED] = [item.nodeid for item in session.items]


def pytest_terminal_summary(terminalreporter, config):
    """A table, if exercises were asked for. What did not pass has failed: also a test that was skipped or never run."""
    reports = [r for kind in ("passed", "failed", "error") for r in terminalreporter.stats.get(kind, ())]
    messages = dict.fromkeys(config.stash.get(COLLECTED, ()), "it did not run to its end: did the code skip or leave?")
    for report in reports:  # one that passes may still fail when it is taken down, and comes twice then
        messages[report.nodeid] = None if report.passed else message_of(report)
    outcomes = {}
    for test, message in messages.items():
        if named := re.search(r"::test_exercise_(\d+)_(.*)", test):
            outcomes.setdefault(int(named[1]), {})[named[2]] = message
    asked = "exercise" in config.option.markexpr + config.option.keyword or config.option.score_file
    asked = asked or len(messages) == sum(map(len, outcomes.values()))  # nothing else was run
    if not (asked and outcomes):
        return
    exercises = find_exercises(Path(__file__).parent.parent)
    results = total([score(exercises[number], outcomes[number]) for number in sorted(outcomes)])
    terminalreporter.section("score")
    for line in score_lines(results):
        terminalreporter.write_line(line)
    if config.option.score_file:
        config.option.score_file.write_text(json.dumps(results, indent=1) + "\n")
