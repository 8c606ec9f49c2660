"""`python -m tclib grade`: nbgrader, which has an environment of its own, with the kernel of this one."""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tclib.cli.bootstrap import REPO
from tclib.cli.prepare import Refused
from tclib.cli.run import select
from tclib.cli.teach import KERNEL, inspect


def grade(arguments: Sequence[str], repo: Path = REPO) -> int:
    """Write what students get, or grade what they handed in; return 0, 1 if nbgrader failed, or 2 if refused."""
    parser = argparse.ArgumentParser(prog="python -m tclib grade", allow_abbrev=False)
    parser.add_argument("notebook", help="numbers of notebooks: 04 or 04,06")
    parser.add_argument(
        "--nbgrader", type=Path, metavar="FOLDER", help="nbgrader's environment (default: that of the command nbgrader)"
    )
    options = parser.parse_args(arguments)
    course = repo / "build" / "nbgrader"
    try:
        names = [path.stem for path in select(repo / "notebooks", options.notebook)]
        for name in names:
            if not (course / "source" / name).is_dir():
                raise Refused(f"There is no {course / 'source' / name}: write it first, by `make student GRADED=1`.")
        program = find(options.nbgrader)
        register(program.parents[1], course)
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    if (course / "submitted").is_dir():
        inspect(course / "submitted", repo)
    statuses, graded = [], []
    for name in names:
        if not (course / "release" / name).is_dir():
            statuses.append(nbgrader(program, course, "generate_assignment", name))
        if not any((course / "submitted").glob(f"*/{name}")):
            print(f"Hand out {course / 'release' / name}; answers belong in {course / 'submitted' / 'STUDENT' / name}.")
            continue
        options = [f"--Execute.kernel_name={KERNEL}", "--Execute.timeout=600"]  # by default 30 s for a cell
        statuses.append(nbgrader(program, course, "autograde", name, *options))
        statuses.append(nbgrader(program, course, "generate_feedback", name))
        graded.append(name)
    if graded:
        statuses.append(nbgrader(program, course, "export"))
        print_scores(course, graded)
    return int(any(statuses))


def find(environment: Path | None) -> Path:
    """The program nbgrader. Raises Refused if it is not there."""
    folders = os.pathsep.join(str(environment / folder) for folder in ("bin", "Scripts")) if environment else None
    found = shutil.which("nbgrader", path=folders)
    if found is None:
        where = f"in {environment}" if environment else "on the PATH"
        raise Refused(
            f"There is no nbgrader {where}: install it into an environment of its own, and name that with --nbgrader."
        )
    return Path(found).resolve()


def register(environment: Path, course: Path) -> None:
    """Make this environment's kernel known to nbgrader's. Raises Refused if the kernel would not find tclib."""
    quiet: dict[str, Any] = {"capture_output": True, "encoding": "utf-8", "errors": "replace"}
    # Like a kernel not in the repository, whose folder tclib would be imported from.
    imports = subprocess.run([sys.executable, "-c", "import ipykernel, tclib"], cwd=course, **quiet)
    if imports.returncode:
        reason = imports.stderr.strip().splitlines()[-1]
        raise Refused(f"The kernel of {sys.executable} cannot grade ({reason}): run `make venv`, which installs tclib.")
    install = [sys.executable, "-m", "ipykernel", "install", "--prefix", str(environment), "--name", KERNEL]
    installed = subprocess.run([*install, "--display-name", "Transcoder Circuits"], **quiet)
    if installed.returncode:
        reason = installed.stderr.strip().splitlines()[-1]
        raise Refused(f"The kernel cannot be registered in {environment} ({reason}): use an environment of your own.")


def nbgrader(program: Path, course: Path, *arguments: str) -> int:
    """Run nbgrader in the course; return its exit status."""
    # It looks for alembic on the PATH.
    env = {**os.environ, "PATH": os.pathsep.join([str(program.parent), os.environ.get("PATH", "")])}
    return subprocess.call([str(program), *arguments], cwd=course, env=env)


def print_scores(course: Path, assignments: Sequence[str]) -> None:
    """Print a line for every submission, from nbgrader's export."""
    with (course / "grades.csv").open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            student, assignment = row["student_id"], row["assignment"]
            # nbgrader exports every student with every assignment.
            if assignment in assignments and (course / "submitted" / student / assignment).is_dir():
                print(f"{student}: {assignment}, {row['score']} of {row['max_score']} points")
