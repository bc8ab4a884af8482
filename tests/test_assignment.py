"""Claims about the assignment: what the handout holds and lacks, and what the grader does with what comes back."""

import ast
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from answers import ANSWERS
from scores import SOURCES, find_exercises, functions, pytest_configure, score, score_lines, total

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "notebooks"))
make_assignment = importlib.import_module("make_assignment")
grade = importlib.import_module("grade")
EXERCISES = find_exercises(ROOT)
SLOW = pytest.mark.slow


def body_of(number):
    """{name: body} of the answer to an exercise."""
    found = functions(ast.parse(ANSWERS[number]))
    return {name: "\n".join(map(ast.unparse, make_assignment.statements(node))) for name, node in found.items()}


@pytest.fixture
def submit(tmp_path):
    """A function that writes a submission, from the handout's sources and {exercise: body or {name: body}}."""

    def go(answers=(), edit=lambda file, text: text):
        folder = tmp_path / "submission"
        folder.mkdir()
        make_assignment.write_sources(folder, EXERCISES)
        for number, bodies in dict(answers).items():
            file, name = EXERCISES[number].places[0]
            path, bodies = folder / file, {name: bodies} if isinstance(bodies, str) else bodies
            path.write_text(make_assignment.replace_bodies(path.read_text(), bodies))
        for file in SOURCES:
            (folder / file).write_text(edit(file, (folder / file).read_text()))
        return folder

    return go


def graded(folder, *numbers, **limits):
    results = grade.grade(folder, {number: EXERCISES[number] for number in numbers}, **limits)
    return results, {row["exercise"]: row for row in results["exercises"]}


# ---- The exercises in the source ------------------------------------------------------------------------------------


def test_rows_of_docstrings_announce_every_exercise_once():
    assert list(EXERCISES) == list(range(1, 13))
    for number, exercise in EXERCISES.items():
        assert exercise.minutes > 0 and exercise.task and exercise.points in (5, 10, 15), number
        assert (ROOT / "tests" / "exercises" / f"test_exercise_{number}.py").exists()
    rows = [
        line for file in SOURCES for line in (ROOT / file).read_text().splitlines() if re.search(r"Exercise \d", line)
    ]
    full = [line for line in rows if "minutes" in line]
    assert len(full) == 12 and len(rows) == 14, "12 exercises, two of which are written in a second place"
    assert EXERCISES[12].places == [("dualenc.py", "DualEncoder.lock"), ("dualenc.py", "DualEncoder.train")]
    assert EXERCISES[9].places == [("dualenc.py", f"TiledLogSumExp.{way}") for way in ("forward", "backward")]


def test_tests_of_an_exercise_are_named_and_marked_so_that_pytest_finds_them_alone():
    for number in EXERCISES:
        text = (ROOT / "tests" / "exercises" / f"test_exercise_{number}.py").read_text()
        names = re.findall(r"^def (test_\w+)", text, re.MULTILINE)
        assert names and all(name.startswith(f"test_exercise_{number}_") for name in names)
        assert "pytestmark = pytest.mark.exercise" in text
    config = SimpleNamespace(option=SimpleNamespace(keyword="exercise_1 or exercise_12 and not exercise_3_padding"))
    pytest_configure(config)
    assert config.option.keyword == "exercise_1_ or exercise_12_ and not exercise_3_padding", "1 is a part of 12"


def test_points_are_given_when_all_tests_pass():
    exercise = EXERCISES[1]
    assert score(exercise, {"a": None, "b": None})["points"] == 5
    assert score(exercise, {"a": None, "b": "wrong"})["points"] == score(exercise, {})["points"] == 0
    results = total([score(exercise, {"a": None, "b": "Failed: one direction only"}), score(EXERCISES[9], {"a": None})])
    assert (results["points"], results["out_of"]) == (15, 20)
    lines = list(score_lines(results))
    assert re.search(r"^ 1  the loss .* 1/2 +0 of 5 +Failed: one direction only$", lines[1]) and "15 of 20" in lines[-1]


# ---- The handout ----------------------------------------------------------------------------------------------------


def test_stubs_keep_signature_decorators_and_docstring_and_nothing_of_the_body():
    source = '''
class A:
    @staticmethod
    def f(x,
          y=1):
        """Adds."""
        # The secret comment.

        total = x + y  # secret
        return total

    def g(self):
        # Another secret.
        return 1


def after():
    return "kept"
'''
    got = make_assignment.replace_bodies(source, {"A.f": "raise NotImplementedError", "A.g": "a = 1\nreturn a"})
    assert got == source.replace(
        "        # The secret comment.\n\n        total = x + y  # secret\n        return total\n",
        "        raise NotImplementedError\n",
    ).replace("        # Another secret.\n        return 1\n", "        a = 1\n        return a\n")


def test_the_handouts_sources_lack_the_answers_and_differ_in_nothing_else(tmp_path):
    make_assignment.write_sources(tmp_path, EXERCISES)
    marked = {place for exercise in EXERCISES.values() for place in exercise.places}
    marked |= {place for places in make_assignment.LOOK_ALIKES.values() for place in places}
    for file in SOURCES:
        ours, theirs = (ROOT / file).read_text(), (tmp_path / file).read_text()
        assert len(theirs.splitlines()) < len(ours.splitlines())
        before, after = functions(ast.parse(ours)), functions(ast.parse(theirs))
        assert list(before) == list(after)
        for name, node in before.items():
            assert ast.get_docstring(node) == ast.get_docstring(after[name])
            assert ast.unparse(node.args) == ast.unparse(after[name].args)
            assert (ast.unparse(node) != ast.unparse(after[name])) == ((file, name) in marked), name
        for _, name in (place for place in marked if place[0] == file):
            assert "raise NotImplementedError(" in ast.unparse(make_assignment.statements(after[name]))
    assert 'NotImplementedError("Exercise 5: positions' in (tmp_path / "dualenc.py").read_text()


def test_a_handout_of_some_exercises_leaves_the_others_in(tmp_path):
    chosen = make_assignment.choose("8,1")
    assert list(chosen) == [1, 8]
    make_assignment.write_sources(tmp_path, chosen)
    make_assignment.copy_tests(tmp_path, chosen)
    make_assignment.write_readme(tmp_path, chosen)
    text = (tmp_path / "dualenc.py").read_text()
    assert "Exercise 1:" in text and "left out: it looks like the answer of Exercise 1" in text
    assert 'NotImplementedError("Exercise 3' not in text and "answer of Exercise 9" not in text
    tests = {path.name for path in (tmp_path / "tests" / "exercises").iterdir()}
    assert tests == {"test_exercise_1.py", "test_exercise_8.py"}
    readme = (tmp_path / "README.md").read_text()
    assert "| 8 | a classifier made of captions | `class_embeds` in `eval.py` | easy | 5 | 20 |" in readme
    assert "| | | | | 10 | 40 |" in readme and "Honour code" in readme and "{" not in readme


def test_the_notebooks_handed_out_hold_the_chosen_exercises_and_no_answer():
    def cell(source, *tags):
        outputs = {"outputs": [{"text": ["6/6"]}], "execution_count": 3}
        return {"cell_type": "code", "metadata": {"tags": [*tags]}, "source": [source], **outputs}

    heading = {"cell_type": "markdown", "metadata": {"tags": ["exercise 3", "exercise 4"]}, "source": ["## Text"]}
    notebook = {
        "cells": [
            heading,
            cell("test(3)", "exercise 3"),
            cell("test(4)", "exercise 4"),
            cell("by hand", "hide-input", "answer 4"),
        ]
    }
    notebook = {**notebook, "nbformat": 4}
    got = make_assignment.student_notebook(notebook, [4, 7])
    assert [c["source"][0] for c in got["cells"]] == [
        "## Text",
        "test(4)",
        "# left out: it looks like the answer of Exercise 4",
    ]
    assert all(c["outputs"] == [] and c["execution_count"] is None for c in got["cells"][1:]) and got["nbformat"] == 4
    others = make_assignment.student_notebook(notebook, [7])
    assert [(c["source"][0], c["outputs"][0]["text"]) for c in others["cells"]] == [("by hand", ["6/6"])]
    staff = make_assignment.student_notebook(notebook, [3, 4], with_solutions=True)
    assert [c["source"][0] for c in staff["cells"]] == ["## Text", "test(3)", "test(4)", "by hand"]
    assert notebook["cells"][1]["outputs"], "what is handed out is a copy"


def test_the_notebook_of_the_assignment_tests_every_exercise_in_a_cell_of_its_own():
    cells = json.loads((ROOT / "notebooks" / "07_assignment.ipynb").read_text())["cells"]
    tests = {tuple(c["metadata"].get("tags", ())): "".join(c["source"]) for c in cells if c["cell_type"] == "code"}
    assert {tags: test for tags, test in tests.items() if tags} == {(f"exercise {n}",): f"test({n})" for n in EXERCISES}


def test_only_the_lessons_are_handed_out_and_nothing_else_that_lies_there(tmp_path, monkeypatch):
    for name in ("01_lesson.ipynb", "exam.ipynb", "ada.json", "grade.py", "requirements.txt"):
        (tmp_path / "notebooks").mkdir(exist_ok=True)
        (tmp_path / "notebooks" / name).write_text('{"cells": []}')
    monkeypatch.setattr(make_assignment, "ROOT", tmp_path)
    (tmp_path / "out").mkdir()
    make_assignment.copy_notebooks(tmp_path / "out", [1])
    assert {p.name for p in (tmp_path / "out" / "notebooks").iterdir()} == {"01_lesson.ipynb", "requirements.txt"}


def test_an_answer_anywhere_in_the_handout_is_noticed(tmp_path):
    make_assignment.write_sources(tmp_path, EXERCISES)
    make_assignment.check_secrecy(tmp_path, EXERCISES)
    source = (ROOT / "dualenc.py").read_text()
    first, last = make_assignment.body_lines(source, functions(ast.parse(source))["clip_loss"])
    lines = [line + "\n" for line in source.splitlines()[first:last]]
    for cell in ({"source": lines}, {"source": "print_source()", "outputs": [{"text": lines}]}):
        (tmp_path / "lesson.ipynb").write_text(json.dumps({"cells": [cell]}))
        with pytest.raises(ValueError, match="lesson.ipynb shows the answer of Exercise 1"):
            make_assignment.check_secrecy(tmp_path, EXERCISES)


def test_a_test_of_the_wrong_colour_stops_the_handout():
    row = score(EXERCISES[1], {"a": None, "b": "wrong"})
    for green in (True, False):
        with pytest.raises(ValueError, match="Exercise 1: 1 of 2 tests pass.*|Exercise 2 has no test"):
            make_assignment.check_colour(total([row]), {1: EXERCISES[1]}, green)
    with pytest.raises(ValueError, match="Exercise 2 has no test"):
        make_assignment.check_colour(total([]), {2: EXERCISES[2]}, green=True)
    make_assignment.check_colour(total([score(EXERCISES[1], {"a": None})]), {1: EXERCISES[1]}, green=True)


def test_a_folder_where_pytest_does_not_start_is_reported(tmp_path):
    with pytest.raises(ValueError, match="pytest gave no score"):
        make_assignment.run_exercises(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["full"], "full is there and not empty; name another folder"),
        (["file"], "file is there and not empty"),
        (["new", "--exercises", "1,13"], "--exercises is '1,13', expected numbers out of 1 to 12"),
        (["new", "--exercises", "one"], "--exercises is 'one', expected numbers"),
    ],
)
def test_a_handout_is_refused_with_one_line_and_leaves_nothing(tmp_path, capsys, arguments, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    (tmp_path / "file").write_text("mine too")
    with pytest.raises(SystemExit) as stop:
        make_assignment.main([str(tmp_path / arguments[0]), *arguments[1:]])
    said = capsys.readouterr().err
    assert stop.value.code == 1 and message in said and said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
    assert (tmp_path / "full" / "precious.txt").read_text() == "mine" and (tmp_path / "file").read_text() == "mine too"


def test_a_handout_goes_into_an_empty_folder_once_its_colours_are_seen(tmp_path, capsys, monkeypatch):
    """Two exercises: green with the answers, then red without; then a copy for staff. The slow test runs pytest."""
    seen = []

    def run_exercises(folder):
        green = (folder / "dualenc.py").read_bytes() == (ROOT / "dualenc.py").read_bytes()
        seen.append("green" if green else "red")
        return total([score(exercise, {"a": None if green else "red"}) for exercise in EXERCISES.values()])

    monkeypatch.setattr(make_assignment, "run_exercises", run_exercises)
    handout = tmp_path / "deep" / "handout"
    handout.mkdir(parents=True)
    make_assignment.main([str(handout), "--exercises", "4,5"])
    assert "2 exercises, 10 points; all red here" in capsys.readouterr().out and seen == ["green", "red"]
    names = {str(path.relative_to(handout)) for path in handout.rglob("*") if path.is_file()}
    assert {"README.md", "dualenc.py", "tests/exercises/test_exercise_4.py", "requirements.txt"} <= names
    for secret in ("answers", "make_assignment", "grade.py", ".git/", "test_lesson", "__pycache__"):
        assert not any(secret in name for name in names), secret
    make_assignment.main([str(tmp_path / "staff"), "--exercises", "4", "--with-solutions"])
    assert (tmp_path / "staff" / "dualenc.py").read_bytes() == (ROOT / "dualenc.py").read_bytes()
    assert "holds the solutions" in (tmp_path / "staff" / "README.md").read_text()
    monkeypatch.setattr(make_assignment, "LOOK_ALIKES", {})
    with pytest.raises(SystemExit):
        make_assignment.main([str(tmp_path / "telling"), "--exercises", "1"])
    assert "dualenc.py shows the answer of Exercise 1" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "staff"}, "no scratch folder is left"


# ---- The grader -----------------------------------------------------------------------------------------------------


def test_right_and_wrong_answers_of_a_class_are_told_apart_and_written_down(submit, tmp_path, monkeypatch, capsys):
    wrong = body_of(4)["masked_mean"].replace("mask.sum(1)", "hidden.shape[1]")
    ada, bob, out = submit({5: body_of(5), 4: wrong}), tmp_path / "bob", tmp_path / "grades"
    bob.mkdir()
    (bob / "dualenc.py").write_text("an empty file, nearly")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k nothing")  # what is set for us must not reach the students' tests
    grade.main([str(ada), str(bob), "--exercises", "4,5", "--out", str(out)])
    assert (out / "scores.csv").read_text().splitlines() == [
        "submission,points,out_of,exercise 4,exercise 5,stopped",
        "submission,5,10,0,5,0",
        "bob,0,10,0,0,2",
    ]
    results = json.loads((out / "submission.json").read_text())
    rows = {row["exercise"]: row for row in results["exercises"]}
    assert (results["points"], results["out_of"]) == (5, 10) and results["ignored"] == []
    assert rows[5]["points"] == 5 and rows[5]["passed"] == rows[5]["tests"] >= 4 and rows[5]["stopped"] is None
    assert rows[4]["points"] == 0 < rows[4]["passed"] < rows[4]["tests"] == len(rows[4]["names"])
    assert any("left out of the sum, but counted in the number" in said for said in rows[4]["failures"].values())
    assert results["limits"] == {"seconds": grade.SECONDS, "memory": grade.MEMORY} and results["versions"]["torch"]
    stopped = [row["stopped"] for row in json.loads((out / "bob.json").read_text())["exercises"]]
    assert [reason.partition(":")[0] for reason in stopped] == ["dualenc.py", "dualenc.py"]
    assert "no masked_mean in it" in stopped[0] and "5 of 10" in capsys.readouterr().out


def but_first(leave):
    """A right answer to exercise 5 that leaves one of its tests early: all that run pass."""
    return f"import pytest\nif pad_token_id == 9:\n    {leave}\n" + body_of(5)["positions_after_pad"]


@SLOW
def test_a_solution_that_hangs_is_stopped_with_what_it_started(submit, tmp_path):
    marker = f"sleep 98{id(tmp_path) % 1000}"
    body = f"import subprocess\nsubprocess.Popen({marker.split()})\nwhile True:\n    pass"
    _, rows = graded(submit({5: body}), 5, seconds=30)
    assert rows[5]["points"] == 0 and rows[5]["stopped"].startswith("stopped after 30 seconds")
    listed = subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True).stdout
    assert marker not in listed.splitlines()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param(but_first("pytest.skip()"), "did not run to its end", id="skips", marks=SLOW),
        pytest.param(but_first("pytest.exit('', 0)"), "did not run to its end", id="ends", marks=SLOW),
        pytest.param(but_first("pytest.xfail()"), "did not run to its end", id="xfails", marks=SLOW),
        pytest.param("import os\nos._exit(0)", "ended without a result, exit status 0, in real_tokens", id="leaves"),
        pytest.param("import os\nos.kill(os.getpid(), 9)", "without a result, by SIGKILL", id="kills", marks=SLOW),
        pytest.param(
            "import os\nopen('score.json', 'w').write('[]')\nos._exit(0)", "without a result", id="forges", marks=SLOW
        ),
        pytest.param("import os, shutil\nshutil.rmtree(os.getcwd())", "without a result|Error", id="wipes", marks=SLOW),
        pytest.param("hog = []\nwhile True:\n    hog.append(bytearray(10**8))", "MemoryError", id="memory", marks=SLOW),
        pytest.param("import sys\nsys.exit(0)", "SystemExit: 0", id="exits", marks=SLOW),
        pytest.param("while True:\n    print('spam' * 10**6)", "too large|without a result", id="disk", marks=SLOW),
    ],
)
def test_a_solution_that_eats_memory_or_disk_or_leaves_is_reported(submit, body, message):
    _, rows = graded(submit({5: body}), 5, memory=2.0)
    assert rows[5]["points"] == 0 and re.search(message, next(iter(rows[5]["failures"].values())))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text.replace("def positions_after_pad(", "def position("), "no positions_after_pad in it"),
        (
            lambda text: text.replace("def positions_after_pad(", "def position(") + "no Python",
            "no positions_after_pad",
        ),
        (lambda text: text.replace("def positions_after_pad(", "def positions_after_pad(("), "is no Python: "),
        (
            lambda text: text.replace("def positions_after_pad(", "async def positions_after_pad("),
            "must be a plain def",
        ),
        (lambda text: text + "\nX = 0x" + "f" * 5000 + "\ndef (", None),
        (lambda text: text.replace("    count = torch.cumsum", "```\n    count = torch.cumsum"), "is no Python"),
    ],
)
def test_what_is_no_python_costs_its_own_exercise_only(submit, edit, message):
    folder = submit({4: body_of(4), 5: body_of(5)})
    (folder / "dualenc.py").write_text(edit((folder / "dualenc.py").read_text()))
    sources = grade.student_sources(folder, EXERCISES[4])
    assert body_of(4)["masked_mean"].splitlines()[-1].strip() in sources["dualenc.py"]
    if message is None:  # a fault that is nobody's
        assert "torch.cumsum" in grade.student_sources(folder, EXERCISES[5])["dualenc.py"]
        assert "dualenc.py does not parse" in grade.ignored_edits(folder)[0]
        return
    with pytest.raises(grade.Unusable, match=message):
        grade.student_sources(folder, EXERCISES[5])
    _, rows = graded(folder, 5)
    assert rows[5]["points"] == 0 and re.search(message, rows[5]["stopped"])


def in_latin_1(text):
    return ("# -*- coding: latin-1 -*-\n# café\n" + text).encode("latin-1", "replace")


@pytest.mark.parametrize(
    "written",
    [
        pytest.param(lambda text: text.encode("utf-8-sig"), id="byte-order mark"),
        pytest.param(lambda text: text.replace("    ", "\t").encode("utf-8-sig"), id="mark and tabs"),
        pytest.param(lambda text: (text + "\nno Python").replace("    ", "\t").encode(), id="tabs, does not parse"),
        pytest.param(lambda text: text.replace("\n", "\r\n").encode(), id="Windows"),
        pytest.param(in_latin_1, id="latin-1 that says so"),
        pytest.param(lambda text: b"# caf\xe9\n" + text.encode(), id="latin-1 that does not"),
        pytest.param(lambda text: b"\0" + text.encode(), id="zeros"),
        pytest.param(
            lambda text: re.sub(r"(def positions_after_pad.*?:\n)", r"\1    pass\n\1", text).encode(), id="twice"
        ),
        pytest.param(
            lambda text: text.replace("def forward(", "<<<<<<< HEAD\n    def forward(", 1).encode(), id="marker"
        ),
    ],
)
def test_files_are_read_as_students_save_them(submit, written):
    folder = submit({5: body_of(5), 12: body_of(12)})
    text = (folder / "dualenc.py").read_text()
    (folder / "dualenc.py").write_bytes(written(text))
    assert "torch.cumsum(mask" in grade.student_sources(folder, EXERCISES[5])["dualenc.py"]
    assert "nn.Module.train(self, mode)" in grade.student_sources(folder, EXERCISES[12])["dualenc.py"]


def test_a_file_that_is_missing_or_no_file_costs_its_own_exercises_only(submit):
    folder = submit({6: body_of(6)})
    (folder / "dualenc.py").unlink()
    (folder / "dualenc.py").mkdir()
    with pytest.raises(grade.Unusable, match="no dualenc.py in the folder"):
        grade.student_sources(folder, EXERCISES[5])
    grade.student_sources(folder, EXERCISES[6])
    assert "no dualenc.py in the folder" in grade.ignored_edits(folder)[0]


def test_what_would_answer_an_exercise_in_one_call_is_taken_away_while_it_is_graded(submit):
    folder = submit({1: "return tiled_clip_loss(image_embeds, text_embeds, logit_scale)"})
    for number, is_there in ((1, False), (9, True)):
        source = grade.student_sources(folder, EXERCISES[number])["dualenc.py"]
        assert ("return share_of_mean(of_rows / 2 - pairs" in source) == is_there
        assert ("not to be called: it looks like the answer of Exercise 1" in source) != is_there


def test_an_answer_that_is_ours_word_for_word_is_told(submit):
    source = (ROOT / "dualenc.py").read_text()
    first, last = make_assignment.body_lines(source, functions(ast.parse(source))["masked_mean"])
    ours = textwrap.dedent("\n".join(source.splitlines()[first:last])) + "  # mine"
    folder = submit({4: ours, 5: body_of(5)})
    assert grade.same_as_ours(folder, EXERCISES[4]) and not grade.same_as_ours(folder, EXERCISES[5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "1"], "our own answer to Exercise 5 does not pass under these limits: stopped after 1 seconds"),
        (["--seconds", "0"], "limits of 0 seconds and 4.0 GiB"),
        (["--memory", "nan"], "limits of 120 seconds and nan GiB"),
        (["--memory", "-1"], "limits of 120 seconds and -1.0 GiB"),
        (["{}", "--out", "x.json"], "x.json is one file; for several submissions name a folder"),
        (["--out", "{}/old"], "scores.csv is there already"),
        (["{}", "--out", "{}/new"], "several submissions are called submission: one file would overwrite another"),
        (["{}/outer"], r"no dualenc.py in .*outer; there is one in .*outer/inner"),
        (["{}/nowhere"], "no folder .*nowhere"),
    ],
)
def test_a_grader_that_would_fail_everybody_stops_before_it_starts(submit, tmp_path, capsys, arguments, message):
    folder = submit({5: body_of(5)})
    (folder / "old").mkdir()
    (folder / "old" / "scores.csv").touch()
    (folder / "outer" / "inner").mkdir(parents=True)
    shutil.copy(folder / "dualenc.py", folder / "outer" / "inner")
    with pytest.raises(SystemExit) as stop:
        grade.main([str(folder), *(argument.format(folder) for argument in arguments), "--exercises", "5"])
    said = capsys.readouterr().err
    assert stop.value.code == 1 and re.search(message, said) and said.count("\n") == 1


def test_sigterm_ends_the_programs_as_ctrl_c_does():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    try:
        make_assignment.leave_when_told_to()
        with pytest.raises(SystemExit) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        assert stop.value.code == 143
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGHUP, before[1])


def test_a_body_that_parses_but_does_not_compile_is_reported(submit):
    folder = submit()
    for body in ("break", "nonlocal x", "+".join("1" * 20000)):
        text = make_assignment.replace_bodies((folder / "dualenc.py").read_text(), {"positions_after_pad": "pass"})
        head, _, tail = text.partition("    pass\n")
        (folder / "dualenc.py").write_text(f"{head}    {body}\n{tail}")
        with pytest.raises(grade.Unusable, match="dualenc.py: "):
            grade.student_sources(folder, EXERCISES[5])


def test_methods_are_found_in_a_file_that_does_not_parse(submit):
    folder = submit({12: body_of(12)}, lambda file, text: text + "\nthis is no Python\n")
    sources = grade.student_sources(folder, EXERCISES[12])
    assert "nn.Module.train(self, mode)" in sources["dualenc.py"]
    assert sources["dualenc.py"].count("def train(self") == 1


def test_only_bodies_of_the_exercise_are_taken_over(submit):
    """Not the signature, the helpers, the docstring, nor another exercise's body."""
    folder = submit(
        {5: "return helper(input_ids)", 4: "return 'mine'"}, lambda file, text: text + "\ndef helper(x): 1\n"
    )
    text = (folder / "dualenc.py").read_text().replace("(input_ids, pad_token_id):", "(input_ids, pad_token_id=7):")
    (folder / "dualenc.py").write_text(text.replace("RoBERTa's positions:", "My positions:"))
    sources = grade.student_sources(folder, EXERCISES[5])
    ours = (ROOT / "dualenc.py").read_text()
    assert sources["eval.py"] == (ROOT / "eval.py").read_text()
    assert sources["dualenc.py"] == make_assignment.replace_bodies(
        ours, {"positions_after_pad": "return helper(input_ids)"}
    )


def test_edits_outside_the_marked_functions_are_reported(submit):
    assert grade.ignored_edits(submit()) == []


def test_edits_outside_are_named_one_by_one(submit):
    def edit(file, text):
        if file == "train.py":
            return text + "\nthis is no Python\n"
        if file == "eval.py":
            return text
        text = text.replace("def masked_mean(hidden,", "def masked_mean(hiding,").replace("TILE = 1024", "TILE = 1")
        return text.replace("def gelu_tanh(x):\n", "import antigravity\n\n\ndef gelu_fast(x):\n")

    folder = submit({5: body_of(5)}, edit)
    (folder / "tests" / "exercises").mkdir(parents=True)
    (folder / "tests" / "exercises" / "test_exercise_1.py").write_text("def test_exercise_1_fine(): pass\n")
    edits = "\n".join(grade.ignored_edits(folder))
    for said in (
        "dualenc.py: masked_mean changed",
        "dualenc.py: import antigravity added",
        "dualenc.py: gelu_fast added",
        "dualenc.py: gelu_tanh removed",
        "train.py does not parse",
        "tests/exercises/test_exercise_1.py differs from ours",
    ):
        assert said in edits, edits
    assert "positions_after_pad" not in edits and "multi_positive" not in edits and "eval.py" not in edits


@SLOW
def test_the_whole_assignment_from_handout_to_grade(tmp_path):
    """All red as handed out; graded when half of it is written, half is right; all green with right answers."""
    handout = tmp_path / "handout"
    make_assignment.main([str(handout)])
    for number, exercise in EXERCISES.items():
        path = handout / exercise.places[0][0]
        path.write_text(make_assignment.replace_bodies(path.read_text(), body_of(number)))
        if number == 6:
            results, rows = graded(handout, *EXERCISES)
    assert results["points"] == sum(EXERCISES[number].points for number in range(1, 7)) and results["out_of"] == 110
    assert results["ignored"] == []
    for number, row in rows.items():
        assert row["passed"] == (row["tests"] if number <= 6 else 0) and row["stopped"] is None
        unwritten = f"NotImplementedError: Exercise {number}: {row['task']}"
        assert number <= 6 or unwritten in row["failures"].values()
    assert make_assignment.run_exercises(handout)["points"] == 110
