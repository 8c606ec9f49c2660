"""The commands themselves, inside the environment that the bootstrap made."""

from __future__ import annotations

import io
import sys

from tclib.cli.bootstrap import disk_sentence


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
    if name == "run":
        from tclib.cli.run import run

        return run(rest)
    if name == "sweep":
        from tclib.cli import sweep

        return sweep.main(rest)
    if name in ("student", "bundle", "report"):
        from tclib.cli import teach

        return getattr(teach, name)(rest)
    if name == "grade":
        from tclib.cli.grade import grade

        return grade(rest)
    if name == "smollm2":
        from tclib.cli.smollm2 import smollm2

        return smollm2(rest)
    if name == "docs":
        from tclib.cli.site import docs

        return docs(rest)
    if name in ("lab", "explore"):
        from tclib.cli import serve

        return getattr(serve, name)(rest)
    from tclib.cli.testing import lint, test

    if name == "lint":
        return lint()
    return test(slow=name == "test-all")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
