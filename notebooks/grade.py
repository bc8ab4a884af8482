"""Grade submissions: the bodies of their exercises, one after the other, under the reference tests.

    python notebooks/grade.py submissions/ada
    python notebooks/grade.py submissions/ada --exercises 1,2,5 --out ada.json     (--exercises as in the handout)
    python notebooks/grade.py submissions/* --out grades                           a file each, and grades/scores.csv

From the student's dualenc.py, train.py and eval.py only the bodies of the marked functions are taken over, each
exercise's into a fresh copy of everything else, so that a fault in one costs nothing in another. Each runs in a process
of its own, with a limit of time and memory. These limits are for accidents, not for malice: a submission is a program,
and programs of strangers belong into a container.
"""

import argparse
import ast
import contextlib
import csv
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import tokenize
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import make_assignment
from make_assignment import ROOT, scores

SECONDS, MEMORY = make_assignment.SECONDS, make_assignment.MEMORY
LARGEST_FILE = 2**28  # bytes: what a solution prints goes to a file


class Unusable(ValueError):
    """A submission that lacks a function, or in which it cannot be read."""


def cut_out(lines, name, indent=0):
    """The lines of a class or function, up to the next one beside or around it: for a file that does not parse."""
    heads = [i for i, line in enumerate(lines) if re.match(rf" {{{indent}}}(class|def) {name}\b", line)]
    if not heads:
        raise Unusable(f"no {name} in it")
    first = heads[-1]  # the last one counts, as in Python
    another = re.compile(rf" {{0,{indent}}}(@|class |def |async def )")
    last = next((i for i in range(first + 1, len(lines)) if another.match(lines[i])), len(lines))
    return lines[first:last]


def find_function(source, name):
    """The ast.FunctionDef of "DualEncoder.lock" in a student's source, whatever state the rest of it is in."""
    try:
        function = scores.functions(ast.parse(source)).get(name)
    except SyntaxError:
        lines = source.expandtabs(4).splitlines()
        for depth, part in enumerate(name.split(".")):
            lines = cut_out(lines, part, 4 * depth)
        try:
            function = ast.parse(textwrap.dedent("\n".join(lines))).body[0]
        except SyntaxError as error:
            raise Unusable(f"{name} is no Python: {error.msg}: {(error.text or '').strip()!r}") from None
    if not isinstance(function, ast.FunctionDef):
        raise Unusable(f"no {name} in it: it must be a plain def, at the place where it was handed out")
    return function


def read_source(path):
    """A student's file, in the encoding that Python would read it in; what is no text in it becomes question marks."""
    if not path.is_file():
        raise Unusable(f"no {path.name} in the folder")
    try:
        with open(path, "rb") as file:
            encoding, _ = tokenize.detect_encoding(file.readline)
    except SyntaxError:  # an unknown encoding, or bytes that are no UTF-8
        encoding = "utf-8-sig"
    except OSError as error:
        raise Unusable(f"{path.name} cannot be read: {error}") from None
    return path.read_text(encoding=encoding, errors="replace").replace("\0", "")


def student_sources(folder, exercise):
    """{file: source}: ours, with the student's bodies of one exercise, and without what would answer it in one call."""
    sources = {file: (ROOT / file).read_text() for file in scores.SOURCES}
    n = exercise.number
    for file, name in [*make_assignment.LOOK_ALIKES.get(n, ()), *make_assignment.SHORTCUTS.get(n, ())]:
        body = f'raise NotImplementedError("not to be called: it looks like the answer of Exercise {n}")'
        sources[file] = make_assignment.replace_bodies(sources[file], {name: body})
    for file, name in exercise.places:
        try:
            own = make_assignment.statements(find_function(read_source(folder / file), name))
            body = "\n".join(map(ast.unparse, own)) or "pass"
            sources[file] = make_assignment.replace_bodies(sources[file], {name: body})
            compile(sources[file], file, "exec")  # a `break` outside a loop parses
        except SyntaxError as error:
            raise Unusable(f"{file}: {name} is no Python: {error.msg}") from None
        except Exception as error:  # numbers and nesting that Python itself refuses, too
            raise Unusable(f"{file}: {error or type(error).__name__}") from None
    return sources


def parts(source, marked):
    """{what: its code without comments} for everything in a module; of marked functions, the signature."""
    tree, found = ast.parse(source), {}
    for name, node in scores.functions(tree).items():
        if name in marked:
            node.body = [ast.Pass()]
        found[name] = ast.unparse(node)
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            rest = [child for child in node.body if not isinstance(child, ast.FunctionDef)]
            found[f"class {node.name}"] = "\n".join(map(ast.unparse, [*node.bases, *rest]))
        elif not isinstance(node, ast.FunctionDef):
            found[ast.unparse(node)] = ""
    return found


def ignored_edits(folder):
    """What the student changed outside the marked functions, in words."""
    places = {place for exercise in make_assignment.choose("").values() for place in exercise.places}
    alike = {place for found in make_assignment.LOOK_ALIKES.values() for place in found}
    edits = []
    for file in scores.SOURCES:
        marked = {name for place, name in places if place == file}
        reference = parts((ROOT / file).read_text(), marked)
        try:
            student = parts(read_source(folder / file), marked)
        except Exception as error:
            edits.append(f"{file} does not parse, and was not compared: {error or type(error).__name__}")
            continue
        for name in [*student, *(name for name in reference if name not in student)]:
            ours, theirs = reference.get(name), student.get(name)
            left_out = (file, name) in alike and theirs and "raise NotImplementedError" in theirs
            if ours != theirs and not left_out:
                how = "added" if ours is None else "removed" if theirs is None else "changed"
                edits.append(f"{file}: {textwrap.shorten(name, 60)} {how}" + ": ours is used" * (name in marked))
    for path in sorted(folder.glob("tests/**/*.py")):
        ours = ROOT / path.relative_to(folder)
        if path.is_file() and not (ours.is_file() and ours.read_bytes() == path.read_bytes()):
            edits.append(f"{path.relative_to(folder)} differs from ours")
    return edits


def limited(seconds, memory):
    """What a graded process does before anything else. memory in GiB."""

    def limit():
        for what, most in (
            (resource.RLIMIT_DATA, int(memory * 2**30)),
            (resource.RLIMIT_CPU, 4 * seconds),
            (resource.RLIMIT_FSIZE, LARGEST_FILE),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(what, (most, most))

    return limit


def run_exercise(exercise, sources, seconds, memory):
    """(score, what stopped it or None) of one exercise, in sources from student_sources."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        make_assignment.copy_tests(folder, [exercise.number])
        for file, source in sources.items():
            (folder / file).write_text(source)
        command = [sys.executable, "-B", "-u", "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "exercise"]
        with open(folder / "output.txt", "w") as output:
            process = subprocess.Popen(
                [*command, "--score-file=score.json"],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=limited(seconds, memory),
                env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
                | {"CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0", "TMPDIR": scratch},
            )
            stopped = None
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                stopped = f"stopped after {seconds} seconds"
            finally:
                end_group(process)
        try:
            row = json.loads((folder / "score.json").read_text())["exercises"][0]
            outcomes = {name: row["failures"].get(name) for name in row["names"]}
            return scores.score(exercise, outcomes), stopped
        except Exception:  # there is none, or it is not ours
            reason = stopped or f"ended without a result, {how_it_ended(process.returncode)}"
            output = folder / "output.txt"
            printed = output.read_text(errors="replace") if output.is_file() else ""
            last = re.findall(r"::test_exercise_\d+_(\S+)", printed)
            errors = re.findall(r"^E? *(\w*Error\b.*)", printed, re.MULTILINE)
            reason += (f", in {last[-1]}" if last else "") + (f": {errors[-1]}" if errors else "")
            return scores.score(exercise, {"all": reason}), reason


def how_it_ended(status):
    """An exit status in words."""
    return f"by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def end_group(process):
    """End the process with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def grade(folder, exercises, seconds=SECONDS, memory=MEMORY, say=lambda line: None):
    """The content of the results file: scores.total with what was stopped, ignored, how long it took, and under what.

    folder     the submission, with dualenc.py, train.py and eval.py
    exercises  {number: Exercise}
    seconds    limit of time an exercise
    memory     limit of memory an exercise, in GiB
    """
    rows, start = [], time.time()
    for number, exercise in exercises.items():
        say(f"Exercise {number} ...")
        try:
            row, stopped = run_exercise(exercise, student_sources(folder, exercise), seconds, memory)
        except Unusable as error:
            row, stopped = scores.score(exercise, {"all": str(error)}), str(error)
        rows.append({**row, "stopped": stopped, "same_as_ours": same_as_ours(folder, exercise)})
    return {
        "submission": str(folder),
        **scores.total(rows),
        "ignored": ignored_edits(folder),
        "seconds": round(time.time() - start, 1),
        "limits": {"seconds": seconds, "memory": memory},
        "versions": {"python": sys.version.split()[0], "torch": metadata.version("torch")},
    }


def same_as_ours(folder, exercise):
    """Whether the bodies of an exercise are ours but for comments: copied, or not taken out of the handout."""
    try:
        pairs = [
            (find_function(read_source(folder / file), name), find_function((ROOT / file).read_text(), name))
            for file, name in exercise.places
        ]
        return all(
            len({"\n".join(map(ast.unparse, make_assignment.statements(f))) for f in pair}) == 1 for pair in pairs
        )
    except Exception:
        return False


def check_grader(exercise, seconds, memory):
    """ValueError unless our own answer passes here: a wrong environment or limit would fail everybody."""
    row, _ = run_exercise(exercise, {file: (ROOT / file).read_text() for file in scores.SOURCES}, seconds, memory)
    if not row["points"]:
        said = next(iter(row["failures"].values()))
        raise ValueError(f"our own answer to Exercise {exercise.number} does not pass under these limits: {said}")


def write_result(results, out):
    """One submission's results: to out if it is a .json file, else to a file of its own in that folder, and a table."""
    text = json.dumps(results, indent=1) + "\n"
    if out.suffix == ".json":
        out.write_text(text)
        return
    name = Path(results["submission"]).resolve().name
    (out / f"{name}.json").write_text(text)
    points = {f"exercise {row['exercise']}": row["points"] for row in results["exercises"]}
    stopped = sum(row["stopped"] is not None for row in results["exercises"])
    row = {"submission": name, "points": results["points"], "out_of": results["out_of"], **points, "stopped": stopped}
    is_new = not (out / "scores.csv").exists()
    with open(out / "scores.csv", "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def check_arguments(args):
    """The exercises to grade; ValueError for what cannot be graded or written, before anything is."""
    exercises = make_assignment.choose(args.exercises)
    for folder in args.submissions:
        if not folder.is_dir():
            raise ValueError(f"no folder {folder}")
        if not any((folder / file).is_file() for file in scores.SOURCES):
            deeper = next((path.parent for path in folder.rglob(scores.SOURCES[0])), None)
            raise ValueError(f"no {scores.SOURCES[0]} in {folder}" + (f"; there is one in {deeper}" if deeper else ""))
    if args.seconds < 1 or not 0 < args.memory < math.inf:
        raise ValueError(f"limits of {args.seconds} seconds and {args.memory} GiB: expected 1 or more, and above 0")
    if args.out:
        is_file = args.out.suffix == ".json"
        if is_file and len(args.submissions) > 1:
            raise ValueError(f"--out {args.out} is one file; for several submissions name a folder")
        (args.out.parent if is_file else args.out).mkdir(parents=True, exist_ok=True)
        names = [folder.resolve().name for folder in args.submissions]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"several submissions are called {twice[0]}: one file would overwrite another; rename them"
            )
        if not is_file and (args.out / "scores.csv").exists():
            raise ValueError(f"{args.out / 'scores.csv'} is there already; name another folder")
        if is_file:
            args.out.touch()
    return exercises


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("submissions", type=Path, nargs="+", help="the folders that were handed in")
    parser.add_argument("--exercises", default="", help="numbers such as 1,2,5, as in the handout (default: all)")
    parser.add_argument(
        "--out", type=Path, help="write the results to this JSON file, or to a file each in this folder"
    )
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"limit an exercise (default: {SECONDS})")
    parser.add_argument("--memory", type=float, default=MEMORY, help=f"limit an exercise, in GiB (default: {MEMORY:g})")
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a message may hold what the terminal cannot show
    make_assignment.leave_when_told_to()
    try:
        exercises = check_arguments(args)
        check_grader(next(iter(exercises.values())), args.seconds, args.memory)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    graded = []
    for folder in args.submissions:
        results = grade(folder, exercises, args.seconds, args.memory, lambda line: print(line, file=sys.stderr))
        graded.append(results)
        if args.out:
            write_result(results, args.out)
        print(folder)
        print("\n".join(scores.score_lines(results)))
        for edit in results["ignored"]:
            print(f"ignored   {edit}")
        same = [str(row["exercise"]) for row in results["exercises"] if row["same_as_ours"]]
        if same:
            print(f"as ours   Exercise {', '.join(same)}: word for word")
    return graded


if __name__ == "__main__":
    main()
