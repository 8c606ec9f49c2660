"""`python -m tclib lab|explore`: Jupyter's servers on the notebooks. They get every option that is not ours."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tclib.cli.bootstrap import REPO, wait
from tclib.io.paths import with_diagrams

EXPLORED = "08_your_prompt_your_model.ipynb"
# A browser then asks nothing of any other machine, whatever the page, its template or a label in it refers to.
ONLY_HERE = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"
VOILA = [
    f"--Voila.tornado_settings={ {'headers': {'Content-Security-Policy': ONLY_HERE}} }",
    "--VoilaExporter.markdown_renderer_class=tclib.cli.live_page.WithoutPictures",
    # A closed page asks Voila to end its kernel, but without the token that Voila wants, so kernels would pile up.
    "--MappingKernelManager.cull_idle_timeout=20",
    "--MappingKernelManager.cull_interval=5",
]


def lab(arguments: Sequence[str], repo: Path = REPO) -> int:
    """Open JupyterLab on the notebooks or on a copy of them; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tclib lab",
        allow_abbrev=False,
        epilog="Other options are JupyterLab's own, such as --port 9000 and --no-browser.",
    )
    parser.add_argument("--name", help="work on a copy of the notebooks in runs/<name>, which is made if it is missing")
    options, others = parser.parse_known_args(arguments)
    folder = repo / "notebooks"
    if options.name:
        if Path(options.name).name != options.name:
            print(f"{options.name!r} is not a folder name: write a name without slashes.", file=sys.stderr)
            return 2
        folder = repo / "runs" / options.name
        if not folder.exists():
            copy(repo / "notebooks", folder)
    else:
        print(
            "JupyterLab saves into notebooks/: `git restore notebooks` brings the committed outputs back, "
            "and `python -m tclib lab --name mine` works on a copy.",
            flush=True,
        )
    # JupyterLab refuses root, as whom containers run.
    root = ["--allow-root"] if getattr(os, "geteuid", lambda: 1)() == 0 else []
    return wait(subprocess.Popen([sys.executable, "-m", "jupyterlab", str(folder), *root, *others]))


def copy(notebooks: Path, folder: Path) -> None:
    """Copy the notebooks; the folder is there only if all of them are."""
    part = folder.with_name(f"{folder.name}.part")
    try:
        part.mkdir(parents=True)
        for path in sorted(notebooks.glob("*.ipynb")):
            copied = with_diagrams(path.read_text(encoding="utf-8"), notebooks, folder)
            (part / path.name).write_text(copied, encoding="utf-8", newline="\n")
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def explore(arguments: Sequence[str], repo: Path = REPO) -> int:
    """Serve the explorers of notebook 08 with Voila; return its exit status. Options are Voila's own."""
    page = repo / "notebooks" / EXPLORED
    # The last of two options that disagree counts.
    return wait(subprocess.Popen([sys.executable, "-m", "voila", str(page), *VOILA, *arguments]))
