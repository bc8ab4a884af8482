"""Grade a submission: the bodies of its exercises, one after the other, under our tests.

    python notebooks/grade.py submissions/ada
    python notebooks/grade.py submissions/ada --exercises 1,2,5 --out ada.json

Of the student's sources only the bodies of the marked functions are used, each exercise's in a
fresh copy of everything else. Each runs in a process of its own with limits of time and memory.
These are for accidents, not for malice: grade the programs of strangers in a container.
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import make_assignment
from make_assignment import MEMORY, ROOT, SECONDS, scores

NOT_ALLOWED = 'raise NotImplementedError("not to be called: it would answer this exercise")'


def student_sources(folder, exercise):
    """{file: source}: ours, with the student's bodies of one exercise and without its shortcuts.

    raises  ValueError for a submission that cannot be used
    """
    sources = {file: (ROOT / file).read_text() for file in scores.SOURCES}
    others = (make_assignment.LOOK_ALIKES, make_assignment.SHORTCUTS)
    for file, name in (place for table in others for place in table.get(exercise.number, ())):
        sources[file] = make_assignment.replace_bodies(sources[file], {name: NOT_ALLOWED})
    for file, name in exercise.places:
        try:
            text = (folder / file).read_text(encoding="utf-8-sig", errors="replace")
            function = scores.functions(ast.parse(text))[name]
            body = "\n".join(map(ast.unparse, make_assignment.statements(function))) or "pass"
            sources[file] = make_assignment.replace_bodies(sources[file], {name: body})
            compile(sources[file], file, "exec")  # a `break` outside a loop parses
        except Exception as error:  # whatever parsing a student's file may raise
            raise ValueError(f"no usable {name} in {file}: {error!r}") from None
    return sources


def run_exercise(exercise, sources, seconds, memory):
    """(score, what stopped it or None) of one exercise, in sources from student_sources."""

    def limit():
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 2**30),) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**28,) * 2)  # what it prints goes to a file

    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        make_assignment.copy_tests(folder, [exercise.number])
        for file, source in sources.items():
            (folder / file).write_text(source)
        process = make_assignment.start_tests(
            folder,
            env={**env, "CUDA_VISIBLE_DEVICES": "", "TMPDIR": scratch},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=limit,
        )
        stopped = None
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            stopped = f"stopped after {seconds} seconds"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with everything that it started
            process.wait()
        try:
            row = json.loads((folder / "score.json").read_text())["exercises"][0]
            return {**row, "points": row["points"] * (stopped is None)}, stopped
        except Exception:  # there is none, or it is not ours
            printed = (folder / "output.txt").read_text(errors="replace")
            last = re.findall(r"::test_exercise_\d+_(\w+)", printed)[-1:]
            errors = re.findall(r"^E? *(\w*Error\b.*)", printed, re.MULTILINE)[-1:]
            ended = stopped or f"ended without a result, exit status {process.returncode}"
            stopped = ": ".join([ended, *last, *errors])
            return scores.score(exercise, {"all": stopped}), stopped


def grade(folder, exercises, seconds=SECONDS, memory=MEMORY):
    """scores.total of a submission's folder, each row with what stopped it; memory in GiB."""
    rows = []
    for exercise in exercises.values():
        try:
            sources = student_sources(folder, exercise)
            row, stopped = run_exercise(exercise, sources, seconds, memory)
        except ValueError as error:
            row, stopped = scores.score(exercise, {"all": str(error)}), str(error)
        rows.append({**row, "stopped": stopped})
    return {**scores.total(rows), "limits": {"seconds": seconds, "memory": memory}}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("submission", type=Path, help="the folder that was handed in")
    parser.add_argument("--exercises", default="", help="numbers such as 1,2,5 (default: all)")
    parser.add_argument("--out", type=Path, help="write the results to this json file")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="limit of an exercise")
    parser.add_argument("--memory", type=float, default=MEMORY, help="the same, in GiB")
    args = parser.parse_args(argv)
    try:
        exercises = make_assignment.choose(args.exercises)
        if not any((args.submission / file).is_file() for file in scores.SOURCES):
            raise ValueError(f"none of {', '.join(scores.SOURCES)} in {args.submission}")
        first = next(iter(exercises.values()))  # a wrong environment or limit would fail everybody
        ours, _ = run_exercise(first, student_sources(ROOT, first), args.seconds, args.memory)
        if not ours["points"]:
            said = next(iter(ours["failures"].values()))
            raise ValueError(f"our own answer to Exercise {first.number} fails here: {said}")
        results = grade(args.submission, exercises, args.seconds, args.memory)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    except (ValueError, OSError) as error:
        sys.exit(f"grade.py: error: {error}")
    print("\n".join(scores.score_lines(results)))
    return results


if __name__ == "__main__":
    main()
