"""Write the table of notebooks into README.md, and its figure: `python tools/readme_table.py`.

Each notebook's metadata holds `"tclib": {"question": ..., "needs": ...}`; the answer is the
headline it printed, and tools/execute.py measured the minutes. The figure is the one drawn by
the cell tagged `readme-figure`.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from tclib.io.paths import between_marks
from tclib.nb import find_headline

REPO = Path(__file__).resolve().parents[1]


def table(notebooks: Iterable[Path]) -> str:
    """The table, as Markdown.

    Raises:
        ValueError: a notebook lacks the metadata or its headline.
    """
    lines = [
        "| notebook | question | answer in a number | minutes | needs |",
        "|---|---|---|---:|---|",
    ]
    for path in notebooks:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        about = notebook["metadata"].get("tclib", {})
        headline = find_headline(notebook)
        missing = [key for key in ("question", "needs", "minutes") if key not in about]
        if missing or headline is None:
            raise ValueError(f"{path.name} lacks {', '.join(missing) or 'its headline'}.")
        link = f"[{path.stem}](notebooks/{path.name})"
        cells = [link, about["question"], headline, f"{about['minutes']:.1f}", about["needs"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def fresh_readme(repo: Path = REPO) -> str:
    """README.md as it should be."""
    notebooks = sorted((repo / "notebooks").glob("[0-9][0-9]*_*.ipynb"))
    return between_marks((repo / "README.md").read_text(encoding="utf-8"), "notebooks", table(notebooks))


def fresh_figure(repo: Path = REPO) -> bytes:
    """docs/figure.png as it should be.

    Raises:
        ValueError: no notebook has drawn it.
    """
    for path in sorted((repo / "notebooks").glob("[0-9][0-9]*_*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if "readme-figure" in cell["metadata"].get("tags", ()):
                for output in cell["outputs"]:
                    if "image/png" in output.get("data", {}):
                        return base64.b64decode("".join(output["data"]["image/png"]))
    raise ValueError("No notebook has a cell tagged 'readme-figure' that has drawn a figure.")


if __name__ == "__main__":
    try:
        (REPO / "README.md").write_text(fresh_readme(), encoding="utf-8", newline="\n")
        (REPO / "docs" / "figure.png").write_bytes(fresh_figure())
    except ValueError as error:
        sys.exit(str(error))
