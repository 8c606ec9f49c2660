"""`python -m tclib student|bundle|report`: what a teacher needs around a class."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from tclib.cli.bootstrap import EVERYTHING, REPO, torch_pin
from tclib.cli.prepare import Refused
from tclib.cli.run import select

KERNEL = "transcoder-circuits"
# So that nbgrader by hand refuses to grade without the kernel, where it would give 0 points otherwise.
CONFIG = f"""\
c = get_config()
c.Execute.kernel_name = "{KERNEL}"  # registered by `make grade`
c.Execute.timeout = 600  # seconds for a cell; nbgrader's own 30 are too few
"""


def student(arguments: Sequence[str], repo: Path = REPO) -> int:
    """Write student copies into build/student, or nbgrader's sources into build/nbgrader; return the exit status."""
    from tclib.nb.teaching import students

    parser = argparse.ArgumentParser(prog="python -m tclib student", allow_abbrev=False)
    parser.add_argument("--graded", action="store_true", help="sources for nbgrader, in build/nbgrader/source")
    parser.add_argument("--inspect", metavar="FOLDER", type=Path, help="name deleted and copied cells in submissions")
    options = parser.parse_args(arguments)
    if options.inspect:
        return inspect(options.inspect, repo)
    graded = options.graded
    folder = repo / "build" / ("nbgrader" if graded else "student")
    shutil.rmtree(folder / "source" if graded else folder, ignore_errors=True)
    write = students.write_grading_sources if graded else students.write_copies
    for path in write(repo / "notebooks", folder):
        print(path.relative_to(repo))
    if graded and not (folder / "nbgrader_config.py").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "nbgrader_config.py").write_text(CONFIG, encoding="utf-8")
    return 0


def inspect(submissions: Path, repo: Path = REPO) -> int:
    """Print the faults of every submitted notebook; return 1 if there are any."""
    import nbformat

    from tclib.nb.teaching.students import faults

    found = 0
    for path in sorted(submissions.rglob("[0-9][0-9]*_*.ipynb")):
        source = repo / "notebooks" / path.name
        if ".ipynb_checkpoints" in path.parts or not source.is_file():
            continue
        for fault in faults(nbformat.read(path, 4), nbformat.read(source, 4)):
            print(f"{path.relative_to(submissions)}: {fault}")
            found = 1
    return found


def report(arguments: Sequence[str], repo: Path = REPO) -> int:
    """Render executed notebooks into build/report, by default all; return 0, or 2 if one is refused."""
    parser = argparse.ArgumentParser(prog="python -m tclib report", allow_abbrev=False)
    parser.add_argument("notebook", nargs="?", help="a file, or numbers of notebooks: 04 or 04,06 (default: all)")
    wanted = parser.parse_args(arguments).notebook
    from tclib.nb.teaching.report import NotExecuted, chromium, write_report

    try:
        paths = [Path(wanted)] if wanted and Path(wanted).is_file() else select(repo / "notebooks", wanted)
        for path in paths:
            for made in write_report(path, repo / "build" / "report"):
                print(made.relative_to(repo))
    except (Refused, NotExecuted) as error:
        print(error, file=sys.stderr)
        return 2
    if chromium() is None:
        print("No PDF: no Chromium was found. Any browser prints the page.")
    return 0


def bundle(arguments: Sequence[str], repo: Path = REPO) -> int:
    """Collect every wheel of the pinned environment in build/bundle; return pip's exit status."""
    parser = argparse.ArgumentParser(prog="python -m tclib bundle", allow_abbrev=False)
    parser.parse_args(arguments)
    index = os.environ.get("TORCH_INDEX")
    folder = repo / "build" / "bundle"
    # What an editable installation builds with has to be there too.
    backend = tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    wheel = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--wheel-dir", str(folder)]
    steps = [[*wheel, "--no-deps", "--index-url", index, torch_pin(repo)]] if index else []
    everything = [EVERYTHING, *backend, "editables", "pip", "setuptools", "wheel"]
    steps.append([*wheel, "--find-links", str(folder), "-c", "constraints.txt", *everything])
    for step in steps:
        status = subprocess.call(step, cwd=repo)
        if status:
            return status
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"{len(list(folder.glob('*.whl')))} wheels, {size:.0f} MB, in {folder.relative_to(repo)}.")
    print("Without network, on the same system and Python: PIP_NO_INDEX=1 PIP_FIND_LINKS=<that folder> make venv")
    return 0
