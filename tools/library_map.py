"""Write the map of the library into docs/api.md: `python tools/library_map.py`.

The order is that of the layers in pyproject.toml, from the bottom upwards; what a room or a module is for is the first
sentence of its docstring.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

from tclib.io.paths import between_marks

REPO = Path(__file__).resolve().parents[1]


def rooms(repo: Path = REPO) -> list[str]:
    """Names of rooms and modules of `tclib`, what is imported before what imports it."""
    project = tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    return [name.strip() for layer in reversed(layers) for name in layer.split("|")]


def sentence(path: Path) -> str:
    """The first paragraph of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def library_map(repo: Path = REPO) -> str:
    """The map, as Markdown."""
    lines = ["| room or module | what it is for | modules |", "|---|---|---|"]
    for name in rooms(repo):
        place = repo / "tclib" / name
        if place.is_dir():
            inside = sorted(
                f"`{child.stem}/`" if child.is_dir() else f"`{child.stem}`"
                for child in place.iterdir()
                if (child / "__init__.py").exists() or (child.suffix == ".py" and child.stem != "__init__")
            )
            lines.append(f"| **`{name}/`** | {sentence(place / '__init__.py')} | {' '.join(inside)} |")
        else:
            lines.append(f"| `{name}` | {sentence(place.with_suffix('.py'))} | |")
    return "\n".join(lines)


def fresh_page(repo: Path = REPO) -> str:
    """docs/api.md as it should be."""
    return between_marks((repo / "docs" / "api.md").read_text(encoding="utf-8"), "map", library_map(repo))


if __name__ == "__main__":
    try:
        (REPO / "docs" / "api.md").write_text(fresh_page(), encoding="utf-8", newline="\n")
    except ValueError as error:
        sys.exit(str(error))
