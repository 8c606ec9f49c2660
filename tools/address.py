"""Say where the repository is published: `python tools/address.py NAME/REPOSITORY`.

Until then no file names an address. Afterwards pyproject.toml has it, and each notebook has badges that open it on
Colab and Binder and a first code cell that installs the package on Colab. A second call moves everything.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import nbformat

from tclib.nb.teaching.students import without_address

REPO = Path(__file__).resolve().parents[1]
ADDRESS = r"[\w.-]+/[\w.-]+"
URLS = '[project.urls]\nRepository = "https://github.com/{address}"\n'
BADGES = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{address}/blob/main/notebooks/{name}) "
    "[![Open in Binder](https://mybinder.org/badge_logo.svg)]"
    "(https://mybinder.org/v2/gh/{address}/main?labpath=notebooks/{name})"
)
INSTALL = """\
import importlib.util

if importlib.util.find_spec("tclib") is None:  # only on Colab: a clone and Binder have the package
    import subprocess
    import sys

    package = "tclib[ui] @ git+https://github.com/{address}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)"""


def published(repo: Path = REPO) -> str | None:
    """``NAME/REPOSITORY`` as pyproject.toml has it, or None."""
    project = tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"].removeprefix("https://github.com/") if "urls" in project else None


def publish(address: str, repo: Path = REPO) -> list[Path]:
    """Write ``address`` wherever one belongs and return the files that it is in.

    Raises:
        ValueError: ``address`` is not NAME/REPOSITORY.
    """
    if not re.fullmatch(ADDRESS, address):
        raise ValueError(f"{address!r} is not an address: write NAME/REPOSITORY, as in its GitHub page.")
    project = repo / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    if old := published(repo):
        text = text.replace(URLS.format(address=old), "")
    before, after = text.split("[project.optional-dependencies]")
    text = f"{before}{URLS.format(address=address)}\n[project.optional-dependencies]{after}"
    project.write_text(re.sub(r"\n{3,}", "\n\n", text), encoding="utf-8", newline="\n")
    notebooks = sorted((repo / "notebooks").glob("[0-9][0-9]*_*.ipynb"))
    for path in notebooks:
        notebook = without_address(nbformat.read(path, as_version=4))
        badges = nbformat.v4.new_markdown_cell(BADGES.format(address=address, name=path.name))
        badges.id, badges.metadata = "badges", {"tags": ["badges"]}
        notebook.cells.insert(2, badges)
        for cell in notebook.cells:
            if "install" in cell.metadata.get("tags", ()):
                cell.source = INSTALL.format(address=address)
        nbformat.write(notebook, path)
    return [project, *notebooks]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/address.py NAME/REPOSITORY")
    try:
        print(*(path.relative_to(REPO) for path in publish(sys.argv[1])), sep="\n")
    except ValueError as error:
        sys.exit(str(error))
