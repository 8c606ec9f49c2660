"""Write the report of the bundled sweep into docs/sweeps.md, with its figure: `python tools/sweeps_page.py`."""

from __future__ import annotations

import sys
from pathlib import Path

from tclib.io.paths import between_marks
from tclib.nb import sweeps
from tclib.nb.sweeps import sweep_report

REPO = Path(__file__).resolve().parents[1]


def fresh_page(repo: Path = REPO) -> str:
    """docs/sweeps.md as it should be."""
    report = sweep_report.text(sweeps.load_results(), "sweeps.png")
    return between_marks((repo / "docs" / "sweeps.md").read_text(encoding="utf-8"), "report", report)


if __name__ == "__main__":
    try:
        (REPO / "docs" / "sweeps.md").write_text(fresh_page(), encoding="utf-8", newline="\n")
    except ValueError as error:
        sys.exit(str(error))
    sweep_report.figure(sweeps.load_results(), REPO / "docs" / "sweeps.png")
