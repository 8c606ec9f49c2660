"""Features against neurons with other transcoders than the bundled ones: `python -m making.smollm2_controls FOLDER ...`

Each FOLDER holds transcoders of SmolLM2's MLPs 23 and 24, or of one of them. For each of them the KL that is left with
4 and 16 units, and with all, on the prompts of notebook 09; written to data/smollm2/controls.json, which that notebook
shows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tclib as tc
from tclib.evaluation import stats
from tclib.io.paths import data_path
from tclib.tasks import digits, units
from tclib.tasks.last_token import LastToken

NOUNS, CENTURIES, YEARS = ["war", "siege", "reign", "voyage"], [14, 16, 17, 18], range(30, 39)
LAYERS = (23, 24)
KS = {"4 units": 4, "16 units": 16, "all units": 10**6}


def main(folders: list[str]) -> None:
    model = tc.load_model("smollm2")
    prompts = digits.prompts(model.tokenizer, NOUNS, CENTURIES, YEARS)
    last = LastToken(model, prompts)
    sets = {Path(folder).name: tc.load_transcoders(folder) for folder in folders}
    rows = []
    for layer in LAYERS:
        neurons = units.Units.of(last, layer)
        rows.append({"MLP": layer, "units": "neurons", **measured(last, neurons)})
        for name, transcoders in sets.items():
            if layer not in transcoders:
                continue
            features = units.Units.of(last, layer, transcoders[layer])
            config = transcoders[layer].config
            row = {"MLP": layer, "units": name, "features": config.d_features, "skip": config.skip}
            rows.append(row | measured(last, features))
    data_path("smollm2").joinpath("controls.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def measured(last: LastToken, group: units.Units) -> dict:
    """Mean KL and its interval for each number of units, in the written order; and what all units miss."""
    found = {"missed": round(group.unexplained(), 4)}
    kl = units.kl_kept(last, group, units.ranked(group.written()), list(KS.values()))
    for name, values in zip(KS, kl, strict=True):
        row = stats.interval(stats.cell_means(values, last.prompts.frame))
        found[name] = [round(float(row[part]), 4) for part in ("mean", "low", "high")]
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
