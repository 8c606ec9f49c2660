"""Every notebook also runs with parameters other than its defaults."""

from __future__ import annotations

import json
from typing import Any

import papermill
import pytest

from tclib.cli.prepare import has_smollm2, own_model
from tclib.cli.run import declared_defaults
from tests.conftest import COMMITTED

# notebook -> parameters that change what it shows and keep it quick
SECOND_SET: dict[str, dict[str, Any]] = {
    "00_start_here": {
        "prompt": "The siege lasted from the year 1545 to the year 15",
        "start": 45,
        "other": 60,
        "rows": 24,
    },
    "02_evaluate_transcoders": {"layer": 0, "rows": 8, "seed": 1},
    "02b_transcoder_sae_neurons": {"layer": 0, "rows": 8, "steps": 15, "draws": 3, "seed": 1},
    "03_read_features": {"layer": 1, "rows": 48, "seed": 1},
    "04_circuits_from_weights": {
        "prompt": "The truce was proclaimed in 1345 and abandoned in 13",
        "later": "80",
        "earlier": "30",
        "rows": 32,
        "draws": 2,
        "seed": 1,
    },
    "04b_search_and_test_circuits": {
        "prompt": "The truce was proclaimed in 1345 and abandoned in 13",
        "later": "80",
        "earlier": "30",
        "rows": 32,
        "others": 2,
        "removals": 200,
        "seed": 1,
    },
    "01_train_transcoders": {
        "layers": [0],
        "text": "sampled",
        "rows": 256,
        "d_features": 256,
        "l1": 0.1,
        "front": [0.01],
        "steps": 20,
        "seed": 1,
    },
    "01b_training_in_depth": {
        "layer": 0,
        "text": "sampled",
        "rows": 256,
        "d_features": 256,
        "l1": 0.1,
        "front": [0.01],
        "steps": 20,
        "k": 8,
        "seed": 1,
    },
    "05_blind_case_studies": {"rows": 64, "number": 3, "guess": "tokens: .|,", "seed": 1},
    "08_your_prompt_your_model": {
        "prompt": "The truce was proclaimed in 1345 and abandoned in 13",
        "later": "80",
        "earlier": "30",
        "rows": 16,
        "seed": 1,
    },
    "10_other_routes_to_the_circuit": {"nouns": ["truce"], "century": 15, "every": 24, "steps": 2, "seed": 1},
    "12_one_dictionary_for_all_layers": {"rows": 8, "train_steps": 12, "draws": 3, "seed": 1},
    "11_other_dictionaries": {"layer": 1, "units": 128, "k": 8, "steps": 8, "rows": 32, "draws": 3, "seed": 1},
    "11b_if_one_knew_what_to_look_for": {
        "layer": 1,
        "units": 128,
        "k": 8,
        "steps": 8,
        "rows": 32,
        "draws": 3,
        "seed": 1,
    },
    "13_after_the_paper": {"prompts": 4, "rows": 16, "draws": 3, "seed": 1},
    "09_a_real_model": {"nouns": ["truce", "lease"], "centuries": [15, 17], "tens": [4], "draws": 2, "seed": 1},
    "06_greater_than": {
        "nouns": ["truce", "lease"],
        "centuries": [13, 15, 18],
        "century": 13,
        "top": 2,
        "draws": 2,
        "seed": 1,
    },
    "06b_how_ablation_misleads": {"nouns": ["truce", "lease"], "centuries": [13, 15], "layer": 1, "seed": 1},
}


LONG = ("12_one_dictionary_for_all_layers",)  # over two minutes: in `make test-all`
PATHS = [
    pytest.param(path, marks=pytest.mark.slow) if own_model(path) or path.stem in LONG else path for path in COMMITTED
]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_runs_with_other_parameters(path, tmp_path):
    if own_model(path) and not has_smollm2():
        pytest.skip(f"it needs {own_model(path)}: run `python -m tclib smollm2`")
    assert path.stem in SECOND_SET, f"add a second set of parameters for {path.stem} to {__name__}"
    parameters = SECOND_SET[path.stem]
    # Refused by the notebook as well, but only after its imports.
    assert parameters.keys() <= declared_defaults(json.loads(path.read_text(encoding="utf-8"))).keys()
    papermill.execute_notebook(
        path,
        tmp_path / path.name,
        parameters,
        kernel_name="python3",
        progress_bar=False,
        cwd=tmp_path,
    )


def test_no_set_without_a_notebook():
    assert SECOND_SET.keys() <= {path.stem for path in COMMITTED}
