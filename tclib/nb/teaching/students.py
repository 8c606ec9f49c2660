"""Exercises in notebooks: what students get, and what nbgrader does.

A committed notebook shows the task: its answer cells hold a stub, and the solution is folded below the task. nbgrader's
sources hold the solution in the answer cell, between ``### BEGIN SOLUTION`` and ``### END SOLUTION``.
"""

from __future__ import annotations

import copy
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tclib.io.paths import with_diagrams, write_whole

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
_STUB = re.compile(r"^( *)# YOUR CODE HERE\n *raise NotImplementedError\(\)", re.MULTILINE)
_TASK = re.compile(
    r"\*\*Exercise (?P<number>\w+\.\d+): (?P<title>.+?)\*\* \(difficulty (?P<difficulty>[1-5]) of 5, "
    r"importance (?P<importance>[1-5]) of 5, (?P<minutes>\d+) minutes\)"
)
# The cell tagged `install` in copies, and everywhere until `tools/address.py` says what could be installed instead.
CHECK = """\
import importlib.util

if importlib.util.find_spec("tclib") is None:
    raise ModuleNotFoundError("this kernel has no tclib: start JupyterLab by `make lab`, or choose another kernel")"""
_FOLD = re.compile(r"\n*<details><summary>Solution</summary>\n\n```python\n(?P<code>.*?)```.*?</details>", re.DOTALL)


def without_address(notebook: NotebookNode) -> NotebookNode:
    """The notebook without badges, and with a first code cell that installs nothing."""
    made = copy.deepcopy(notebook)
    made.cells = [cell for cell in made.cells if "badges" not in cell.metadata.get("tags", ())]
    for cell in made.cells:
        if "install" in cell.metadata.get("tags", ()):
            cell.source = CHECK
    return made


@dataclass(frozen=True)
class Exercise:
    """One exercise. ``task`` is the index of its first cell; the answer and the check are the next two."""

    number: str
    title: str
    difficulty: int
    importance: int
    minutes: int
    points: int
    task: int


def exercises(notebook: NotebookNode) -> list[Exercise]:
    """The exercises of a notebook, in order.

    Raises:
        ValueError: a task is not followed by an answer and a check.
    """
    found = []
    cells = [*notebook.cells, NotebookNode(), NotebookNode()]
    for index, cell in enumerate(notebook.cells):
        task = _TASK.match(cell.source) if cell.cell_type == "markdown" else None
        if task is None:
            continue
        answer, check = _grading(cells[index + 1]), _grading(cells[index + 2])
        if not (answer.get("solution") and check.get("grade")):
            raise ValueError(f"exercise {task['number']} lacks its answer cell or its check cell")
        numbers = {name: int(task[name]) for name in ("difficulty", "importance", "minutes")}
        found.append(Exercise(task["number"], task["title"], **numbers, points=check["points"], task=index))
    return found


def student_copy(notebook: NotebookNode) -> NotebookNode:
    """The notebook without the outputs of its exercise cells, and without an address."""
    made = without_address(notebook)
    for cell in made.cells:
        if _grading(cell):
            cell.outputs, cell.execution_count = [], None
    return made


def solved(notebook: NotebookNode) -> NotebookNode:
    """The notebook with its folded solutions written into the answer cells, between nbgrader's markers.

    Raises:
        ValueError: a task has no folded solution.
    """
    made = copy.deepcopy(notebook)
    for exercise in exercises(made):
        task, answer = made.cells[exercise.task], made.cells[exercise.task + 1]
        folded = _FOLD.search(task.source)
        if folded is None:
            raise ValueError(f"exercise {exercise.number} has no solution folded below its task")
        marked = f"{BEGIN}\n{folded['code'].rstrip()}\n{END}"
        answer.source = _STUB.sub(lambda stub: textwrap.indent(marked, stub[1]), answer.source)  # noqa: B023
    return made


def grading_source(notebook: NotebookNode) -> NotebookNode:
    """The notebook as nbgrader wants its source: solutions between markers, no folded ones for students to open, checks
    that fail while an exercise is open, and no address."""
    made = without_address(solved(notebook))
    for cell in made.cells:
        if cell.cell_type == "markdown" and _TASK.match(cell.source):
            cell.source = _FOLD.sub("", cell.source)
        if _grading(cell).get("grade"):
            cell.source = cell.source.replace("checks.", "checks.graded.")
    return made


def faults(submission: NotebookNode, notebook: NotebookNode) -> list[str]:
    """Cells of exercises that a student deleted or copied: nbgrader scores the first 0 and stops at the second."""
    there = Counter(_grading(cell).get("grade_id") for cell in submission.cells)
    wanted = [role["grade_id"] for role in map(_grading, notebook.cells) if role]
    lost = [f"{name} was deleted: put it back from a fresh copy" for name in wanted if there[name] == 0]
    return lost + [f"{name} is there {there[name]} times: keep one" for name in wanted if there[name] > 1]


def write_copies(notebooks: Path, folder: Path) -> list[Path]:
    """Write a student copy of every notebook that has exercises; return the new files."""
    return list(_written(notebooks, lambda name: folder / name, student_copy))


def write_grading_sources(notebooks: Path, course: Path) -> list[Path]:
    """Write ``source/<assignment>/<notebook>`` in an nbgrader course folder, one assignment per notebook."""
    return list(_written(notebooks, lambda name: course / "source" / Path(name).stem / name, grading_source))


def _written(notebooks: Path, target: Callable[[str], Path], make: Callable) -> Iterator[Path]:
    for path in sorted(notebooks.glob("[0-9][0-9]*_*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        if exercises(notebook):
            new = target(path.name)
            new.parent.mkdir(parents=True, exist_ok=True)
            write_whole(new, f"{with_diagrams(nbformat.writes(make(notebook)), notebooks, new.parent)}\n".encode())
            yield new


def _grading(cell: NotebookNode) -> dict:
    return cell.get("metadata", {}).get("nbgrader", {})
