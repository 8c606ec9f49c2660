"""`python -m tclib test`: the code's style and the notebooks first, then everything else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tclib.cli.bootstrap import REPO, SetupError, need, wait
from tclib.cli.prepare import has_smollm2, own_model

CELL_TIMEOUT = 300
LINT_IMPORTS = (
    "import sys; from importlinter.cli import lint_imports as lint; sys.exit(lint(no_cache=True, no_logo=True))"
)


def test(arguments: Sequence[str] = (), slow: bool = False) -> int:
    """Run the tests; return 0 only if all of them passed."""
    env = dict(os.environ)
    parallel = []
    if (os.cpu_count() or 1) >= 2:
        # Two kernels with two threads each would fight over two cores.
        env["OMP_NUM_THREADS"] = "1"
        parallel = ["-n", "2", "--dist=worksteal"]
    style = lint()
    if slow:
        need(REPO, "docs", "sphinx")
    notebooks = execute_copies(REPO, parallel, env, slow)
    markers = ["-m", "slow or not slow"] if slow else []
    others = pytest(["tests", *markers, *parallel], env)
    return style or notebooks or others


def test_all(arguments: Sequence[str] = ()) -> int:
    """Run the slow tests too."""
    return test(slow=True)


def lint(arguments: Sequence[str] = ()) -> int:
    """Check the style and types of all code outside the notebooks, and who imports whom; return 0 if all is well."""
    try:
        need(REPO, "lint", "basedpyright")
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    ruff = [sys.executable, "-m", "ruff"]
    checks = (
        [*ruff, "check", "--quiet"],
        [*ruff, "format", "--check", "--quiet"],
        [sys.executable, "-c", LINT_IMPORTS],
        [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable],
    )
    return max(wait(subprocess.Popen(command, cwd=REPO)) for command in checks)


def execute_copies(repo: Path, parallel: list[str], env: dict[str, str], slow: bool = False) -> int:
    """Execute copies of the notebooks in build/nbmake, where test_freshness.py finds them.

    Those about a model of their own are executed with the slow tests, where that model is.
    """
    copies = repo / "build" / "nbmake"
    shutil.rmtree(copies, ignore_errors=True)
    copies.mkdir(parents=True)
    paths = sorted((repo / "notebooks").glob("[0-9][0-9]*_*.ipynb"))
    names = [path.name for path in paths if own_model(path) is None or (slow and has_smollm2())]
    for name in names:
        shutil.copy(repo / "notebooks" / name, copies / name)
    if not names:
        return 0
    options = ["--nbmake", "--overwrite", f"--nbmake-timeout={CELL_TIMEOUT}"]
    options += ["--nbmake-kernel=python3", *parallel]
    status = pytest([*options, *(str(copies / name) for name in names)], env)
    # Read by test_freshness.py: pytest's last summary then never hides a failed notebook.
    (copies / "status.txt").write_text(str(status), encoding="utf-8")
    return status


def pytest(arguments: list[str], env: dict[str, str]) -> int:
    """Run pytest in the repository; return its exit status."""
    command = [sys.executable, "-m", "pytest", *arguments]
    return wait(subprocess.Popen(command, cwd=REPO, env=env))
