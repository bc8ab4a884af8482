"""Write the handout of an assignment: the sources without the answers, the tests of the exercises, the notebooks.

    python notebooks/make_assignment.py ~/handout
    python notebooks/make_assignment.py ~/handout --exercises 1,2,5
    python notebooks/make_assignment.py ~/staff --with-solutions

A docstring row `Exercise n` marks a function to write; tests/scores.py says how. Its body becomes
`raise NotImplementedError("Exercise n: ...")`, and everything else stays as it is, to the letter. Before the folder
appears, every test in it has been seen red as it stands, and green with the answers put back.
"""

import argparse
import ast
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import scores

FILES = ("LICENSE", "requirements.txt", "pyproject.toml", "tests/conftest.py", "tests/references.py", "tests/scores.py")
NOTEBOOK_FILES = ("[0-9][0-9]_*.ipynb", "requirements.txt", "run.py", "retrieved.*")  # nothing else that lies there
SECONDS, MEMORY = 120, 4.0  # limits of an exercise when it is graded; GiB

# Functions that are no exercise, but so like one that they would show its answer: {exercise: (file, name)}.
LOOK_ALIKES = {
    1: [("dualenc.py", "multi_positive_clip_loss")],
    9: [("dualenc.py", "TiledSoftplus.forward"), ("dualenc.py", "TiledSoftplus.backward")],
}
# Functions that would answer an exercise in one call: the grader takes them away while it grades that exercise.
SHORTCUTS = {1: [("dualenc.py", "tiled_clip_loss"), ("dualenc.py", "tiled_multi_positive_clip_loss")]}
SHORTEST_TELLING_LINE = 25  # characters: below, a line such as `return self` tells nothing

README = """\
# {title}

Two towers, one for pictures and one for captions, learn to meet in one space: the module docstring of `dualenc.py`
shows the whole of it. The sources here are complete but for the exercises ({count}), bodies of functions. {where}

## Set up (about 5 minutes)

    python -m venv .venv && source .venv/bin/activate
    pip install -r requirements.txt
    pytest -m exercise

Python 3.10 or newer; no GPU and, after the installation, no network. The last command takes less than a minute, prints
the score, and everything is red: `Exercise 1: ...` is what a function says that is not written yet.

## The exercises

| | what there is to do | where | difficulty | points | minutes |
| --- | --- | --- | --- | --- | --- |
{table}
| | | | | {points} | {minutes} |

Minutes are for somebody who has read the source that comes before, and the paper if the docstring names one.

1. Read the docstring of the function: shapes, what it returns, what it raises.
2. Run its tests, say `pytest -k exercise_{first}`, and read them: they hold a slow version in loops, or a table.
3. Write the body. Run the tests again; when an answer is wrong in a well-known way, the message says which.
4. An exercise has its points when all of its tests pass. `--score-file=score.json` writes the table to a file.

Exercises do not need each other, so any order will do; whole models, as in the notebooks, only run once those of yours
that are in `DualEncoder` are written. `python train.py` needs most of them, and says which one it misses.
`notebooks/07_assignment.ipynb` has a question to think about before each; the other notebooks are lessons:
`pip install -r notebooks/requirements.txt && jupyter lab notebooks`. What you see in them is from a run of the whole
library.

## Rules

* Write inside the marked functions: only their bodies are graded, with fresh copies of everything else. A helper
  function or an import goes inside the body. Changes elsewhere, of arguments and tests too, are ignored and reported.
* An answer works by itself: one that calls another of the library's functions for the same thing has no points.
* Each exercise has {seconds} seconds and {memory} GiB of memory when it is graded, on a CPU.
* Hand in `dualenc.py`, `train.py` and `eval.py`.

## Honour code

Talk about ideas with whomever you like, and name them. Write the code yourself: do not look at the answers of others,
in the public repository of this library or elsewhere, and do not have a person or a program write them. If you used a
source beyond the papers and documentation named here, say which and for what.
"""


def starts(node):
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])


def statements(function):
    """The body of a function node, without its docstring."""
    return function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body


def body_lines(source, function):
    """(first, last) line, from 0 and past the end, of a function's body: after the docstring, with its comments."""
    lines = source.splitlines()
    first = starts(statements(function)[0]) - 1
    while lines[first - 1].lstrip().startswith("#") or not lines[first - 1].strip():
        first -= 1
    return first, function.end_lineno


def replace_bodies(source, bodies):
    """The source with other bodies: {name such as "DualEncoder.lock": text without indentation}."""
    lines, found = source.splitlines(keepends=True), scores.functions(ast.parse(source))
    for name in sorted(bodies, key=lambda name: -found[name].lineno):  # from below, so that numbers of lines stay
        first, last = body_lines(source, found[name])
        lines[first:last] = [textwrap.indent(bodies[name].rstrip() + "\n", " " * (found[name].col_offset + 4))]
    return "".join(lines)


def stubs(exercises, file):
    """{name: body} for the functions of one file that the handout goes without."""
    bodies = {}
    for number, exercise in exercises.items():
        own = {name: f"Exercise {number}: {exercise.task}" for place, name in exercise.places if place == file}
        alike = {name for place, name in LOOK_ALIKES.get(number, ()) if place == file}
        bodies |= {name: f"left out: it looks like the answer of Exercise {number}" for name in alike} | own
    return {name: f"raise NotImplementedError({json.dumps(message)})" for name, message in bodies.items()}


def write_sources(folder, exercises, with_solutions=False):
    for file in scores.SOURCES:
        source = (ROOT / file).read_text()
        (folder / file).write_text(source if with_solutions else replace_bodies(source, stubs(exercises, file)))


def copy_tests(folder, exercises):
    """The tests of the exercises, with what they lean on."""
    for file in (*FILES, *(f"tests/exercises/test_exercise_{number}.py" for number in exercises)):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)


def student_notebook(notebook, exercises, with_solutions=False):
    """A notebook as it is handed out: of the assignment the chosen exercises, and no cell that shows an answer.

    Tags of its cells say which are which: "exercise 3" belongs to that exercise, "answer 3" shows what to write there.
    """
    cells = []
    for cell in notebook["cells"]:
        tags = "\n".join(cell["metadata"].get("tags", ()))
        belongs, shows = (
            {int(number) for number in re.findall(rf"^{kind} (\d+)$", tags, re.MULTILINE)}
            for kind in ("exercise", "answer")
        )
        if belongs and not belongs & set(exercises):
            continue
        told = shows & set(exercises)
        if told and not with_solutions:
            cell = cell | {"source": [f"# left out: it looks like the answer of Exercise {min(told)}"]}
        if cell["cell_type"] == "code" and (belongs or told) and not with_solutions:
            cell = cell | {"outputs": [], "execution_count": None}
        cells.append(cell)
    return notebook | {"cells": cells}


def copy_notebooks(folder, exercises, with_solutions=False):
    (folder / "notebooks").mkdir()
    for path in (path for pattern in NOTEBOOK_FILES for path in (ROOT / "notebooks").glob(pattern)):
        shutil.copy(path, folder / "notebooks")
    for path in (folder / "notebooks").glob("*.ipynb"):
        notebook = student_notebook(json.loads(path.read_text()), exercises, with_solutions)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def write_readme(folder, exercises, with_solutions=False):
    rows, chosen = [], exercises.values()
    for exercise in chosen:
        where = ", ".join(f"`{name}` in `{file}`" for file, name in exercise.places)
        rows.append(
            f"| {exercise.number} | {exercise.task} | {where} | {exercise.difficulty} | {exercise.points} "
            f"| {exercise.minutes} |"
        )
    where = "A few functions that are too like them are gone too." if set(LOOK_ALIKES) & set(exercises) else ""
    where = "This copy holds the solutions." if with_solutions else where
    text = README.format(
        title="Contrastive learning of pictures and captions: the assignment",
        count=len(exercises),
        where=where,
        table="\n".join(rows),
        points=sum(exercise.points for exercise in chosen),
        minutes=sum(exercise.minutes for exercise in chosen),
        first=next(iter(exercises)),
        seconds=SECONDS,
        memory=f"{MEMORY:g}",
    )
    (folder / "README.md").write_text(text)


def run_exercises(folder):
    """The score (see scores.total) of the exercises in a folder."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "exercise"]
        done = subprocess.run([*command, f"--score-file={file.name}"], cwd=folder, capture_output=True, text=True)
        content = Path(file.name).read_text()
    if not content:
        raise ValueError(f"pytest gave no score:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads(content)


def check_colour(results, exercises, green):
    """ValueError unless every test of every exercise passed (green), or every single one failed."""
    tested = {row["exercise"] for row in results["exercises"]}
    wrong = [f"Exercise {number} has no test" for number in exercises if number not in tested]
    for row in results["exercises"]:
        expected = row["tests"] if green else 0
        if row["passed"] != expected:
            wrong.append(f"Exercise {row['exercise']}: {row['passed']} of {row['tests']} tests pass, not {expected}")
    if wrong:
        raise ValueError(
            f"with{'' if green else 'out'} the answers, the tests should be {'green' if green else 'red'}: {wrong}"
        )


def telling_lines(exercise):
    """The lines of an exercise's answer that are long enough to tell something."""
    for file, name in exercise.places:
        source = (ROOT / file).read_text()
        first, last = body_lines(source, scores.functions(ast.parse(source))[name])
        for line in source.splitlines()[first:last]:
            if len(line.strip()) >= SHORTEST_TELLING_LINE and not line.lstrip().startswith("#"):
                yield line.strip()


def text_of(path):
    """What a reader sees of a file: of a notebook, the cells and what they print."""
    if path.suffix != ".ipynb":
        return path.read_text(errors="replace")
    cells = json.loads(path.read_text())["cells"]
    printed = [output.get("text", "") for cell in cells for output in cell.get("outputs", ())]
    return "\n".join("".join(lines) for lines in [*(cell["source"] for cell in cells), *printed])


def check_secrecy(folder, exercises):
    """ValueError if two of an answer's telling lines stand in one file of the folder."""
    texts = {path: text_of(path) for path in folder.rglob("*") if path.is_file() and path.suffix != ".png"}
    for number, exercise in exercises.items():
        lines = set(telling_lines(exercise))
        for path, text in texts.items():
            shown = sorted(line for line in lines if line in text)
            if len(shown) > 1:
                raise ValueError(f"{path.relative_to(folder)} shows the answer of Exercise {number}: {shown}")


def build(folder, exercises, with_solutions=False):
    """Fill an empty folder and check it."""
    copy_tests(folder, exercises)
    copy_notebooks(folder, exercises, with_solutions)
    write_readme(folder, exercises, with_solutions)
    write_sources(folder, exercises, with_solutions=True)
    check_colour(run_exercises(folder), exercises, green=True)
    if not with_solutions:
        write_sources(folder, exercises)
        check_secrecy(folder, exercises)
        check_colour(run_exercises(folder), exercises, green=False)


def choose(words):
    """{number: Exercise} of a word such as "1,2,5"; all of them if it is empty."""
    exercises = scores.find_exercises(ROOT)
    try:
        numbers = sorted({int(word) for word in words.split(",")}) if words else list(exercises)
        return {number: exercises[number] for number in numbers}
    except (ValueError, KeyError):
        raise ValueError(f"--exercises is {words!r}, expected numbers out of 1 to {max(exercises)}: 1,2,5") from None


def leave_when_told_to():
    """From now on SIGTERM and SIGHUP end the program as Ctrl-C does, with its scratch folder and processes."""
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dest", type=Path, help="the folder to write: new, or empty")
    parser.add_argument("--exercises", default="", help="numbers such as 1,2,5 (default: all)")
    parser.add_argument("--with-solutions", action="store_true", help="leave the answers in: a copy for staff")
    args = parser.parse_args(argv)
    leave_when_told_to()
    args.dest = args.dest.expanduser().resolve()
    try:
        exercises = choose(args.exercises)
        if args.dest.exists() and (not args.dest.is_dir() or any(args.dest.iterdir())):
            raise ValueError(f"{args.dest} is there and not empty; name another folder")
        args.dest.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.dest.parent, prefix=".assignment-") as scratch:
            folder = Path(scratch) / "handout"
            folder.mkdir()
            build(folder, exercises, args.with_solutions)
            if args.dest.exists():
                args.dest.rmdir()
            folder.rename(args.dest)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    state = "with their answers, all green" if args.with_solutions else "all red here, all green with their answers"
    print(f"{args.dest}: {len(exercises)} exercises, {sum(e.points for e in exercises.values())} points; {state}")


if __name__ == "__main__":
    main()
