"""The committed outputs are those of the notebooks as they are now.

`python -m tclib test` executes copies in build/nbmake; this compares them, cell by cell. Another
processor gives slightly other numbers and another system draws slightly other letters, so
numbers and figures have tolerances; of a cell tagged `varies` (one that trains) only the findings are compared: whether
they hold or not is committed, too.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tclib.cli.prepare import own_model
from tests.conftest import COMMITTED, REPO

COPIES = REPO / "build" / "nbmake"
RELATIVE = 2e-2
LARGEST_FIGURE_DISTANCE = 0.04
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
ADDRESS = re.compile(r"0x(?:[0-9a-f]{4,}|\.\.\.)|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")

not_run = pytest.mark.skipif(not COPIES.is_dir(), reason="build/nbmake is absent: run `python -m tclib test`")


def difference(committed: str, fresh: str) -> str | None:
    """How two texts differ, apart from spaces, addresses and small changes of numbers."""
    frames, values = zip(*(split(text) for text in (committed, fresh)), strict=True)
    if frames[0] != frames[1]:
        return f"text differs:\n  committed: {committed!r}\n  now:       {fresh!r}"
    for old, new in zip(*values, strict=True):
        if not close(old, new):
            return f"{old} became {new} in {committed[:300]!r}"
    return None


def split(text: str) -> tuple[str, list[str]]:
    """Text with its numbers blanked, and the numbers."""
    text = " ".join(ADDRESS.sub("ADDRESS", text).replace("\N{MINUS SIGN}", "-").split())
    return NUMBER.sub("#", text), NUMBER.findall(text)


def close(old: str, new: str) -> bool:
    """Whether two printed numbers agree: within 2%, or one unit of the last printed decimal."""
    a, b = (float(text.replace(",", "")) for text in (old, new))
    return math.isclose(a, b, rel_tol=RELATIVE, abs_tol=max(last_unit(old), last_unit(new)))


def last_unit(text: str) -> float:
    """One unit of the last decimal printed (with some room); 0 for a whole number."""
    mantissa, _, exponent = text.lower().partition("e")
    decimals = len(mantissa.partition(".")[2])
    return 1.01 * 10.0 ** (int(exponent or 0) - decimals) if decimals else 0.0


def figure_distance(committed: str, fresh: str) -> float:
    """Mean difference of grey, between 0 and 1, of two base64 PNGs seen from far away."""
    return float(np.abs(thumbnail(committed) - thumbnail(fresh)).mean())


def thumbnail(png: str) -> np.ndarray:
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    paper = Image.new("RGBA", image.size, "white")
    grey = Image.alpha_composite(paper, image).convert("L")
    return np.asarray(grey.resize((48, 48), Image.Resampling.BOX), dtype=float) / 255


def outputs(cell: dict[str, Any]) -> tuple[list[str], list[str]]:
    """All text and all figures that a cell shows; neighbouring prints count as one."""
    texts, figures, printed = [], [], ""
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            printed += "".join(output["text"])
        elif output["output_type"] == "error":
            texts.append(f"{output['ename']}: {output['evalue']}")
        for kind, data in output.get("data", {}).items():
            if kind.startswith("text/"):
                texts.append("".join(data))
            elif kind == "image/png":
                figures.append("".join(data))
    return [printed, *texts], figures


FINDING = re.compile(r"^(?:holds|does not hold): .*$", re.MULTILINE)


def compare_cell(committed: dict[str, Any], fresh: dict[str, Any]) -> list[str]:
    """Every way in which the outputs of a cell changed; where they may vary, only whether its findings still hold."""
    if "varies" in committed["metadata"].get("tags", ()):
        old, new = (FINDING.findall("\n".join(outputs(cell)[0])) for cell in (committed, fresh))
        return [] if old == new else [f"findings {old} became {new}"]
    (old_texts, old_figures), (new_texts, new_figures) = outputs(committed), outputs(fresh)
    if len(old_texts) != len(new_texts) or len(old_figures) != len(new_figures):
        return [f"other outputs now; its text is now {new_texts}"]
    problems = [difference(*pair) for pair in zip(old_texts, new_texts, strict=True)]
    for number, pair in enumerate(zip(old_figures, new_figures, strict=True), start=1):
        distance = figure_distance(*pair)
        if distance >= LARGEST_FIGURE_DISTANCE:
            problems.append(f"figure {number} differs by {distance:.3f}")
    return [problem for problem in problems if problem]


@not_run
@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_outputs_are_fresh(path):
    copy = COPIES / path.name
    if own_model(path) and not copy.is_file():
        pytest.skip(f"it needs {own_model(path)}: run `python -m tclib test-all` where that model is")
    assert copy.is_file(), "not executed: run `python -m tclib test` again"
    pairs = [json.loads(file.read_text(encoding="utf-8"))["cells"] for file in (path, copy)]
    problems = []
    for number, (committed, fresh) in enumerate(zip(*pairs, strict=True), start=1):
        where = f"{path.name}, cell {number}"
        assert committed["source"] == fresh["source"], f"{where} changed since the run"
        if committed["cell_type"] == "code":
            problems += [f"{where}: {problem}" for problem in compare_cell(committed, fresh)]
    advice = f"if that is right: python tools/execute.py notebooks/{path.name}"
    assert not problems, "\n".join([*problems, advice])


@not_run
def test_the_notebooks_ran():
    status = COPIES / "status.txt"
    if not COMMITTED and not status.exists():
        pytest.skip("there are no notebooks yet")
    assert status.read_text(encoding="utf-8") == "0", "a notebook failed: see the first pytest summary above"


@pytest.mark.parametrize(
    ("committed", "fresh", "same"),
    [
        ("p = 0.870", "p = 0.868", True),
        ("p = 0.87", "p = 0.80", False),
        ("p = 0.00", "p = 0.01", True),
        ("p = -0.00", "p = 0.00", True),
        ("feature 12", "feature 13", False),
        ("1,204 tokens", "1,210 tokens", True),
        ("1.2e-07", "1.3e-07", True),
        ("L0   23.0\nL1  9.9", "L0 23.1\nL1 10.0", True),
        ("layer 2 carries it", "layer 2 carries 0.3 of it", False),
        ("<object at 0x7f12ab34>", "<object at 0x55ccdd10>", True),
        ("holds: a", "does not hold here: a", False),
        ("nan", "0.5", False),
    ],
)
def test_difference(committed, fresh, same):
    assert (difference(committed, fresh) is None) == same


def chart(height: int, shift: int = 0) -> str:
    image = Image.new("RGB", (640, 360), "white")
    ImageDraw.Draw(image).rectangle([100 + shift, 360 - height, 400 + shift, 360], fill="black")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_figure_distance():
    assert figure_distance(chart(200), chart(200)) == 0
    assert figure_distance(chart(200), chart(200, shift=2)) < LARGEST_FIGURE_DISTANCE
    assert figure_distance(chart(200), chart(80)) > LARGEST_FIGURE_DISTANCE


def test_a_planted_change_is_found():
    def cell(text, height):
        return {
            "metadata": {},
            "outputs": [
                {"output_type": "stream", "name": "stdout", "text": [text]},
                {"output_type": "display_data", "data": {"image/png": chart(height)}},
            ],
        }

    assert compare_cell(cell("p = 0.87\n", 200), cell("p = 0.871\n", 201)) == []
    assert len(compare_cell(cell("p = 0.87\n", 200), cell("p = 0.5\n", 20))) == 2
    assert compare_cell(cell("p", 200), {"metadata": {}, "outputs": []})


def test_findings_are_held_to_their_outcome_where_numbers_vary():
    def cell(text):
        stream = {"output_type": "stream", "name": "stdout", "text": [text]}
        return {"metadata": {"tags": ["varies"]}, "outputs": [stream]}

    assert compare_cell(cell("p = 0.87\nholds: a\n"), cell("p = 0.5\nholds: a\n")) == []
    assert compare_cell(cell("holds: a\n"), cell("does not hold: a\n"))
