"""Write the tables of exercises, and of time and memory, into TEACHING.md: `python tools/exercise_table.py`.

A notebook's metadata holds `"tclib": {"minutes": ..., "gigabytes": ...}`; tools/execute.py measures the first, and the
second is the peak that `/usr/bin/time -v` reports for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tclib.io.paths import between_marks
from tclib.nb.teaching.students import exercises

REPO = Path(__file__).resolve().parents[1]


def notebooks(repo: Path) -> Iterator[tuple[Path, NotebookNode]]:
    """Every notebook, in reading order."""
    for path in sorted((repo / "notebooks").glob("[0-9][0-9]*_*.ipynb")):
        yield path, nbformat.read(path, as_version=4)


def exercise_table(repo: Path = REPO) -> str:
    """One row per exercise."""
    lines = ["| exercise | difficulty | importance | minutes | points |", "|---|---:|---:|---:|---:|"]
    for path, notebook in notebooks(repo):
        for e in exercises(notebook):
            name = f"[{e.number}](notebooks/{path.name}) {e.title}"
            lines.append(f"| {name} | {e.difficulty} | {e.importance} | {e.minutes} | {e.points} |")
    return "\n".join(lines)


def cost_table(repo: Path = REPO) -> str:
    """One row per notebook whose memory was measured."""
    lines = ["| notebook | minutes | memory, GB |", "|---|---:|---:|"]
    for path, notebook in notebooks(repo):
        about = notebook.metadata.get("tclib", {})
        if "gigabytes" in about:
            lines.append(f"| {path.stem} | {about['minutes']:.1f} | {about['gigabytes']:.1f} |")
    return "\n".join(lines)


def fresh(repo: Path = REPO) -> str:
    """TEACHING.md as it should be."""
    text = (repo / "TEACHING.md").read_text(encoding="utf-8")
    for name, table in {"exercises": exercise_table(repo), "measured": cost_table(repo)}.items():
        text = between_marks(text, name, table)
    return text


if __name__ == "__main__":
    (REPO / "TEACHING.md").write_text(fresh(), encoding="utf-8", newline="\n")
