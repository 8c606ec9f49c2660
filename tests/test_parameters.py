"""Strict notebook parameters: what is refused, and in which words."""

from __future__ import annotations

import papermill
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tclib as tc
from tools.execute import merge_streams

CELLS = [
    "import tclib as tc",
    "model: str = 'bundled'  # which model\nlayer: int = 2  # which layer\nlam: float = 0.5  # weight",
    "p = tc.parameters(globals(),\n    model=tc.Parameter('bundled'),\n"
    "    layer=tc.Parameter(2, low=0, high=2),\n    lam=tc.Parameter(0.5, low=0))",
    "p.finding('layer is two', p.layer == 2)\ntc.headline('layer', p.layer)",
]


def check(value, parameter, **scope):
    return tc.parameters({"x": value, **scope}, x=parameter).x


@pytest.mark.parametrize(
    ("value", "parameter", "sentence"),
    [
        (7, tc.Parameter(2, low=0, high=2), "x = 7 is out of range: this notebook accepts 0 to 2."),
        (0, tc.Parameter(2, low=1), "x = 0 is out of range: this notebook accepts 1 or more."),
        (3, tc.Parameter(2, high=2), "x = 3 is out of range: this notebook accepts 2 or less."),
        (float("nan"), tc.Parameter(0.5, low=0), "x = nan is out of range"),
        (
            True,
            tc.Parameter(2),
            "x = True has the wrong type: this notebook accepts a whole number.",
        ),
        (2.0, tc.Parameter(2), "accepts a whole number."),
        ("abc", tc.Parameter(2), "x = 'abc' has the wrong type"),
        ("1e-3", tc.Parameter(0.1), "accepts a number; in YAML, write 1.0e-3."),
        ("2.5e3", tc.Parameter(0.1), "accepts a number; in YAML, write 2.5e+3."),
        ("abc", tc.Parameter(0.1), "accepts a number."),
        (False, tc.Parameter(0.1), "accepts a number."),
        ("true", tc.Parameter(False), "accepts True or False, with a capital and without quotes."),
        (1, tc.Parameter(False), "accepts True or False."),
        (7, tc.Parameter("a"), "accepts text; with papermill, write `-r x 7`."),
        (
            "rleu",
            tc.Parameter("relu", choices=["relu", "topk"]),
            "x = 'rleu' is not a choice; did you mean 'relu'? This notebook accepts: 'relu', 'topk'.",
        ),
        (3, tc.Parameter([1]), "accepts a list."),
        ([1, "a"], tc.Parameter([1]), "x = 'a' has the wrong type"),
        ([1, 9], tc.Parameter([1], high=3), "x = 9 is out of range"),
        (
            [],
            tc.Parameter([1], min_length=1),
            "is too short: this notebook needs at least 1 items.",
        ),
        ("", tc.Parameter("text", min_length=1), "needs at least 1 characters."),
    ],
)
def test_refused(value, parameter, sentence):
    with pytest.raises(tc.ParameterError) as caught:
        check(value, parameter)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "parameter"),
    [
        (1, tc.Parameter(2, low=0, high=2)),
        (False, tc.Parameter(True)),
        ("topk", tc.Parameter("relu", choices=["relu", "topk"])),
        ([3, 4], tc.Parameter([1])),
    ],
)
def test_accepted(value, parameter):
    assert check(value, parameter) == value


def test_a_whole_number_is_a_number():
    value = check(1, tc.Parameter(0.5))
    assert value == 1.0 and isinstance(value, float)


@given(low=st.integers(-9, 9), size=st.integers(0, 9), value=st.integers(-99, 99))
def test_range_is_inclusive(low, size, value):
    parameter = tc.Parameter(low, low=low, high=low + size)
    if low <= value <= low + size:
        assert check(value, parameter) == value
    else:
        with pytest.raises(tc.ParameterError):
            check(value, parameter)


def test_unknown_name_gets_a_suggestion():
    history = ["", "import tclib", "# Parameters\nlayr = 1\n"]
    scope = {"model": "bundled", "layer": 2, "In": history}
    with pytest.raises(tc.ParameterError) as caught:
        tc.parameters(scope, model=tc.Parameter("bundled"), layer=tc.Parameter(2))
    assert str(caught.value) == ("unknown parameter 'layr'; did you mean 'layer'? This notebook accepts: layer, model.")


def test_missing_name_says_what_to_write():
    with pytest.raises(tc.ParameterError, match="write `layer: int = 2` there"):
        tc.parameters({}, layer=tc.Parameter(2))


def test_a_name_cannot_hide_a_method():
    with pytest.raises(ValueError, match="'finding'"):
        tc.parameters({"finding": 1}, finding=tc.Parameter(1))


def test_result_suggests_names():
    with pytest.raises(AttributeError, match="did you mean 'layer'"):
        _ = tc.parameters({"layer": 2}, layer=tc.Parameter(2)).layr


def test_findings(capsys):
    default = tc.parameters({"x": 2}, x=tc.Parameter(2))
    other = tc.parameters({"x": 1}, x=tc.Parameter(2))
    assert default.is_default and not other.is_default
    default.finding("it works", True)
    other.finding("it works", True)
    other.finding("it works", False)
    default.finding("it works", False)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "holds: it works", "holds here: it works", "does not hold here: it works", "does not hold: it works"
    ]  # fmt: skip


def test_shown_as_one_sentence():
    assert tc.ParameterError("no")._render_traceback_() == ["ParameterError: no"]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"layr": 1}, "unknown parameter 'layr'; did you mean 'layer'?"),
        ({"layer": 7}, "layer = 7 is out of range: this notebook accepts 0 to 2."),
        ({"lam": "1e-3"}, "in YAML, write 1.0e-3."),
    ],
)
def test_papermill_refuses(tmp_path, write_notebook, parameters, expected):
    source = write_notebook(tmp_path / "in.ipynb", CELLS, {1: "parameters"})
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        papermill.execute_notebook(
            source, tmp_path / "out.ipynb", parameters, kernel_name="python3", progress_bar=False
        )
    assert caught.value.ename == "ParameterError"
    assert expected in caught.value.evalue
    assert "globals()" not in "".join(caught.value.traceback)


def test_papermill_passes_good_values(tmp_path, write_notebook):
    source = write_notebook(tmp_path / "in.ipynb", CELLS, {1: "parameters"})
    executed = papermill.execute_notebook(
        source, tmp_path / "out.ipynb", {"layer": 1}, kernel_name="python3", progress_bar=False
    )
    (output,) = merge_streams(executed.cells[-1].outputs)  # prints may arrive in pieces
    assert output.text == "does not hold here: layer is two\nheadline: layer = 1\n"
