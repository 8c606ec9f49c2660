"""The commonest tokens of features that fire often, counted once, since counting them at every look takes too long."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float16, Float64, Int, Int32, Shaped
from torch import Tensor

OFTEN = 2**14  # activations; fewer are counted in half a millisecond
KEPT = 100  # tokens of a feature
COUNTED_AT_ONCE = 1_000_000  # activations
ROW = np.dtype([("feature", "<i8"), ("token", "<i8"), ("count", "<i8"), ("mean", "<f8")])


def commonest(
    tokens: Int32[np.ndarray, " entry"], values: Float16[np.ndarray, " entry"], k: int
) -> Shaped[np.ndarray, " token"]:
    """The k commonest tokens, in order, with how often each is there and the mean value; rows of dtype `ROW`."""
    return _ranked(*_counted(tokens, values), k)


def _counted(
    tokens: Int32[np.ndarray, " entry"], values: Float16[np.ndarray, " entry"], vocabulary: int = 0
) -> tuple[Int[Tensor, " token"], Float64[Tensor, " token"]]:
    """How often each token is there, and the sum of its values, in which float64 loses nothing."""
    found = torch.from_numpy(tokens)
    # By way of float32: torch widens float16 to it eight at a time, but not to float64.
    weights = torch.tensor(values).float().double()
    return found.bincount(minlength=vocabulary), found.bincount(weights, minlength=vocabulary)


def _ranked(counts: Int[Tensor, " token"], totals: Float64[Tensor, " token"], k: int) -> np.ndarray:
    least = counts.topk(min(k, len(counts))).values[-1].clamp(min=1)
    present, often = (counts >= least).nonzero().squeeze(1).numpy(), counts.numpy()
    chosen = present[np.argsort(-often[present], kind="stable")[:k]]
    rows = np.zeros(len(chosen), ROW)
    rows["token"], rows["count"], rows["mean"] = chosen, often[chosen], totals.numpy()[chosen] / often[chosen]
    return rows


def write_often(folder: Path, layer: str, first: int) -> None:
    """Add the table of a layer to an index whose other files are there; ``first`` is the position it begins at."""
    offsets, tokens = np.load(folder / f"layer_{layer}.offsets.npy"), np.load(folder / "tokens.npy").ravel()
    tables, vocabulary = [np.zeros(0, ROW)], int(tokens.max()) + 1
    for feature in np.flatnonzero(np.diff(offsets) >= OFTEN):
        begin, end = offsets[feature : feature + 2]
        parts = []
        for start in range(begin, end, COUNTED_AT_ONCE):
            positions, values = (
                _entries(folder / f"layer_{layer}.{name}.npy", start, min(start + COUNTED_AT_ONCE, end))
                for name in ("positions", "values")
            )
            parts.append(_counted(tokens[positions - first], values, vocabulary))
        counts, totals = zip(*parts, strict=True)
        tables.append(_ranked(torch.stack(counts).sum(0), torch.stack(totals).sum(0), KEPT))
        tables[-1]["feature"] = feature
    np.save(folder / f"layer_{layer}.often.npy", np.concatenate(tables))


def _entries(path: Path, start: int, stop: int) -> np.ndarray:
    """Read entries into memory, because a folder with a mapped file cannot be removed on Windows."""
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        _, _, dtype = np.lib.format.read_array_header_1_0(file)
        file.seek(start * dtype.itemsize, 1)
        return np.fromfile(file, dtype, stop - start)
