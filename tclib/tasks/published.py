"""The truth ledger: published numbers beside ours, filled by code.

`data/published.json` holds every number that was published about these experiments, its source, what it really
measured, and in what ours differ.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from tclib.io.paths import data_path

NOT_RUN = "not run"
Value = float | str | None


@cache
def entries() -> dict[str, dict[str, Any]]:
    """All entries by name, each with ``source``, ``measured``, ``differs`` and ``values``."""
    return json.loads(data_path("published.json").read_text(encoding="utf-8"))


def values(entry: str) -> dict[str, Value]:
    """The numbers of an entry by name; those of a curve are called ``sae_out at 31.5`` or ``mlp8[89] at k = 10``.

    Raises:
        ValueError: there is no such entry.
    """
    if entry not in entries():
        raise ValueError(f"published.json has no entry {entry!r}{_did_you_mean(entry, entries())}")
    flat, raw = {}, entries()[entry]["values"]
    for name, value in raw.items():
        if not isinstance(value, list):
            flat[name] = value
        elif isinstance(value[0], list):
            flat |= {f"{name} at {x:g}": y for x, y in value}
        elif name != "k":
            flat |= {f"{name} at k = {k}": y for k, y in zip(raw["k"], value, strict=True)}
    return flat


@cache
def recorded() -> dict[str, Any]:
    """What notebook 09 found on SmolLM2 in its last complete run: ``answer`` in sentences, ``ledger``, ``curves``."""
    return json.loads(data_path("smollm2", "claims.json").read_text(encoding="utf-8"))


def ledger(
    names: Sequence[str],
    here: Mapping[str, Value] | None = None,
    on_gpt2: Mapping[str, Value] | None = None,
    on_smollm2: Mapping[str, Value] | None = None,
) -> pd.DataFrame:
    """Published | ours here | ours on GPT-2 | what differs, one row for every number of the entries ``names``.

    Args:
        here, on_gpt2: ours, by ``"entry/value"``, on this run's model and on GPT2-small; None is shown as "none". What
            is left out was not run.
        on_smollm2: those of SmolLM2, such as ``recorded()["ledger"]``, in a column of their own if they are given.

    Raises:
        ValueError: a key that is no published number of these entries.
    """
    published = {f"{entry}/{name}": value for entry in names for name, value in values(entry).items()}
    ours = {"ours here": here or {}, "ours on GPT-2": on_gpt2 or {}}
    if on_smollm2 is not None:
        ours["ours on SmolLM2"] = on_smollm2
    for key in [key for column in ours.values() for key in column]:
        if key not in published:
            raise ValueError(f"{key!r} is not among the published numbers{_did_you_mean(key, published)}")
    rows = {
        key.replace("_", " ").replace("/", ": "): {
            "published": _shown(value),
            **{title: _shown(column[key]) if key in column else NOT_RUN for title, column in ours.items()},
            "what differs": entries()[key.split("/")[0]]["differs"],
        }
        for key, value in published.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def column(model: TransformerBridge) -> str:
    """Where a model's numbers belong in `ledger`: "on_gpt2" for GPT2-small, else "here"."""
    shape = (model.cfg.n_layers, model.cfg.d_model, model.cfg.d_vocab)
    return "on_gpt2" if shape == (12, 768, 50257) else "here"


def _shown(value: Value) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else f"{value:.4g}"


def _did_you_mean(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f": choose one of {', '.join(known)}"
