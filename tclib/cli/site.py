"""`python -m tclib docs`: a website of the notebooks as they are committed and of the pages in docs/."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tclib.cli.bootstrap import REPO, SetupError, need, wait

FIRST = "docs/index.html"


def docs(arguments: Sequence[str], repo: Path = REPO) -> int:
    """Build the site into build/site; return 0, or another number if a page is wrong or a link leads nowhere."""
    argparse.ArgumentParser(prog="python -m tclib docs", allow_abbrev=False).parse_args(arguments)
    try:
        need(REPO, "docs", "sphinx")
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    site = repo / "build" / "site"
    # -W makes an error of every warning, such as a link without a target; links to other machines are left alone.
    options = ["-q", "-E", "-W", "--keep-going", "-c", str(REPO / "docs"), "-d", str(repo / "build" / "doctrees")]
    status = wait(subprocess.Popen([sys.executable, "-m", "sphinx", *options, str(repo), str(site)], cwd=repo))
    if status == 0:
        refresh = f'<!doctype html><meta http-equiv="refresh" content="0; url={FIRST}">\n'
        (site / "index.html").write_text(refresh, encoding="utf-8")
        print(f"Open it:  {site / FIRST}")
    return status
