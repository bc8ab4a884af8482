"""Write an assignment's handout: the sources without the answers, their tests, the notebooks.

    python notebooks/make_assignment.py ~/handout
    python notebooks/make_assignment.py ~/handout --exercises 1,2,5

A docstring row `Exercise n` marks a function to write; tests/scores.py says how. Its body becomes
`raise NotImplementedError("Exercise n: ...")`, and everything else stays as it is, to the letter.
The folder appears once every test has been seen green with the answers and red without.
"""

import argparse
import ast
import json
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import scores

FILES = ("LICENSE", "requirements.txt", "pyproject.toml")
FILES += ("tests/conftest.py", "tests/support.py", "tests/scores.py")
NOTEBOOK_FILES = ("[0-9][0-9]_*.ipynb", "requirements.txt", "run.py", "retrieved.*")
SECONDS, MEMORY = 120, 4.0  # limits of an exercise when it is graded; GiB

# Functions so like an exercise that they would show its answer, or answer it in one call. The
# handout goes without the first kind, and the grader without both while it grades that exercise.
LOOK_ALIKES = {1: [("dualenc.py", "multi_positive_clip_loss")]}
SHORTCUTS = {1: [("dualenc.py", "tiled_clip_loss")]}


def statements(function):
    """The body of a function node, without its docstring."""
    return function.body[ast.get_docstring(function, clean=False) is not None :]


def body_lines(source, function):
    """(first, last) line of a body, from 0 and past the end: after the docstring, with comments."""
    lines = source.splitlines()
    first = statements(function)[0].lineno - 1
    while not lines[first - 1].strip() or lines[first - 1].lstrip().startswith(("#", "@")):
        first -= 1
    return first, function.end_lineno


def replace_bodies(source, bodies):
    """The source with other bodies: {name such as "DualEncoder.lock": text without indentation}."""
    lines, found = source.splitlines(keepends=True), scores.functions(ast.parse(source))
    for name in sorted(bodies, key=lambda name: -found[name].lineno):  # from below: lines stay
        first, last = body_lines(source, found[name])
        indent = " " * (found[name].col_offset + 4)
        lines[first:last] = [textwrap.indent(bodies[name].rstrip() + "\n", indent)]
    return "".join(lines)


def stubs(exercises, file):
    """{name: body} for the functions of one file that the handout goes without."""
    bodies = {}
    for number, exercise in exercises.items():
        alike = f"left out: it looks like the answer of Exercise {number}"
        task = f"Exercise {number}: {exercise.task}"
        places = [(place, alike) for place in LOOK_ALIKES.get(number, ())]
        places += [(place, task) for place in exercise.places]
        bodies |= {name: text for (where, name), text in places if where == file}
    return {name: f"raise NotImplementedError({json.dumps(text)})" for name, text in bodies.items()}


def write_sources(folder, exercises):
    for file in scores.SOURCES:
        source = replace_bodies((ROOT / file).read_text(), stubs(exercises, file))
        (folder / file).write_text(source)


def copy_tests(folder, exercises):
    """The tests of the exercises, with what they lean on."""
    own = [f"tests/exercises/test_exercise_{number}.py" for number in exercises]
    for file in (*FILES, *own):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)


def student_notebook(notebook, exercises):
    """A notebook of the chosen exercises, without cells that show an answer.

    Tags say which: "exercise 3" belongs to that exercise, "answer 3" shows what to write there.
    """
    cells = []
    for cell in notebook["cells"]:
        tags = cell["metadata"].get("tags", ())
        belongs = [tag for tag in tags if tag.startswith("exercise ")]
        if belongs and not any(f"exercise {number}" in tags for number in exercises):
            continue
        shows = [number for number in exercises if f"answer {number}" in tags]
        if shows:
            text = f"# left out: it looks like the answer of Exercise {shows[0]}"
            cell = cell | {"source": [text]}
        if cell["cell_type"] == "code" and (belongs or shows):
            cell = cell | {"outputs": [], "execution_count": None}
        cells.append(cell)
    return notebook | {"cells": cells}


def copy_notebooks(folder, exercises):
    (folder / "notebooks").mkdir()
    for pattern in NOTEBOOK_FILES:
        for path in (ROOT / "notebooks").glob(pattern):
            text = path.read_bytes()
            if path.suffix == ".ipynb":
                notebook = student_notebook(json.loads(text), exercises)
                text = json.dumps(notebook, indent=1, ensure_ascii=False).encode() + b"\n"
            (folder / "notebooks" / path.name).write_bytes(text)


def write_readme(folder, exercises):
    rows = []
    for e in exercises.values():
        places = ", ".join(f"`{name}` in `{file}`" for file, name in e.places)
        numbers = f"{e.difficulty} | {e.points} | {e.minutes}"
        rows.append(f"| {e.number} | {e.task} | {places} | {numbers} |")
    template = (ROOT / "notebooks" / "handout.md").read_text()
    text = template.format(
        count=f"{len(exercises)} exercise{'s' * (len(exercises) > 1)}",
        table="\n".join(rows),
        points=sum(e.points for e in exercises.values()),
        minutes=sum(e.minutes for e in exercises.values()),
        first=min(exercises),
        seconds=SECONDS,
        memory=MEMORY,
    )
    (folder / "README.md").write_text(text)


def start_tests(folder, **options):
    """pytest on the exercises in a folder, as a subprocess.Popen; writes score.json there."""
    command = [sys.executable, "-B", "-u", "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    command += ["-m", "exercise", "--score-file=score.json"]
    with open(folder / "output.txt", "w") as output:
        return subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, **options)


def run_exercises(folder):
    """The score (see scores.total) of the exercises in a folder."""
    start_tests(folder).wait()
    output, score = folder / "output.txt", folder / "score.json"
    if not score.exists():
        raise ValueError(f"pytest gave no score: {output.read_text()[-2000:]}")
    results = json.loads(score.read_text())
    output.unlink(), score.unlink()
    return results


def check_colour(results, exercises, green):
    """ValueError unless every test of every exercise passed (green), or every single one failed."""
    tested = {row["exercise"] for row in results["exercises"]}
    wrong = [f"Exercise {number} has no test" for number in exercises if number not in tested]
    for row in results["exercises"]:
        if row["passed"] != (row["tests"] if green else 0):
            wrong.append(
                f"Exercise {row['exercise']}: {row['passed']} of {row['tests']} tests pass"
            )
    if wrong:
        state = "with the answers, not all tests are green" if green else "not all tests are red"
        raise ValueError(f"{state}: {wrong}")


def check_secrecy(folder, exercises):
    """ValueError if a file of the folder shows two long lines of one answer."""
    texts = {}
    for path in folder.rglob("*"):
        if path.suffix in (".py", ".ipynb", ".md"):
            texts[path.relative_to(folder)] = path.read_text().replace('\\"', '"')
    for number, exercise in exercises.items():
        for file, name in exercise.places:
            source = (ROOT / file).read_text()
            first, last = body_lines(source, scores.functions(ast.parse(source))[name])
            lines = {line.strip() for line in source.splitlines()[first:last]}
            lines = {line for line in lines if len(line) > 25 and not line.startswith("#")}
            for path, text in texts.items():
                shown = [line for line in lines if line in text]
                if len(shown) > 1:
                    raise ValueError(f"{path} shows the answer of Exercise {number}: {shown}")


def build(folder, exercises):
    """Fill an empty folder and check it."""
    copy_tests(folder, exercises)
    copy_notebooks(folder, exercises)
    write_readme(folder, exercises)
    write_sources(folder, {})
    check_colour(run_exercises(folder), exercises, green=True)
    write_sources(folder, exercises)
    check_secrecy(folder, exercises)
    check_colour(run_exercises(folder), exercises, green=False)


def choose(words):
    """{number: Exercise} of a word such as "1,2,5"; all of them if it is empty."""
    exercises = scores.find_exercises(ROOT)
    try:
        numbers = {int(word) for word in words.split(",")} if words else exercises
        return {number: exercises[number] for number in sorted(numbers)}
    except (ValueError, KeyError):
        message = f"--exercises is {words!r}, expected numbers up to {max(exercises)}: 1,2,5"
        raise ValueError(message) from None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dest", type=Path, help="the folder to write: new, or empty")
    parser.add_argument("--exercises", default="", help="numbers such as 1,2,5 (default: all)")
    args = parser.parse_args(argv)
    dest = args.dest.expanduser().resolve()
    try:
        exercises = choose(args.exercises)
        if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
            raise ValueError(f"{dest} is there and not empty; name another folder")
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "handout"
            build(folder, exercises)
            shutil.copytree(folder, dest, dirs_exist_ok=True)
    except (ValueError, OSError) as error:
        sys.exit(f"make_assignment.py: error: {error}")
    print(f"{dest}: {len(exercises)} exercises, all red; all green with the answers")


if __name__ == "__main__":
    main()
