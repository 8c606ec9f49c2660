"""Student copies: the teaching notebook without its solutions. Nothing else differs.

A solution stands between ``### BEGIN SOLUTION`` and ``### END SOLUTION``, in a cell that nbgrader's metadata calls a
solution; nbgrader itself blanks the same lines in the same way.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tclib.io.paths import with_diagrams, write_whole

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
STUB = ("# YOUR CODE HERE", "raise NotImplementedError()")
_TASK = re.compile(
    r"\*\*Exercise (?P<number>\w+\.\d+): (?P<title>.+?)\*\* \(difficulty (?P<difficulty>[1-5]) of 5, "
    r"importance (?P<importance>[1-5]) of 5, (?P<minutes>\d+) minutes\)"
)
# The cell tagged `install` in copies, and everywhere until `tools/address.py` says what could be installed instead.
CHECK = """\
import importlib.util

if importlib.util.find_spec("tclib") is None:
    raise ModuleNotFoundError("this kernel has no tclib: start JupyterLab by `make lab`, or choose another kernel")"""
_FOLD = re.compile(r"\n*<details><summary>Solution</summary>.*?</details>", re.DOTALL)


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
    """The notebook with blanked solutions, without the outputs of exercise cells, and without an address."""
    made = without_address(notebook)
    for cell in made.cells:
        role = _grading(cell)
        if role.get("solution"):
            cell.source = "\n".join(_blanked(cell.source.splitlines()))
        if role.get("solution") or role.get("grade"):
            cell.outputs, cell.execution_count = [], None
    return made


def grading_source(notebook: NotebookNode) -> NotebookNode:
    """The notebook as nbgrader wants its source: solutions between markers, no folded ones for students to open, and no
    address."""
    made = without_address(notebook)
    for cell in made.cells:
        if cell.cell_type == "markdown" and _TASK.match(cell.source):
            cell.source = _FOLD.sub("", cell.source)
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


def _blanked(lines: list[str]) -> Iterator[str]:
    """The lines of a cell with each solution replaced by the stub, at the solution's indentation.

    Raises:
        ValueError: a marker without its partner.
    """
    inside = False
    for line in lines:
        marker = line.strip()
        if marker in (BEGIN, END):
            if (marker == END) != inside:
                raise ValueError(f"{marker!r} has no partner")
            inside = not inside
            if inside:
                indent = line[: len(line) - len(line.lstrip())]
                yield from (indent + stub for stub in STUB)
        elif not inside:
            yield line
    if inside:
        raise ValueError(f"{BEGIN!r} has no partner")
