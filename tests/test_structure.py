"""The shape of the committed notebooks and of the library: small modules, rooms, imports that go one way."""

from __future__ import annotations

import ast
import json
import re
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from importlinter.cli import lint_imports

from tclib.cli.prepare import own_model
from tests.conftest import COMMITTED, REPO

LONGEST_CELL = 25
LONGEST_MEDIAN = 8
LEAST_PROSE = 0.7
LARGEST_FILE = 1_000_000
ABSOLUTE_PATH = re.compile(r"(?<![\w.])/(?:home|Users|root|tmp|work|mnt|usr)/|\b[A-Z]:\\")
FORBIDDEN = {
    r"^\s*[!%]\s*(pip|conda)\b": "installs packages",
    r"^\s*from\s+\S+\s+import\s+\*": "star import",
    r"\.cuda\(": "needs a GPU",
    r"warnings\.(filterwarnings|simplefilter)": "hides warnings",
    r"^\s*%run\b|import_ipynb": "runs another notebook",
    r"^\s*(import|from)\s+(notebooks\b|\d\d_)": "imports another notebook",
}
MODULES = sorted((REPO / "tclib").rglob("*.py"))


def read(path: Path) -> dict[str, Any]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    return notebook


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def prose(notebook: dict[str, Any]) -> str:
    texts = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join(texts)


def text_of(output: dict[str, Any]) -> str:
    parts = ["".join(output.get("text", ""))]
    parts += ["".join(data) for kind, data in output.get("data", {}).items() if "text/" in kind]
    return "\n".join(parts)


def length(cell: dict[str, Any]) -> int:
    return sum(bool(line.strip()) for line in cell["source"].splitlines())


def literals(source: str) -> dict[str, Any]:
    """Names and values of a cell that holds one annotated literal per line, and nothing else."""
    values = {}
    for line in source.splitlines():
        (statement,) = ast.parse(line).body
        assert isinstance(statement, ast.AnnAssign), f"not an annotated literal: {line}"
        assert " # " in line, f"no comment says what this is: {line}"
        values[statement.target.id] = ast.literal_eval(statement.value)
    return values


def declared_defaults(source: str) -> dict[str, Any]:
    """Names and defaults in the ``tc.parameters(globals(), ...)`` of a cell."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tc.parameters":
            return {word.arg: _default(word.value) for word in node.keywords}
    raise AssertionError("the cell after the tagged one does not call tc.parameters")


def _default(call: ast.expr) -> Any:
    """The default of a ``tc.Parameter(...)``, given by position or by name."""
    given = [word.value for word in call.keywords if word.arg == "default"]
    return ast.literal_eval([*call.args, *given][0])


each_notebook = pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)


@each_notebook
def test_executed_in_order_without_errors(path):
    notebook = read(path)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    cells = code_cells(notebook)
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, len(counts) + 1))
    for cell in cells:
        for output in cell["outputs"]:
            assert output["output_type"] != "error", output.get("evalue")
            assert output.get("name") != "stderr", text_of(output)


@each_notebook
def test_length_of_cells(path):
    notebook = read(path)
    cells = code_cells(notebook)
    lengths = [length(cell) for cell in cells]
    for cell in cells:
        assert length(cell) <= LONGEST_CELL, f"cell too long: {cell['source'][:80]}"
    assert statistics.median(lengths) <= LONGEST_MEDIAN
    assert len(notebook["cells"]) - len(cells) >= LEAST_PROSE * len(cells)


@each_notebook
def test_begins_with_imports_and_parameters(path):
    cells = [cell for cell in code_cells(read(path)) if "install" not in cell["metadata"].get("tags", ())]
    imports, tagged, checked = cells[:3]
    for statement in ast.parse(imports["source"]).body:
        is_import = isinstance(statement, ast.Import | ast.ImportFrom)
        # A bare expression shows the version.
        assert is_import or isinstance(statement, ast.Expr), ast.unparse(statement)
    assert "import tclib as tc" in imports["source"]
    assert "parameters" in tagged["metadata"].get("tags", ())
    values = literals(tagged["source"])
    assert list(values)[0] == "model" and values["model"] == (own_model(path) or "bundled")
    assert declared_defaults(checked["source"]) == values


@each_notebook
def test_nothing_forbidden(path):
    for cell in code_cells(read(path)):
        for pattern, reason in FORBIDDEN.items():
            assert not re.search(pattern, cell["source"], re.MULTILINE), f"{reason}: {pattern}"
        texts = [cell["source"], *map(text_of, cell["outputs"])]
        for text in texts:
            assert not ABSOLUTE_PATH.search(text), f"absolute path: {text[:200]}"


@each_notebook
def test_no_widget_state_or_timing(path):
    notebook = read(path)
    assert not {"widgets", "papermill"} & notebook["metadata"].keys()
    for cell in notebook["cells"]:
        assert not {"execution", "papermill"} & cell["metadata"].keys()


@each_notebook
def test_size(path):
    assert path.stat().st_size < LARGEST_FILE


@each_notebook
def test_headings(path):
    notebook = read(path)
    without_code = re.sub(r"^```.*?^```", "", prose(notebook), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^(#+) (.+)$", without_code, flags=re.MULTILINE)
    levels = [len(marks) for marks, _ in headings]
    assert notebook["cells"][0]["source"].startswith(f"# {path.name[:2]} ")
    assert levels.count(1) == 1
    for above, below in zip(levels, levels[1:], strict=False):
        assert below <= above + 1, f"heading level jumps from {above} to {below}"


@each_notebook
def test_opens_and_closes_as_the_others(path):
    notebook = read(path)
    text = prose(notebook)
    for part in ("You will", "Needs", "Time", "What you learned", "Where this can mislead"):
        assert part in text, f"no {part!r}"
    last = code_cells(notebook)[-1]
    assert "tc.headline(" in last["source"]
    assert {"question", "needs", "minutes"} <= notebook["metadata"].get("tclib", {}).keys()


@each_notebook
def test_figures_are_introduced(path):
    cells = read(path)["cells"]
    for before, cell in zip(cells, cells[1:], strict=False):
        drawn = any("image/png" in output.get("data", {}) for output in cell.get("outputs", ()))
        if drawn:
            assert before["cell_type"] == "markdown", f"no prose before: {cell['source'][:80]}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPO / "tclib")))
def test_module_is_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


def test_no_file_name_twice():
    counts = Counter(path.name for path in MODULES if path.name != "__init__.py")
    assert not [name for name, count in counts.items() if count > 1]


def test_every_room_says_what_it_is():
    for path in MODULES:
        if path.name == "__init__.py":
            assert len((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()) >= 3, path


def test_imports_go_one_way(capsys):
    assert lint_imports(str(REPO / "pyproject.toml"), no_cache=True, no_logo=True) == 0, capsys.readouterr().out


def test_opening_checkpoints_needs_no_generator_of_text():
    code = "import sys, tclib.checkpoints; print([name for name in sys.modules if 'chronicle' in name])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=REPO, check=True)
    assert done.stdout.strip() == "[]"
