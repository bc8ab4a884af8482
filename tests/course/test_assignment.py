"""The handout of the assignment, and what the grader does with what comes back."""

import ast
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import grade
import make_assignment
import pytest
from answers import ANSWERS
from scores import SOURCES, find_exercises, functions, pytest_configure

pytestmark = pytest.mark.course
ROOT = Path(__file__).resolve().parents[2]
EXERCISES = find_exercises(ROOT)


def body_of(number):
    """{name: body} of the answer to an exercise."""
    found = functions(ast.parse(ANSWERS[number]))
    return {n: "\n".join(map(ast.unparse, make_assignment.statements(f))) for n, f in found.items()}


@pytest.fixture
def submit(tmp_path):
    """A function that writes a submission: the handout's sources with these bodies."""

    def go(answers):
        folder = tmp_path / "submission"
        folder.mkdir()
        make_assignment.write_sources(folder, EXERCISES)
        for number, bodies in answers.items():
            file, name = EXERCISES[number].places[0]
            bodies = {name: bodies} if isinstance(bodies, str) else bodies
            text = make_assignment.replace_bodies((folder / file).read_text(), bodies)
            (folder / file).write_text(text)
        return folder

    return go


def graded(folder, *numbers, **limits):
    results = grade.grade(folder, {number: EXERCISES[number] for number in numbers}, **limits)
    return {row["exercise"]: row for row in results["exercises"]}


def test_docstring_rows_announce_every_exercise_once():
    assert list(EXERCISES) == list(range(1, 13))
    for exercise in EXERCISES.values():
        assert exercise.minutes > 0 and exercise.task and exercise.points in (5, 10, 15)
    sources = "".join((ROOT / file).read_text() for file in SOURCES)
    rows = [line for line in sources.splitlines() if re.search(r"Exercise \d+ ", line)]
    assert len([row for row in rows if "minutes" in row]) == 12, "each has one full row"
    locks = [("dualenc.py", "DualEncoder.lock"), ("dualenc.py", "DualEncoder.train")]
    assert EXERCISES[12].places == locks


def test_the_tests_of_an_exercise_can_be_run_alone():
    for number in EXERCISES:
        text = (ROOT / "tests" / "exercises" / f"test_exercise_{number}.py").read_text()
        names = re.findall(r"^def (test_\w+)", text, re.MULTILINE)
        assert names and all(name.startswith(f"test_exercise_{number}_") for name in names)
    config = SimpleNamespace(option=SimpleNamespace(keyword="exercise_1 or exercise_12 and not x"))
    pytest_configure(config)
    assert config.option.keyword == "exercise_1_ or exercise_12_ and not x", "1 is a part of 12"


def test_a_new_body_leaves_everything_else_to_the_letter():
    head = 'class A:\n    @staticmethod\n    def f(x,\n          y=1):\n        """Adds."""\n'
    body = "        # The secret comment.\n\n        return x + y\n"
    tail = "\n    def g(self): ...\n"
    got = make_assignment.replace_bodies(head + body + tail, {"A.f": "a = 1\nreturn a"})
    assert got == head + "        a = 1\n        return a\n" + tail


def test_the_handouts_sources_lack_the_answers_and_differ_in_nothing_else(tmp_path):
    make_assignment.write_sources(tmp_path, EXERCISES)
    marked = {place for exercise in EXERCISES.values() for place in exercise.places}
    marked |= {place for places in make_assignment.LOOK_ALIKES.values() for place in places}
    for file in SOURCES:
        before = functions(ast.parse((ROOT / file).read_text()))
        after = functions(ast.parse((tmp_path / file).read_text()))
        assert list(before) == list(after)
        for name, node in before.items():
            assert (ast.unparse(node) != ast.unparse(after[name])) == ((file, name) in marked), name
    make_assignment.check_secrecy(tmp_path, EXERCISES)
    body = ast.unparse(functions(ast.parse((ROOT / "dualenc.py").read_text()))["clip_loss"])
    cell = {"source": body.splitlines(keepends=True)}
    (tmp_path / "lesson.ipynb").write_text(json.dumps({"cells": [cell]}))
    with pytest.raises(ValueError, match="lesson.ipynb shows the answer of Exercise 1"):
        make_assignment.check_secrecy(tmp_path, EXERCISES)


def test_a_handout_of_some_exercises_leaves_the_others_in(tmp_path):
    chosen = make_assignment.choose("8,1")
    assert list(chosen) == [1, 8]
    make_assignment.write_sources(tmp_path, chosen)
    make_assignment.copy_tests(tmp_path, chosen)
    make_assignment.write_readme(tmp_path, chosen)
    text = (tmp_path / "dualenc.py").read_text()
    assert "Exercise 1:" in text and "looks like the answer of Exercise 1" in text
    assert 'NotImplementedError("Exercise 3' not in text
    tests = {path.name for path in (tmp_path / "tests" / "exercises").iterdir()}
    assert tests == {"test_exercise_1.py", "test_exercise_8.py"}
    readme = (tmp_path / "README.md").read_text()
    assert "`class_embeds` in `eval.py` | easy | 5 | 20 |" in readme and "{" not in readme
    assert "| | | | | 10 | 40 |" in readme, "points and minutes in all"


def test_notebooks_handed_out_hold_the_chosen_exercises_and_no_answer():
    def cell(source, *tags):
        filled = {"outputs": ["6/6"], "execution_count": 3, "metadata": {"tags": tags}}
        return {"cell_type": "code", "source": [source], **filled}

    cells = [cell("test(3)", "exercise 3"), cell("test(4)", "exercise 4"), cell("own", "answer 4")]

    def shown(exercises):
        found = make_assignment.student_notebook({"cells": cells}, exercises)["cells"]
        return [(c["source"][0], bool(c["outputs"])) for c in found]

    left_out = "# left out: it looks like the answer of Exercise 4"
    assert shown([4, 7]) == [("test(4)", False), (left_out, False)]
    assert shown([7]) == [("own", True)]


def test_the_assignments_notebook_tests_every_exercise():
    notebook = json.loads((ROOT / "notebooks" / "07_assignment.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    found = {tuple(c["metadata"].get("tags", ())): "".join(c["source"]) for c in cells}
    found.pop(())
    assert found == {(f"exercise {number}",): f"test({number})" for number in EXERCISES}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["full"], "full is there and not empty; name another folder"),
        (["new", "--exercises", "1,13"], "--exercises is '1,13', expected numbers up to 12"),
    ],
)
def test_a_handout_is_refused_in_one_sentence(tmp_path, arguments, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    with pytest.raises(SystemExit, match=message):
        make_assignment.main([str(tmp_path / arguments[0]), *arguments[1:]])
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_right_and_wrong_answers_are_told_apart_and_written_down(submit, tmp_path, monkeypatch):
    wrong = body_of(4)["masked_mean"].replace("mask.sum(1)", "hidden.shape[1]")
    folder, out = submit({5: body_of(5), 4: wrong}), tmp_path / "ada.json"
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k nothing")  # meant for us, not for students' tests
    grade.main([str(folder), "--exercises", "4,5", "--out", str(out)])
    results = json.loads(out.read_text())
    four, five = results["exercises"]
    assert (results["points"], results["out_of"]) == (5, 10)
    assert five["points"] == 5 and five["stopped"] is None
    assert four["points"] == 0 and four["passed"] < four["tests"]
    assert any("but counted in the number" in said for said in four["failures"].values())


def test_only_bodies_of_the_exercise_are_used(submit):
    folder = submit({5: "return helper(input_ids)", 4: "return 'mine'"})
    text = (folder / "dualenc.py").read_text() + "\ndef helper(x): return x\n"
    (folder / "dualenc.py").write_text(text.replace("(input_ids, pad_token_id)", "(input_ids)"))
    ours = (ROOT / "dualenc.py").read_text()
    bodies = {"positions_after_pad": "return helper(input_ids)"}
    expected = make_assignment.replace_bodies(ours, bodies)
    assert grade.student_sources(folder, EXERCISES[5])["dualenc.py"] == expected
    source = grade.student_sources(ROOT, EXERCISES[1])["dualenc.py"]
    for name in ("tiled_clip_loss", "multi_positive_clip_loss"):
        body = ast.unparse(functions(ast.parse(source))[name])
        assert "not to be called" in body, "it would answer Exercise 1 in one call"


FIRST = "import os, sys, time, pytest\nif pad_token_id == 9:\n    {}\n"  # in one of the tests


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pytest.skip()", "did not run to its end"),
        ("os._exit(0)", "ended without a result, exit status 0: any_number"),
        ("sys.exit(0)", "SystemExit: 0"),
        ("hog = [bytearray(10**9) for _ in range(9)]", "MemoryError"),
        ("time.sleep(999)", "stopped after 20 seconds"),
    ],
)
def test_an_answer_that_leaves_or_eats_everything_is_reported(submit, line, message):
    body = FIRST.format(line) + body_of(5)["positions_after_pad"]
    row = graded(submit({5: body}), 5, seconds=20 if "sleep" in line else 90, memory=3.0)[5]
    assert row["points"] == 0
    assert any(re.search(message, said) for said in row["failures"].values()), row["failures"]


def test_a_source_that_is_missing_or_no_python_costs_its_exercises(submit):
    folder = submit({6: body_of(6)})
    (folder / "dualenc.py").write_text("def positions_after_pad(((")
    rows = graded(folder, 5, 6)
    assert rows[5]["points"] == 0 and "no usable positions_after_pad" in rows[5]["stopped"]
    assert rows[6]["points"] == 5
    with pytest.raises(SystemExit, match="none of dualenc.py, train.py, eval.py in"):
        grade.main([str(folder / "nowhere")])
    with pytest.raises(SystemExit, match="our own answer to Exercise 6 fails here: stopped"):
        grade.main([str(folder), "--exercises", "6", "--seconds", "0"])


@pytest.mark.slow
def test_the_whole_assignment_from_handout_to_grade(tmp_path):
    """All red as handed out; graded when half is right; all green with right answers."""
    handout = tmp_path / "handout"
    make_assignment.main([str(handout)])
    listing = subprocess.run(["find", "."], cwd=handout, capture_output=True, text=True).stdout
    for secret in ("answers", "make_assignment", "grade.py", "test_model", "__pycache__"):
        assert secret not in listing
    for number, exercise in EXERCISES.items():
        path = handout / exercise.places[0][0]
        bodies = body_of(number)
        path.write_text(make_assignment.replace_bodies(path.read_text(), bodies))
        if number == 6:
            rows = graded(handout, 1, 6, 7, 12)
    for number, row in rows.items():
        assert row["passed"] == (row["tests"] if number <= 6 else 0) and row["stopped"] is None
    assert make_assignment.run_exercises(handout)["points"] == 110
