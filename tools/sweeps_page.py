"""Write the report of the bundled sweep into docs/sweeps.md, with its figure: `python tools/sweeps_page.py`."""

from __future__ import annotations

import sys
from pathlib import Path

from tclib.nb import sweeps
from tclib.nb.sweeps import sweep_report

REPO = Path(__file__).resolve().parents[1]
START, END = "<!-- report:start -->", "<!-- report:end -->"


def fresh_page(repo: Path = REPO) -> str:
    """docs/sweeps.md as it should be.

    Raises:
        ValueError: the page lacks the marks between which the report stands.
    """
    page = (repo / "docs" / "sweeps.md").read_text(encoding="utf-8")
    if START not in page or END not in page:
        raise ValueError(f"docs/sweeps.md lacks the markers {START} and {END}.")
    before, rest = page.split(START, 1)
    report = sweep_report.text(sweeps.load_results(), "sweeps.png")
    return f"{before}{START}\n{report}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    try:
        (REPO / "docs" / "sweeps.md").write_text(fresh_page(), encoding="utf-8", newline="\n")
    except ValueError as error:
        sys.exit(str(error))
    sweep_report.figure(sweeps.load_results(), REPO / "docs" / "sweeps.png")
