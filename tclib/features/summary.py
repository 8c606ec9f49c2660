"""What remains of an index when the text is large and the file must be small: statistics and a few examples of each
feature. One for the bundled transcoders is in ``data/features.npz``, made by ``python -m making.features``.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Int32, UInt16

from tclib.features import search
from tclib.features.feature_activations import FeatureActivations
from tclib.features.index import Index, fingerprint
from tclib.io.paths import data_path, write_whole
from tclib.replacement_model import ReplacementModel, joined

STRONGEST, BANDS, EACH = 5, 5, 2  # examples kept of each feature
PLACE = ["row", "position", "activation"]


@dataclass(frozen=True)
class Summary:
    """``features``: layer, feature, count, frequency, mean, max, token (the commonest it fires on), token_share, label
    (the one its firing predicts best, None without labels or firings), f1. ``examples``: layer, feature, band (0: the
    strongest; 1 to 5: quantile bands, strongest first), row, position, activation. ``tokens``: the text they are from.
    """

    about: dict
    features: pd.DataFrame
    examples: pd.DataFrame
    tokens: UInt16[np.ndarray, "row pos"] | Int32[np.ndarray, "row pos"]  # the latter for large vocabularies


def summarise(index: Index, truth: pd.DataFrame | None = None, seed: int = 0) -> Summary:
    """Statistics and examples of every feature of an index."""
    features, examples = [], []
    for layer in index.layers:
        table = search.statistics(index, layer).assign(layer=layer)
        best = search.best_labels(index, layer, truth) if truth is not None else None
        table["label"] = best["label"].to_numpy() if best is not None else None
        table["f1"] = best["f1"].to_numpy() if best is not None else np.nan
        token, share = np.full(len(table), -1), np.full(len(table), np.nan)
        for feature in np.flatnonzero(table["count"]).tolist():
            fired = FeatureActivations(index, layer, feature)
            first = fired.top_tokens(1)
            token[feature], share[feature] = first["token"][0], first["share"][0]
            strongest, drawn = fired.top(STRONGEST), fired.bands(BANDS, EACH, seed)
            for part, band in ((strongest, np.zeros(len(strongest), int)), (drawn, drawn["band"])):
                examples.append((np.full(len(part), layer), np.full(len(part), feature), band, *map(part.get, PLACE)))
        features.append(table.assign(token=token, token_share=share))
    kept = ["layer", "feature", "band", *PLACE]
    order = ["layer", "feature", "count", "frequency", "mean", "max", "token", "token_share", "label", "f1"]
    about = {**index.about, "tokens": index.n_tokens}
    # Columns, put together once: a table for each feature would take most of the time.
    columns = [np.concatenate(parts) for parts in zip(*examples, strict=True)] or [[]] * len(kept)
    found = pd.DataFrame(dict(zip(kept, columns, strict=True)))
    table = pd.concat(features, ignore_index=True)[order]
    tokens = index.tokens.astype(np.uint16) if index.tokens.max() < 2**16 else index.tokens
    return Summary(about, table, found, tokens)


def save_summary(summary: Summary, path: str | Path) -> None:
    """One compressed .npz; numbers in 16 bits where that is enough."""
    f, e = summary.features, summary.examples
    names = sorted(set(f["label"].dropna()))
    about = {**summary.about, "labels": names}
    number = {name: i for i, name in enumerate(names)}
    every = pd.MultiIndex.from_frame(f[["layer", "feature"]])
    arrays = {
        "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
        "tokens": summary.tokens,
        "count": f["count"].to_numpy(np.int32),
        "token": f["token"].to_numpy(np.int32),
        "label": f["label"].map(number).fillna(-1).to_numpy(np.int16),
        "examples": e.groupby(["layer", "feature"]).size().reindex(every, fill_value=0).to_numpy(np.uint8),
        "band": e["band"].to_numpy(np.uint8),
        "place": (e["row"] * summary.tokens.shape[1] + e["position"]).to_numpy(np.int32),
        "activation": e["activation"].to_numpy(np.float16),
    }
    arrays |= {name: f[name].to_numpy(np.float16) for name in ("mean", "max", "token_share", "f1")}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_whole(Path(path), buffer.getvalue())


def load_summary(replacement: ReplacementModel, path: str | Path | None = None) -> Summary:
    """Read what `save_summary` wrote; by default that of the bundled transcoders.

    Raises:
        ValueError: no or a damaged file, or one of other weights (both fingerprints are named).
    """
    path = data_path("features.npz") if path is None else Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            a = {name: file[name] for name in file.files}
        about = json.loads(a["about"].tobytes())
        made = {"the model": about["model"]} | {f"layer {k}": v["weights"] for k, v in about["layers"].items()}
    except FileNotFoundError:
        raise ValueError(f"no summary at {path}: make it with summarise and save_summary") from None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"the summary {path.name} is damaged: {error}") from error
    present = {"the model": fingerprint(joined(replacement).model)}
    present |= {f"layer {layer}": fingerprint(t) for layer, t in replacement.transcoders.items()}
    for name, found in present.items():
        if made.get(name) != found:
            raise ValueError(f"the summary {path.name} was made from {made.get(name)} as {name}, not from {found}")
    sizes = {int(layer): entry["features"] for layer, entry in about["layers"].items()}
    f = pd.DataFrame({"layer": np.repeat(list(sizes), list(sizes.values()))})
    f["feature"] = np.concatenate([np.arange(n) for n in sizes.values()])
    f["count"], f["frequency"] = a["count"], a["count"] / about["tokens"]
    f["mean"], f["max"] = a["mean"].astype(np.float32), a["max"].astype(np.float32)
    f["token"], f["token_share"] = a["token"], a["token_share"].astype(np.float32)
    names = about["labels"] if "labels" in about else about["latents"]  # the older name
    f["label"] = np.array([*names, None], dtype=object)[a["label"] if "label" in a else a["latent"]]  # the older name
    f["f1"] = a["f1"].astype(np.float32)
    e = f.loc[np.repeat(np.arange(len(f)), a["examples"]), ["layer", "feature"]].reset_index(drop=True)
    e["band"] = a["band"]
    e["row"], e["position"] = np.divmod(a["place"], a["tokens"].shape[1])
    return Summary(about, f, e.assign(activation=a["activation"].astype(np.float32)), a["tokens"])
