"""Grade a submission: the bodies of its exercises, one after the other, under the reference tests.

    python notebooks/grade.py submissions/ada
    python notebooks/grade.py submissions/ada --exercises 1,2,5 --out ada.json

From the student's dualenc.py, train.py and eval.py only the bodies of the marked functions are taken over, each
exercise's into a fresh copy of everything else, so that a fault in one costs nothing in another. Each runs in a process
of its own, with a limit of time and memory. These limits are for accidents, not for malice: a submission is a program,
and programs of strangers belong into a container.
"""

import argparse
import ast
import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import make_assignment
from make_assignment import ROOT, scores

LARGEST_FILE = 2**28  # bytes: what a solution prints goes to a file


class Unusable(ValueError):
    """A submission that lacks a function, or in which it cannot be read."""


def cut_out(lines, name, indent=0):
    """The lines of a class or function, found by indentation alone: for a file that does not parse."""
    head = re.compile(rf" {{{indent}}}(class|def) {name}\b")
    first = next((i for i, line in enumerate(lines) if head.match(line)), None)
    if first is None:
        raise Unusable(f"no {name} in it")
    inside = re.compile(rf" {{{indent}}}[)\s]|\s*(#|$)")
    last = first + 1
    while last < len(lines) and inside.match(lines[last]):
        last += 1
    return lines[first:last]


def find_function(source, name):
    """The ast.FunctionDef of "DualEncoder.lock" in a student's source, whatever state the rest of it is in."""
    try:
        function = scores.functions(ast.parse(source)).get(name)
    except SyntaxError:
        lines = source.splitlines()
        for depth, part in enumerate(name.split(".")):
            lines = cut_out(lines, part, 4 * depth)
        try:
            function = ast.parse(textwrap.dedent("\n".join(lines))).body[0]
        except SyntaxError as error:
            raise Unusable(f"{name} is no Python: {error.msg}: {(error.text or '').strip()!r}") from None
    if function is None:
        raise Unusable(f"no {name} in it")
    return function


def read_source(path):
    try:
        return path.read_text(encoding="utf-8").replace("\0", "")
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable(f"{path.name} cannot be read: {error}") from None


def student_sources(folder, exercise):
    """{file: source}: ours, with the student's bodies of one exercise."""
    sources = {file: (ROOT / file).read_text() for file in scores.SOURCES}
    for file, name in exercise.places:
        try:
            own = make_assignment.statements(find_function(read_source(folder / file), name))
            body = "\n".join(map(ast.unparse, own)) or "pass"
            sources[file] = make_assignment.replace_bodies(sources[file], {name: body})
            compile(sources[file], file, "exec")  # a `break` outside a loop parses
        except (Unusable, RecursionError) as error:
            raise Unusable(f"{file}: {error}") from None
        except SyntaxError as error:
            raise Unusable(f"{file}: {name} is no Python: {error.msg}") from None
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
        except (SyntaxError, RecursionError, Unusable) as error:
            edits.append(f"{file} does not parse, and was not compared: {error}")
            continue
        for name in [*student, *(name for name in reference if name not in student)]:
            ours, theirs = reference.get(name), student.get(name)
            left_out = (file, name) in alike and theirs and "raise NotImplementedError" in theirs
            if ours != theirs and not left_out:
                how = "added" if ours is None else "removed" if theirs is None else "changed"
                edits.append(f"{file}: {textwrap.shorten(name, 60)} {how}")
    for path in sorted(folder.glob("tests/**/*.py")):
        ours = ROOT / path.relative_to(folder)
        if not ours.exists() or ours.read_bytes() != path.read_bytes():
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
    with tempfile.TemporaryDirectory() as scratch:
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
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"},
            )
            stopped = None
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                stopped = f"stopped after {seconds} seconds"
            finally:
                end_group(process)
        try:
            return json.loads((folder / "score.json").read_text())["exercises"][0], None
        except (OSError, ValueError):
            reason = stopped or f"ended without a result, exit status {process.returncode}"
            last = re.findall(r"::test_exercise_\d+_(\S+)", (folder / "output.txt").read_text(errors="replace"))
            reason += f", in {last[-1]}" if last else ""
            return scores.score(exercise, {"all": reason}), reason


def end_group(process):
    """End the process with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def grade(folder, exercises, seconds=120, memory=4.0, say=lambda line: None):
    """The content of the results file: scores.total with what was stopped, ignored, and how long it took.

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
        rows.append({**row, "stopped": stopped})
    return {
        "submission": str(folder),
        **scores.total(rows),
        "ignored": ignored_edits(folder),
        "seconds": round(time.time() - start, 1),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("submission", type=Path, help="the folder that was handed in")
    parser.add_argument("--exercises", default="", help="numbers such as 1,2,5 (default: all)")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--seconds", type=int, default=120, help="limit an exercise (default: 120)")
    parser.add_argument("--memory", type=float, default=4.0, help="limit an exercise, in GiB (default: 4)")
    args = parser.parse_args(argv)
    try:
        exercises = make_assignment.choose(args.exercises)
        if not args.submission.is_dir():
            raise ValueError(f"no folder {args.submission}")
    except ValueError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    results = grade(args.submission, exercises, args.seconds, args.memory, lambda line: print(line, file=sys.stderr))
    print("\n".join(scores.score_lines(results)))
    for edit in results["ignored"]:
        print(f"ignored   {edit}")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
