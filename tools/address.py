"""Say where the repository is published: `python tools/address.py NAME/REPOSITORY` rewrites every link to it."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
FILES = ["pyproject.toml", "README.md", "TEACHING.md"]


def published(repo: Path = REPO) -> str:
    """``NAME/REPOSITORY`` as pyproject.toml has it."""
    urls = tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    return urls["Repository"].removeprefix("https://github.com/")


def move(new: str, repo: Path = REPO) -> list[Path]:
    """Replace the old address by ``new`` and return the files that changed.

    Raises:
        ValueError: ``new`` is not NAME/REPOSITORY.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", new):
        raise ValueError(f"{new!r} is not an address: write NAME/REPOSITORY, as in its GitHub page.")
    old, changed = published(repo), []
    for path in [*(repo / name for name in FILES), *sorted((repo / "notebooks").glob("*.ipynb"))]:
        text = path.read_text(encoding="utf-8")
        if old in text:
            path.write_text(text.replace(old, new), encoding="utf-8", newline="\n")
            changed.append(path)
    return changed


if __name__ == "__main__":
    try:
        (address,) = sys.argv[1:]
        print(*(path.relative_to(REPO) for path in move(address)), sep="\n")
    except ValueError as error:
        sys.exit(str(error))
