"""One feature out of an index: pure functions of (index, layer, feature), each well under a millisecond.

Rows and positions count within the index; tokens are token ids, which `tclib.model.token_strings` makes readable. A
feature that never fired raises `NeverFired`, of which `count` alone is free.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float16, Float32, Int, Int32
from torch import Tensor

from tclib.features.common_tokens import commonest
from tclib.features.index import Index
from tclib.inputs import whole


def count(index: Index, layer: int, feature: int) -> int:
    """On how many tokens the feature fired."""
    offsets, feature = index.layer_offsets(layer), index.feature(layer, feature)
    return int(offsets[feature + 1] - offsets[feature])


def histogram(index: Index, layer: int, feature: int, bins: int = 30) -> pd.DataFrame:
    """The feature's activations in equal intervals from 0 to its largest: ``low``, ``high``, ``count``."""
    below = _counts_below(index.entries(layer, feature)[1])
    largest = _ACTIVATIONS[np.searchsorted(below, below[-1]) - 1]
    edges = np.linspace(0, largest, bins + 1)
    counts = below[np.searchsorted(_ACTIVATIONS, edges)]
    counts[-1] = below[-1]  # the last interval holds its upper end
    return pd.DataFrame({"low": edges[:-1], "high": edges[1:], "count": np.diff(counts)})


def top(index: Index, layer: int, feature: int, k: int = 20) -> pd.DataFrame:
    """The k strongest activations: ``row``, ``position``, ``token``, ``activation``. Ties in reading order."""
    positions, values = index.entries(layer, feature)
    k, codes, below = min(k, len(values)), values.view(np.int16), _counts_below(values)
    least = int(_codes_of_ranks(below, len(values) - k))
    sure = np.flatnonzero(codes > least)
    chosen = np.concatenate([sure, np.flatnonzero(codes == least)[: k - len(sure)]])
    chosen = chosen[np.argsort(-codes[chosen].astype(np.int32), kind="stable")]
    return _table(index, positions[chosen], values[chosen])


def bands(index: Index, layer: int, feature: int, n: int = 5, each: int = 3, seed: int = 0) -> pd.DataFrame:
    """Examples from all over the feature's range: its activations, in order of strength, are cut into n bands of equal
    number, and ``each`` are drawn from every band.

    Returns:
        ``band`` (1 is the strongest), ``low`` and ``high`` (weakest and strongest activation of the band), ``row``,
        ``position``, ``token``, ``activation``; strongest first.
    """
    positions, values = index.entries(layer, feature)
    codes, below = values.view(np.int16), _counts_below(values)
    n = min(n, len(values))
    edges = np.linspace(len(values), 0, n + 1).astype(int)
    draw = np.random.default_rng([seed, layer, feature])
    ranks, band = [], []
    for number, (stop, start) in enumerate(pairwise(edges), 1):
        drawn = start + draw.choice(stop - start, min(each, stop - start), replace=False)
        ranks += sorted(drawn.tolist(), reverse=True)
        band += [number] * len(drawn)
    ranks, band = np.array(ranks), np.array(band)
    wanted, low, high = (_codes_of_ranks(below, which) for which in (ranks, edges[band], edges[band - 1] - 1))
    among = np.zeros(len(_ACTIVATIONS), bool)
    among[wanted] = True
    possible = np.flatnonzero(among.take(codes))
    possible = possible[np.argsort(codes[possible], kind="stable")]  # by strength, then in reading order
    first = np.searchsorted(codes[possible], wanted)
    chosen = possible[first + ranks - below[wanted]]
    low, high = _ACTIVATIONS[low], _ACTIVATIONS[high]
    return _table(index, positions[chosen], values[chosen], band=band, low=low, high=high)


def top_tokens(index: Index, layer: int, feature: int, k: int = 10) -> pd.DataFrame:
    """The tokens on which the feature fires most often.

    Returns:
        ``token``, ``count``, ``share`` (of the feature's activations), ``of_token`` (how much of the token's
        occurrences the feature fires on), ``mean`` (activation there).
    """
    positions, values = index.entries(layer, feature)
    found = index.often(layer, feature)
    if len(found) < k and found["count"].sum() < len(positions):
        found = commonest(index.flat_tokens.take(positions), values, k)
    token, counts = found["token"][:k], found["count"][:k]
    return pd.DataFrame(
        {
            "token": token,
            "count": counts,
            "share": counts / len(positions),
            "of_token": counts / index.token_counts[token],
            "mean": found["mean"][:k],
        }
    )


@dataclass(frozen=True)
class Context:
    """A stretch of text around one activation."""

    tokens: Int32[np.ndarray, " pos"]
    activations: Float32[np.ndarray, " pos"]  # of the feature, at every token of the stretch
    centre: int  # where in the stretch the example stands


def context(
    index: Index, layer: int, feature: int, row: int, position: int, before: int = 12, after: int = 5
) -> Context:
    """The tokens around a position of a row, with the feature's activation at each.

    Raises:
        ValueError: no such row or position.
    """
    row = whole("row", row, len(index.tokens), "the index")
    position = whole("position", position, index.width, "the rows of the index")
    start, stop = max(0, position - before), min(index.width, position + after + 1)
    positions, values = index.entries(layer, feature)
    low, high = np.searchsorted(positions, [row * index.width + start, row * index.width + stop])
    activations = np.zeros(stop - start, np.float32)
    activations[positions[low:high] - row * index.width - start] = values[low:high]
    return Context(index.tokens[row, start:stop], activations, position - start)


# Every activation that float16 can hold, ascending; their bits, read as integers, count them from 0.
_ACTIVATIONS = np.arange(0x7C00, dtype=np.int16).view(np.float16).astype(np.float32)


def _counts_below(values: Float16[np.ndarray, " entry"]) -> Int[np.ndarray, " code+1"]:
    """How many activations are smaller than each that float16 can hold: a sorted list in all but name."""
    below = np.zeros(len(_ACTIVATIONS) + 1, int)
    # Counted by torch, which does not widen a whole array of small integers first, as NumPy does.
    np.cumsum(_tensor(values.view(np.int16)).bincount(minlength=len(_ACTIVATIONS)).numpy(), out=below[1:])
    return below


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy())  # a copy may be written to, which torch insists on


def _codes_of_ranks(below: np.ndarray, rank: np.ndarray | int) -> np.ndarray:
    """The bits of the activation with this many smaller or equal ones before it."""
    return np.searchsorted(below, rank, side="right") - 1


def _table(index: Index, positions: np.ndarray, values: np.ndarray, **columns) -> pd.DataFrame:
    row, position = np.divmod(positions, index.width)
    columns |= {"row": row, "position": position, "token": index.flat_tokens[positions]}
    return pd.DataFrame(columns | {"activation": values.astype(np.float32)})
