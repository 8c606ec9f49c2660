"""One feature out of an index, each question answered well under a millisecond.

Rows and positions count within the index; tokens are token ids, which `tclib.model.token_strings` makes readable.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float16, Float32, Int, Int32

from tclib.features.common_tokens import commonest
from tclib.features.index import Index
from tclib.inputs import whole


@dataclass(frozen=True)
class Context:
    """A stretch of text around one activation."""

    tokens: Int32[np.ndarray, " pos"]
    activations: Float32[np.ndarray, " pos"]  # of the feature, at every token of the stretch
    centre: int  # where in the stretch the example stands


class FeatureActivations:
    """Where one feature fired in the text of an index, and how strongly. Its entries are fetched once.

    Of a feature that never fired, ``count`` is 0 and everything else raises `NeverFired`.

    Raises:
        ValueError: no such layer or feature.
    """

    def __init__(self, index: Index, layer: int, feature: int):
        self.index, self.layer, self.feature = index, layer, index.feature(layer, feature)

    @property
    def count(self) -> int:
        """On how many tokens it fired."""
        offsets = self.index.layer_offsets(self.layer)
        return int(offsets[self.feature + 1] - offsets[self.feature])

    @property
    def positions(self) -> Int32[np.ndarray, " entry"]:
        """Where it fired, in reading order, from the first position of the index."""
        return self._entries[0]

    @property
    def values(self) -> Float16[np.ndarray, " entry"]:
        """How strongly it fired there."""
        return self._entries[1]

    def histogram(self, bins: int = 30) -> pd.DataFrame:
        """The feature's activations in equal intervals from 0 to its largest: ``low``, ``high``, ``count``."""
        below = _counts_below(self.values)
        largest = _ACTIVATIONS[np.searchsorted(below, below[-1]) - 1]
        edges = np.linspace(0, largest, bins + 1)
        counts = below[np.searchsorted(_ACTIVATIONS, edges)]
        counts[-1] = below[-1]  # the last interval holds its upper end
        return pd.DataFrame({"low": edges[:-1], "high": edges[1:], "count": np.diff(counts)})

    def top(self, k: int = 20) -> pd.DataFrame:
        """The k strongest activations: ``row``, ``position``, ``token``, ``activation``. Ties in reading order."""
        positions, values = self._entries
        k, codes, below = min(k, len(values)), values.view(np.int16), _counts_below(values)
        least = int(_codes_of_ranks(below, len(values) - k))
        sure = np.flatnonzero(codes > least)
        chosen = np.concatenate([sure, np.flatnonzero(codes == least)[: k - len(sure)]])
        chosen = chosen[np.argsort(-codes[chosen].astype(np.int32), kind="stable")]
        return _table(self.index, positions[chosen], values[chosen])

    def bands(self, n: int = 5, each: int = 3, seed: int = 0) -> pd.DataFrame:
        """Examples from all over the feature's range: its activations, in order of strength, are cut into n bands of
        equal number, and ``each`` are drawn from every band.

        Returns:
            ``band`` (1 is the strongest), ``low`` and ``high`` (weakest and strongest activation of the band), ``row``,
            ``position``, ``token``, ``activation``; strongest first.
        """
        positions, values = self._entries
        codes, below = values.view(np.int16), _counts_below(values)
        n = min(n, len(values))
        edges = np.linspace(len(values), 0, n + 1).astype(int)
        draw = np.random.default_rng([seed, self.layer, self.feature])
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
        return _table(self.index, positions[chosen], values[chosen], band=band, low=low, high=high)

    def top_tokens(self, k: int = 10) -> pd.DataFrame:
        """The tokens on which the feature fires most often.

        Returns:
            ``token``, ``count``, ``share`` (of the feature's activations), ``of_token`` (how much of the token's
            occurrences the feature fires on), ``mean`` (activation there).
        """
        positions, values = self._entries
        found = self.index.often(self.layer, self.feature)
        if len(found) < k and found["count"].sum() < len(positions):
            found = commonest(self.index.flat_tokens.take(positions), values, k)
        token, counts = found["token"][:k], found["count"][:k]
        return pd.DataFrame(
            {
                "token": token,
                "count": counts,
                "share": counts / len(positions),
                "of_token": counts / self.index.token_counts[token],
                "mean": found["mean"][:k],
            }
        )

    def context(self, row: int, position: int, before: int = 12, after: int = 5) -> Context:
        """The tokens around a position of a row, with the feature's activation at each.

        Raises:
            ValueError: no such row or position.
        """
        row = whole("row", row, len(self.index.tokens), "the index")
        position = whole("position", position, self.index.width, "the rows of the index")
        start, stop = max(0, position - before), min(self.index.width, position + after + 1)
        positions, values = self._entries
        low, high = np.searchsorted(positions, [row * self.index.width + start, row * self.index.width + stop])
        activations = np.zeros(stop - start, np.float32)
        activations[positions[low:high] - row * self.index.width - start] = values[low:high]
        return Context(self.index.tokens[row, start:stop], activations, position - start)

    @cached_property
    def _entries(self) -> tuple[Int32[np.ndarray, " entry"], Float16[np.ndarray, " entry"]]:
        return self.index.entries(self.layer, self.feature)


# Every activation that float16 can hold, ascending; their bits, read as integers, count them from 0.
_ACTIVATIONS = np.arange(0x7C00, dtype=np.int16).view(np.float16).astype(np.float32)


def _counts_below(values: Float16[np.ndarray, " entry"]) -> Int[np.ndarray, " code+1"]:
    """How many activations are smaller than each that float16 can hold: a sorted list in all but name."""
    below = np.zeros(len(_ACTIVATIONS) + 1, int)
    # Counted by torch, which does not widen a whole array of small integers first, as NumPy does; of a copy, which may
    # be written to, as torch insists.
    codes = torch.from_numpy(values.view(np.int16).copy())
    np.cumsum(codes.bincount(minlength=len(_ACTIVATIONS)).numpy(), out=below[1:])
    return below


def _codes_of_ranks(below: np.ndarray, rank: np.ndarray | int) -> np.ndarray:
    """The bits of the activation with this many smaller or equal ones before it."""
    return np.searchsorted(below, rank, side="right") - 1


def _table(index: Index, positions: np.ndarray, values: np.ndarray, **columns) -> pd.DataFrame:
    row, position = np.divmod(positions, index.width)
    columns |= {"row": row, "position": position, "token": index.flat_tokens[positions]}
    return pd.DataFrame(columns | {"activation": values.astype(np.float32)})
