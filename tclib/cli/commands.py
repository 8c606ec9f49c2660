"""The commands themselves, inside the environment that the bootstrap made."""

from __future__ import annotations

import io
import sys
from importlib import import_module

from tclib.cli.bootstrap import disk_sentence

MODULES = {  # of the commands that share one; the others have a module of their own name
    "student": "teach", "bundle": "teach", "report": "teach", "docs": "site", "lab": "serve", "explore": "serve",
    "lint": "testing", "test": "testing", "test-all": "testing",
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run one command; return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows no accents still gets every line
            stream.reconfigure(errors="backslashreplace")
    try:
        return command(*arguments)
    except OSError as error:
        if not (sentence := disk_sentence(error)):
            raise
        print(sentence, file=sys.stderr)
        return 1


def command(name: str, *rest: str) -> int:
    """Run the command with this name; return its exit status."""
    module = import_module(f"tclib.cli.{MODULES.get(name, name)}")
    return getattr(module, name.replace("-", "_"))(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
