"""What a model needs before notebooks are run on it: transcoders, files and memory."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tclib.io.paths import read_text


class Refused(ValueError):
    """The request cannot be run; the message is one sentence for the user."""


def own_model(notebook: Path) -> str | None:
    """The model that a notebook's metadata says it is about; None for the bundled one."""
    return json.loads(read_text(notebook))["metadata"].get("tclib", {}).get("model")


def prepare(parameters: dict[str, Any], notebooks: Sequence[Path]) -> None:
    """For another model than the bundled one: give it its published transcoders, fetch both, print what they need and
    how well they fit. A notebook's metadata may say that its largest tables are small (`work_tokens`), and that it
    trains its transcoders itself (`trains`).

    Raises Refused if they cannot be had, do not belong together or do not fit into memory.
    """
    about = {path: json.loads(read_text(path))["metadata"].get("tclib", {}) for path in notebooks}
    models = [own["model"] for own in about.values() if "model" in own and "model" not in parameters]
    if "smollm2" in models and not has_smollm2():
        raise Refused("SmolLM2 is not on this machine: `python -m tclib smollm2` fetches it once.")
    model = parameters.get("model", "bundled")
    if model == "bundled":
        return
    from tclib.checkpoints import check_fit, load_transcoders, memory_plan  # takes seconds to import
    from tclib.checkpoints.load import BUNDLED, WORK_TOKENS
    from tclib.io import hub
    from tclib.io.paths import data_path
    from tclib.model import load_model
    from tclib.replacement_model import ReplacementModel

    if model in hub.TRANSCODERS or (model in BUNDLED and data_path(BUNDLED[model]).is_dir()):
        parameters.setdefault("transcoders", model)
    where = parameters.get("transcoders", "bundled")
    try:
        work = max(own.get("work_tokens", WORK_TOKENS) for own in about.values())
        print(f"{memory_plan(model, where, work=work).round(1).to_string()}\n", flush=True)
        lm = load_model(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            loaded = load_transcoders(where)
            try:
                ReplacementModel(lm, loaded).need_transcoders()
            except ValueError:
                if "transcoders" in parameters:
                    raise
                if not all(own.get("trains") for own in about.values()):
                    raise Refused(train_first(model, lm.cfg.n_layers)) from None
                return
            fit = check_fit(lm, loaded)
    except ValueError as error:
        raise Refused(str(error)) from error
    print(f"{fit.round(3).T.to_string()}\n")
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)


def train_first(model: str, n_layers: int) -> str:
    """What to run for a model without transcoders: notebook 01 on two of its later layers, as an example."""
    layers = [max(0, n_layers * 4 // 5 - 1), n_layers * 4 // 5] if n_layers > 1 else [0]
    return (
        f"There are no transcoders for {model} yet: train some, python -m tclib run --model {model} --only 01 --name "
        f'trained -p layers "{layers}" -p save transcoders, and run this again with -p transcoders '
        "runs/trained/transcoders."
    )


def has_smollm2() -> bool:
    """Whether SmolLM2 is here already: made from its package, or in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    from tclib.io import gguf_model, hub

    made = gguf_model.made_from(*gguf_model.SMOLLM2).is_dir()
    return made or isinstance(try_to_load_from_cache(hub.MODELS["smollm2"], "model.safetensors"), str)
