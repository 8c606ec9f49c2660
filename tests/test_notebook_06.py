"""Notebook 06 with another MLP, a file of templates and SmolLM2; the second set of parameters is in test_papermill."""

from __future__ import annotations

import papermill
import pytest

from tclib.cli.prepare import has_smollm2
from tests.conftest import REPO

QUICK = {"nouns": ["war", "truce"], "centuries": [13, 16], "top": 2, "draws": 2}


def run(tmp_path, **parameters):
    notebook = REPO / "notebooks" / "06_greater_than.ipynb"
    return papermill.execute_notebook(
        notebook,
        tmp_path / "out.ipynb",
        {**QUICK, **parameters},
        kernel_name="python3",
        progress_bar=False,
        cwd=tmp_path,
    )


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1])
def test_another_mlp(tmp_path, layer):
    run(tmp_path, layer=layer)


@pytest.mark.slow
def test_a_prompt_file(tmp_path):
    (tmp_path / "templates.txt").write_text("# mine\nThe NOUN began in XXYY and ended in XX\n", encoding="utf-8")
    run(tmp_path, prompt_file="templates.txt")


@pytest.mark.slow
@pytest.mark.skipif(not has_smollm2(), reason="`python -m tclib smollm2` has not been run")
def test_digit_by_digit(tmp_path):
    done = run(tmp_path, model="smollm2", transcoders="smollm2", centuries=[16, 17])
    said = "".join(output.get("text", "") for cell in done.cells if cell.cell_type == "code" for output in cell.outputs)
    assert "9 prompts with 10 possible answers" in said
    assert "this table needs years of two digits" in said
    assert "holds here: the probability difference is above 0.8" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "parameters, sentence",
    [
        ({"layer": 7}, "layer 7 is outside the model, which has layers 0 to 2"),
        ({"prompt_file": "absent.txt"}, "there is no prompt file absent.txt"),
        ({"nouns": []}, "at least 1 items"),
        ({"centuries": [170]}, "10 to 20"),
    ],
)
def test_bad_parameters_get_one_sentence(tmp_path, parameters, sentence):
    with pytest.raises(papermill.PapermillExecutionError, match=sentence):
        run(tmp_path, **parameters)
