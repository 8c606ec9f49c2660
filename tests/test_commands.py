"""Every command that README, TEACHING, docs, the Makefile and the notebooks print is one that can be given.

Commands that cost little are run. Of the others the names, options and values are checked by what would check them:
make itself, the parsers of the command line, and what the notebooks declare. A command of an unknown kind fails.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tclib.cli import bootstrap, grade, run, sweep, teach
from tclib.nb import declared_parameters
from tclib.nb.sweeps import NOTEBOOK
from tclib.nb.sweeps.grid import expand
from tests.conftest import COMMITTED, REPO
from tools import address

PROGRAM = re.compile(
    r"(?:\w+=\S* )*(?:\.venv/bin/)?(?:make|python3?|papermill|nbgrader|dask|git|pip|jupyter|rm|cd)(?: |$)|-p |--model "
)
MAKEFILE = (REPO / "Makefile").read_text(encoding="utf-8")
# What needs the network is only compared with what was meant.
ONLINE = ("-m pip install playwright", "-m playwright install chromium")


def pages() -> Iterator[tuple[str, str]]:
    """Names and texts of everything that prints commands; the Makefile's comments as Markdown."""
    for path in (REPO / "README.md", REPO / "TEACHING.md", *sorted((REPO / "docs").glob("*.md"))):
        yield path.name, path.read_text(encoding="utf-8")
    yield "Makefile", re.sub(r"(?m)^#   (.*)$|^#(.*)$|^.*$", lambda m: f"`{m[1]}`" if m[1] else m[2] or "", MAKEFILE)
    for path in COMMITTED:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        yield path.stem, "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def commands() -> list[tuple[str, str]]:
    """Every command of every page, once."""
    found: dict[tuple[str, str], None] = {}
    for page, text in pages():
        blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines()]
        spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
        for line in [*lines, *(" ".join(span.split()) for span in spans)]:
            if PROGRAM.match(line):
                found[page, re.sub(r"\s+# .*", "", line)] = None
    return list(found)


COMMANDS = commands()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with the repository's notebooks, in which commands may write."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "notebooks").symlink_to(REPO / "notebooks", target_is_directory=True)
    return folder


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: value[:70])
def test_printed_command(page, command, clone, monkeypatch):
    words = shlex.split(command)
    while "=" in words[0]:
        name = words.pop(0).split("=")[0]
        assert name.startswith("PIP_") or name in Path(bootstrap.__file__).read_text(encoding="utf-8")
    check(words, clone, monkeypatch)


def check(words: list[str], clone: Path, monkeypatch) -> None:
    program, rest = Path(words[0]).name, words[1:]
    if program == "make":
        check_make(rest, clone, monkeypatch)
    elif program in ("-p", "--model"):
        check_options(words)
    elif program == "papermill":
        check_papermill(rest, clone)
    elif program in ("python", "python3"):
        if rest[:2] == ["-m", "tclib"]:
            check_tclib(rest[2:], clone, monkeypatch)
        elif rest[0] == "-m" and rest[1].startswith("making"):
            check_making(rest[1], rest[2:])
        elif rest[0].startswith("tools/"):
            check_tool(rest[0], rest[1:])
        else:
            assert " ".join(rest) in ONLINE, rest
    elif program == "git":
        assert (
            subprocess.run(["git", *rest[:1], "-h"], capture_output=True).returncode == 129
            and (REPO / rest[1]).exists()
        )
    elif program == "dask":
        said = subprocess.run(
            [sys.executable, "-m", "dask", rest[0], "--help"], capture_output=True, encoding="utf-8"
        ).stdout
        assert all(option in said for option in rest if option.startswith("--")) and "Usage" in said
    elif program == "rm":
        assert not [word for word in rest if word in ("build", "build/nbgrader", "runs", ".venv")]  # work of people
    elif program == "jupyter":
        from nbconvert.exporters import get_exporter  # takes a second

        assert rest[:2] == ["nbconvert", "--to"] and get_exporter(rest[2])
    else:
        raise AssertionError(f"a command of a kind that no test knows: {words}")


def check_make(rest: list[str], clone: Path, monkeypatch) -> None:
    """What make would run, and that every variable has an effect."""
    for variable in (word.split("=")[0] for word in rest if "=" in word):
        assert f"$({variable})" in MAKEFILE or f"export {variable}" in MAKEFILE, f"make ignores {variable}"
    # Under `make test` itself, an inner make would take over its options and name the folders that it enters.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    command = ["make", "-n", "PYTHON=python", *rest]
    said = subprocess.run(command, cwd=REPO, env=outside, capture_output=True, encoding="utf-8")
    assert said.returncode == 0, said.stderr
    for line in said.stdout.splitlines():
        check(shlex.split(line.removeprefix("exec ")), clone, monkeypatch)


def check_tclib(arguments: list[str], clone: Path, monkeypatch) -> None:
    if not arguments:
        return  # `python -m tclib` shows what there is
    name, rest = arguments[0], arguments[1:]
    assert name in bootstrap.COMMANDS
    if name == "run":
        check_run(rest)
    elif name == "sweep":
        options = sweep.parse(rest)
        declared = declared_parameters(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
        assert expand(sweep.with_axes(sweep.SMALL, options.axes, declared), declared)
    elif name in ("student", "report"):
        with monkeypatch.context() as context:
            context.setenv("PATH", "")  # no Chromium, no PDF
            assert getattr(teach, name)(rest, clone) == 0
    elif name == "grade":
        assert teach.student(["--graded"], clone) == 0
        assert grade.grade([*rest, "--nbgrader", str(clone)], clone) == 2  # where nbgrader is not
    elif name in ("lab", "explore"):
        for option in rest:
            assert option in ("--name", "mine", "--port", "9000", "--no-browser")  # run in tests/test_serve.py
    else:
        assert not rest


def check_run(rest: list[str]) -> None:
    """Notebooks, names and values are accepted, and the choice of one number is one notebook."""
    options = run.parse(rest)
    parameters = run.read_parameters(options)
    notebooks = run.select(REPO / "notebooks", options.only)
    for notebook in notebooks:
        run.check(notebook, parameters)
    assert options.only is None or len(notebooks) == len(options.only.split(","))


def check_options(words: list[str]) -> None:
    """Options without their command: some notebook accepts them together."""
    parameters = run.read_parameters(run.parse(words))
    for path in COMMITTED:
        try:
            return run.check(path, parameters)
        except run.Refused as error:
            last = error
    raise last


def check_papermill(rest: list[str], clone: Path) -> None:
    """papermill itself, without executing; what it injects is accepted."""
    prepare = [] if "--help-notebook" in rest else ["--prepare-only"]
    out = clone / "out.ipynb"
    rest = [str(out) if word == "out.ipynb" else word for word in rest]
    said = subprocess.run(
        [sys.executable, "-m", "papermill", *prepare, *rest], cwd=REPO, capture_output=True, encoding="utf-8"
    )
    assert said.returncode == 0, said.stderr
    if prepare:
        cells = json.loads(out.read_text(encoding="utf-8"))["cells"]
        (injected,) = ["".join(c["source"]) for c in cells if "injected-parameters" in c["metadata"].get("tags", ())]
        values = {node.targets[0].id: str(ast.literal_eval(node.value)) for node in ast.parse(injected).body}
        run.check(next(REPO / word for word in rest if word.startswith("notebooks/")), values)
    else:
        assert "rows: int" in said.stdout


def check_making(module: str, rest: list[str]) -> None:
    source = (REPO / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert all(f'"{word}"' in source for word in rest if word.startswith("--"))


def check_tool(script: str, rest: list[str]) -> None:
    assert (REPO / script).is_file()
    for word in rest:
        assert list(REPO.glob(word)) or re.fullmatch(address.ADDRESS, word), word


def test_commands_are_found():
    """The search above finds them in every place and form."""
    found = {command for _, command in COMMANDS}
    assert 'make run ONLY=04 PARAMS="-p rows 50" NAME=few-rows' in found  # a block
    assert "make report NOTEBOOK=04" in found  # a sentence, and a comment of the Makefile
    assert {page for page, _ in COMMANDS} >= {"README.md", "TEACHING.md", "sweeps.md", "Makefile", "00_start_here"}


@pytest.mark.slow  # executes three notebooks
@pytest.mark.parametrize("line", ['make run ONLY=04 PARAMS="-p rows 50" NAME=few-rows', "MAKEFILE"])
def test_the_examples_of_run_do_run(line, tmp_path, monkeypatch):
    line = MAKEFILE.splitlines()[1].removeprefix("#   ") if line == "MAKEFILE" else line
    assert line in {command for _, command in COMMANDS}
    clone = tmp_path / "clone"
    shutil.copytree(REPO / "tclib", clone / "tclib")
    for name in ("notebooks", "data", "Makefile", "constraints.txt", "pyproject.toml"):
        (clone / name).symlink_to(REPO / name)
    monkeypatch.setenv("PYTHONPATH", str(clone))
    monkeypatch.setenv("TCLIB_VENV", "off")
    said = subprocess.run(
        [*shlex.split(line), f"PYTHON={sys.executable}"], cwd=clone, capture_output=True, encoding="utf-8"
    )
    assert said.returncode == 0, said.stdout + said.stderr
    assert "headline" in said.stdout and "FAILED" not in said.stdout
