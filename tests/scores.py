"""The exercises that the source announces in its docstrings, and the score of `pytest -m exercise`.

A row of a docstring marks an exercise; the body of that function, or every method of that class, is
the answer. Its tests are called test_exercise_3_..., and all of them must pass for its points.

    Exercise 3   medium, 40 minutes: what there is to do, run `pytest -k exercise_3`
    Exercise 3   with masked_attention      (a second function of the same exercise)
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
FULL_ROW = r"(\w+), (\d+) minutes: (.+), run `pytest -k exercise_\1`"
ROW = re.compile(rf"Exercise (\d+) +(?:{FULL_ROW}|with \w+)$", re.MULTILINE)


@dataclass
class Exercise:
    number: int
    difficulty: str = ""  # a key of POINTS
    minutes: int = 0
    task: str = ""
    places: list = field(default_factory=list)  # (file, name such as "DualEncoder.lock")

    @property
    def points(self):
        return POINTS[self.difficulty]


def functions(tree):
    """{name: ast.FunctionDef} of a module's functions and methods; methods as "Class.method"."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}": method for name, method in functions(node).items()}
    return found


def find_exercises(root):
    """{number: Exercise} of the sources in a folder, in the order of the numbers."""
    exercises = {}
    for file in SOURCES:
        tree = ast.parse((root / file).read_text())
        methods = functions(tree)
        classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        for name, node in {**methods, **classes}.items():
            own = [m for m in methods if m.startswith(f"{name}.")] if name in classes else [name]
            for number, *row in ROW.findall(ast.get_docstring(node) or ""):
                found = exercises.setdefault(int(number), Exercise(int(number)))
                found.places += [(file, function) for function in own]
                if all(row):  # not the short row of a second function
                    found.difficulty, found.minutes, found.task = row[0], int(row[1]), row[2]
    return dict(sorted(exercises.items()))


def score(exercise, outcomes):
    """A row of the results, from {name of a test: None if it passed, else the message}."""
    failures = {name: message for name, message in outcomes.items() if message is not None}
    return {
        "exercise": exercise.number,
        "task": exercise.task,
        "passed": len(outcomes) - len(failures),
        "tests": len(outcomes),
        "points": exercise.points if outcomes and not failures else 0,
        "out_of": exercise.points,
        "failures": failures,
    }


def total(rows):
    """The content of the results file."""
    points, out_of = (sum(row[name] for row in rows) for name in ("points", "out_of"))
    return {"points": points, "out_of": out_of, "exercises": rows}


def score_lines(results):
    """The table: a line an exercise, with the message of its first failure."""
    width = max(len(row["task"]) for row in results["exercises"])
    yield f"{'exercise':<{width + 4}}  tests    points"
    for row in results["exercises"]:
        tests, points = f"{row['passed']}/{row['tests']}", f"{row['points']} of {row['out_of']}"
        said = textwrap.shorten(next(iter(row["failures"].values()), ""), 150)
        line = f"{row['exercise']:>2}  {row['task']:<{width}}  {tests:>5}  {points:>8}   {said}"
        yield line.rstrip()
    yield f"{'total':<{width + 4}}         {results['points']} of {results['out_of']}"


# ---- Hooks of pytest, for which conftest.py names this module ------------------------------------

COLLECTED = pytest.StashKey()  # names of the tests that were to run


def pytest_addoption(parser):
    parser.addoption("--score-file", type=Path, help="write the score of `-m exercise` as json")


def pytest_configure(config):
    # -k looks for parts of names, and exercise_1 is a part of exercise_12.
    config.option.keyword = re.sub(r"\bexercise_(\d+)\b", r"exercise_\1_", config.option.keyword)


def pytest_itemcollected(item):
    if item.name.startswith("test_exercise_"):
        item.add_marker("exercise")


def pytest_collection_finish(session):
    session.config.stash[COLLECTED] = [item.nodeid for item in session.items]


def message_of(report):
    """A failure's first line, or the last one, where it is another process's traceback."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else str(report.longrepr)).strip().splitlines()
    return lines[-1 if "ProcessRaisedException" in lines[0] else 0][:1000]


def pytest_terminal_summary(terminalreporter, config):
    """The table, if exercises were asked for. A test that was skipped or never ran has failed."""
    messages = dict.fromkeys(config.stash.get(COLLECTED, ()), "it did not run to its end")
    for kind in ("passed", "failed", "error"):  # a test that fails in its teardown comes twice
        for report in terminalreporter.stats.get(kind, ()):
            messages[report.nodeid] = None if report.passed else message_of(report)
    outcomes = {}  # {exercise: {test: message}}
    for test, message in messages.items():
        if named := re.search(r"::test_exercise_(\d+)_(.*)", test):
            outcomes.setdefault(int(named[1]), {})[named[2]] = message
    only_exercises = len(messages) == sum(map(len, outcomes.values()))
    if not outcomes or not (only_exercises or config.option.score_file):
        return
    exercises = find_exercises(Path(__file__).parent.parent)
    numbers = sorted(outcomes.keys() & exercises)
    results = total([score(exercises[number], outcomes[number]) for number in numbers])
    terminalreporter.section("score")
    terminalreporter.write("\n".join(score_lines(results)) + "\n")
    if config.option.score_file:
        config.option.score_file.write_text(json.dumps(results, indent=1) + "\n")
