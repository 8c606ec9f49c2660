"""Grading with real nbgrader, in an environment of its own: set NBGRADER to its folder, or have `nbgrader` on PATH."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import nbformat
import pytest

from tclib.cli import grade, teach
from tclib.nb.teaching import students
from tests.conftest import REPO

NAME = "04b_search_and_test_circuits"
ENVIRONMENT = os.environ.get("NBGRADER")


@pytest.fixture
def course(tmp_path):
    (tmp_path / "notebooks").mkdir()
    shutil.copy(REPO / "notebooks" / f"{NAME}.ipynb", tmp_path / "notebooks")
    return tmp_path


def hand_in(course: Path, student: str, change) -> None:
    """What a student got, with every answer replaced by what ``change`` makes of the solution, or left blank."""
    notebook = nbformat.read(course / "build/nbgrader/release" / NAME / f"{NAME}.ipynb", 4)
    solved = students.solved(nbformat.read(course / "notebooks" / f"{NAME}.ipynb", 4))
    solutions = {c.metadata.nbgrader.grade_id: c.source for c in solved.cells if "nbgrader" in c.metadata}
    for cell in notebook.cells:
        if change and cell.metadata.get("nbgrader", {}).get("solution"):
            cell.source = change(solutions[cell.metadata.nbgrader.grade_id])
    file = course / "build/nbgrader/submitted" / student / NAME / f"{NAME}.ipynb"
    file.parent.mkdir(parents=True)
    nbformat.write(notebook, file)


@pytest.mark.slow
@pytest.mark.skipif(not (ENVIRONMENT or shutil.which("nbgrader")), reason="nbgrader is not installed: see TEACHING.md")
def test_right_wrong_and_blank(course, capfd):
    arguments = ["04b", *(["--nbgrader", ENVIRONMENT] if ENVIRONMENT else [])]
    assert teach.student(["--graded"], course) == 0
    assert grade.grade(arguments, course) == 0
    assert "Hand out" in capfd.readouterr().out
    released = (course / "build/nbgrader/release" / NAME / f"{NAME}.ipynb").read_text(encoding="utf-8")
    assert students.BEGIN not in released and "git+https://" not in released
    hand_in(course, "right", lambda solution: solution)
    hand_in(course, "wrong", lambda solution: solution.replace("return -second_cause", "return second_cause"))
    hand_in(course, "blank", None)

    # By hand, where the kernel is not registered: no grades, and a failure, in place of 0 points for everybody.
    program = grade.find(Path(ENVIRONMENT) if ENVIRONMENT else None)
    shutil.rmtree(program.parents[1] / "share/jupyter/kernels" / teach.KERNEL)
    assert grade.nbgrader(program, course / "build/nbgrader", "autograde", NAME) != 0
    assert f"No such kernel named {teach.KERNEL}" in capfd.readouterr().err

    assert grade.grade(arguments, course) == 0
    said = capfd.readouterr()
    for student, points in {"right": "6.0", "wrong": "4.0", "blank": "0.0"}.items():
        assert f"{student}: {NAME}, {points} of 6.0 points" in said.out, said.out + said.err
    feedback = (course / "build/nbgrader/feedback/wrong" / NAME / f"{NAME}.html").read_text(encoding="utf-8")
    assert "usual cause" in feedback


@pytest.fixture
def environment(tmp_path):
    """An environment whose nbgrader is a program that is never reached."""
    program = tmp_path / "env" / "bin" / "nbgrader"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\nexit 9\n", encoding="utf-8")
    program.chmod(0o755)
    return tmp_path / "env"


def test_a_kernel_without_tclib_is_refused(course, environment, tmp_path, monkeypatch, capsys):
    """An interpreter that has ipykernel and no tclib, as nbgrader's own: right answers would get 0 points there."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nunset PYTHONPATH\nexec "{sys.executable}" -S "$@"\n', encoding="utf-8")
    bare.chmod(0o755)
    assert teach.student(["--graded"], course) == 0
    monkeypatch.setattr(sys, "executable", str(bare))
    assert grade.grade(["04b", "--nbgrader", str(environment)], course) == 2
    message = capsys.readouterr().err
    assert "cannot grade (ModuleNotFoundError: No module named" in message and "make venv" in message
    assert message.count("\n") == 1 and not (environment / "share").exists()


def test_the_kernel_is_registered_and_failures_are_passed_on(course, environment, capfd):
    assert teach.student(["--graded"], course) == 0
    assert grade.grade(["04b", "--nbgrader", str(environment)], course) == 1  # that program fails
    kernel = (environment / "share/jupyter/kernels" / teach.KERNEL / "kernel.json").read_text(encoding="utf-8")
    assert sys.executable in kernel


def test_grading_without_sources_or_nbgrader_is_refused(course, tmp_path, capsys):
    assert grade.grade(["04b", "--nbgrader", str(tmp_path)], course) == 2
    assert "write it first, by `make student GRADED=1`" in capsys.readouterr().err
    assert teach.student(["--graded"], course) == 0
    assert grade.grade(["04b", "--nbgrader", str(tmp_path)], course) == 2
    assert f"There is no nbgrader in {tmp_path}" in capsys.readouterr().err
    assert grade.grade(["05"], course) == 2
    assert "No notebook starts with '05'" in capsys.readouterr().err
