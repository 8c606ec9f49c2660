"""The commands themselves, inside the environment that the bootstrap made."""

from __future__ import annotations

import io
import subprocess
import sys

from tclib.cli.bootstrap import REPO, wait


def main(arguments: list[str]) -> int:
    """Run one command; return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows no accents still gets every line
            stream.reconfigure(errors="backslashreplace")
    command, *rest = arguments
    if command == "run":
        from tclib.cli.run import run

        return run(rest)
    if command == "sweep":
        from tclib.cli import sweep

        return sweep.main(rest)
    if command in ("student", "bundle", "report"):
        from tclib.cli import teach

        return getattr(teach, command)(rest)
    if command == "lab":
        lab = [sys.executable, "-m", "jupyterlab", str(REPO / "notebooks"), *rest]
        return wait(subprocess.Popen(lab))
    if command == "explore":
        page = REPO / "notebooks" / "08_your_prompt_your_model.ipynb"
        return wait(subprocess.Popen([sys.executable, "-m", "voila", str(page), *rest]))
    from tclib.cli.testing import test

    return test(slow=command == "test-all")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
