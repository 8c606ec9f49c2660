"""Screening in int8: twice as fast as in bfloat16 (`screening`), with a wider bound.

A row of x or of the weights becomes integers of at most 127, times a scale. With x' and w' for what these stand for,

    |x w - x' w'| <= |x| |w - w'| + |x - x'| |w'|

by measured lengths; integers are added exactly. Divided by the two scales, these terms and the bias are products of a
number of the token and one of the feature. `_coordinates` rounds each in the safe direction to a few more coordinates,
so that a pair is a candidate if one product of integers is not negative. (Lengths must not underflow: rows of scaled
activations are far above 1e-18.)

For TopK, all features share one scale, so that sums are comparable, and each token's level is guessed: its k-th largest
sum less the bound, but at least 1, which a positive pair reaches. Every pair above the level is a candidate; whether k
of them are above it, full precision will say.

Rows with a few large entries are rounded coarsely. Where the bound would be looser than `LOOSE`, or would need more
than `MOST` coordinates, there is no answer, and bfloat16 screens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int8
from torch import Tensor

from tclib.training.fast.screening import grouped, kth

LOOSE = 0.7  # standard deviations of a product of independent entries; 0.41 for normal ones
MOST = 64
SMALLEST = 0.03  # of the largest row: smaller rows share its scale, or they would need many coordinates
LARGEST = 126  # of a coordinate before the last rounding
ROOM = 512 * 24_576  # products at once: 50 MB
BLOCK = 256  # rows that are rounded and measured at once, in the cache
PADDING = 32  # widths are multiples of this
GUESS = 1.1  # how much of the bound is taken off a token's k-th largest sum: more, and few tokens are looked at twice
SAFE = 1e-5  # more than float32 loses in a few operations; what norms of long rows lose, `sums` covers
SMALL = 1e-36  # a unit below it would lose its digits


def int8_hardware() -> bool:
    """Whether this processor adds products of int8 exactly and fast (VNNI, AMX) and torch can tell and use it."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    usable = hasattr(torch, "_int_mm") and torch.backends.mkldnn.is_available()
    return usable and any(known.get(name, False) for name in ("avx512_vnni", "amx_int8"))


class IntegerScreen:
    """The int8 product, and the memory that it uses again in each step."""

    def __init__(self):
        self.room, self.above = torch.empty(ROOM, dtype=torch.int32), np.empty(ROOM, dtype=bool)

    def __call__(
        self,
        x: Float[Tensor, "token d_in"],
        weights: Float[Tensor, "d_features d_in"],
        bias: Float[Tensor, " d_features"],
        floor: Float[Tensor, " d_features"],
        k: int | None = None,
    ) -> tuple[Int[Tensor, " candidate"], Float[Tensor, " token"]] | None:
        """Every pair above its feature's floor (ascending), or with k and floors of 0 every positive pair above its
        token's level (not in order), and some a little below, as ``feature * tokens + token``; and the levels, 0 where
        all positive pairs are named. None: too loose a bound."""
        if not len(x):
            return torch.empty(0, dtype=torch.int64), x.new_empty(0)
        t, w = rounded(x), self.load(weights, common=k is not None)
        operands = _operands(t, w, bias, floor)
        if operands is None:
            return None
        tokens, features = operands
        if k is None:
            return torch.from_numpy(self._above_zero(tokens, features)), x.new_zeros(len(x))
        units = t.scale * w.scale[0]
        bound = (t.length * w.lost.max() + t.lost * w.kept.max()) / units
        keys, level = self._largest(tokens, features, bound, k)
        return torch.from_numpy(keys), torch.where(level > 1, level * units * (1 + SAFE), 0)

    def load(self, weights: Float[Tensor, "d_features d_in"], common: bool) -> Rounded:
        """Take over the weights."""
        return rounded(weights, common)

    def _above_zero(self, tokens: Tensor, features: Tensor) -> Int[np.ndarray, " candidate"]:
        """In blocks of features, so that the candidates come in order."""
        n, found = len(tokens), []
        step = max(1, ROOM // n)
        for first in range(0, len(features), step):
            part = features[first : first + step]
            upper, above = self._rooms(len(part), n)
            torch._int_mm(part, tokens.T, out=upper)
            np.greater_equal(upper.numpy(), 0, out=above)
            found.append(np.flatnonzero(above) + first * n)
        return np.concatenate(found)

    def _largest(
        self, tokens: Tensor, features: Tensor, bound: Float[Tensor, " token"], k: int
    ) -> tuple[Int[np.ndarray, " candidate"], Float[Tensor, " token"]]:
        """In blocks of tokens, since levels are theirs."""
        n, found, levels = len(tokens), [], []
        step = max(1, ROOM // len(features))
        for first in range(0, n, step):
            part = tokens[first : first + step]
            upper, above = self._rooms(len(features), len(part))
            torch._int_mm(features, part.T, out=upper)
            level = (kth(grouped(upper, k), k) - GUESS * bound[first : first + step]).floor().clamp(min=1)
            np.greater_equal(upper.numpy(), level.to(torch.int32).numpy(), out=above)
            feature, token = np.divmod(np.flatnonzero(above), len(part))
            found.append(feature * n + (token + first))
            levels.append(level)
        return np.concatenate(found), torch.cat(levels)

    def _rooms(self, rows: int, columns: int) -> tuple[Tensor, np.ndarray]:
        if rows * columns > len(self.above):
            self.room, self.above = torch.empty(rows * columns, dtype=torch.int32), np.empty(rows * columns, dtype=bool)
        rooms = self.room[: rows * columns], self.above[: rows * columns]
        return rooms[0].view(rows, columns), rooms[1].reshape(rows, columns)


def _operands(t: Rounded, w: Rounded, bias: Tensor, floor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Integers of tokens and features whose products are not negative wherever a pair is above its floor."""
    d = t.whole.shape[1]
    if not d**0.5 * (t.loss() + w.loss()) < LOOSE:
        return None
    sums = 4 * d * 2.0**-24  # float32 sums, in any order
    above = (bias - floor + sums * (bias.abs() + floor.abs()) + 1e-30) / w.scale
    terms = [
        _coordinates(t.length / t.scale, (w.lost + sums * w.length) / w.scale),
        _coordinates(t.lost / t.scale, w.kept / w.scale),
        _coordinates(1 / t.scale, above.clamp(min=0)),
        _coordinates(1 / t.scale, (-above).clamp(min=0), up=False),
    ]
    if any(term is None for term in terms):
        return None
    tokens = torch.cat([t.whole, *(term[0] for term in terms)], 1)
    features = torch.cat([w.whole, *(term[1] for term in terms)], 1)
    if tokens.shape[1] > d + MOST:
        return None
    rest = -tokens.shape[1] % PADDING
    return F.pad(tokens, (0, rest)), F.pad(features, (0, rest))


class Rounded(NamedTuple):
    """Rows in whole numbers, and what that loses."""

    whole: Int8[Tensor, "row d"]
    scale: Float[Tensor, " row"]
    length: Float[Tensor, " row"]
    kept: Float[Tensor, " row"]  # the length of ``whole * scale``
    lost: Float[Tensor, " row"]  # that of the difference

    def loss(self) -> float:
        return (torch.linalg.vector_norm(self.lost) / torch.linalg.vector_norm(self.length).clamp(min=1e-30)).item()


def rounded(rows: Float[Tensor, "row d"], common: bool = False) -> Rounded:
    """Each row as integers and a scale, or all with one in ``common``."""
    largest = torch.cat([part.abs().amax(1) for part in rows.split(BLOCK)])
    smallest = largest.max().item() * (1 if common else SMALLEST)
    scale = largest.clamp(min=max(smallest, 1e-30)) / 127
    whole, lengths = torch.empty(rows.shape, dtype=torch.int8), []
    for part, room, s in zip(rows.split(BLOCK), whole.split(BLOCK), scale.split(BLOCK), strict=True):
        kept = (part / s[:, None]).round_()
        room.copy_(kept)
        kept *= s[:, None]
        norms = [torch.linalg.vector_norm(values, dim=1) for values in (part, kept, kept - part)]
        lengths.append(torch.stack(norms) * (1 + SAFE))
    length, kept, lost = torch.cat(lengths, 1)
    return Rounded(whole, scale, length, kept, lost + SAFE * length)


def _coordinates(
    u: Float[Tensor, " token"], v: Float[Tensor, " feature"], up: bool = True
) -> tuple[Int8[Tensor, "token c"], Int8[Tensor, "feature c"]] | None:
    """Integers whose products add up to at least ``u v``, or with ``up=False`` to at least ``-u v``; u, v >= 0.

    v becomes a digit and its 126ths; the first is spread over as many coordinates as u needs. None: over `MOST`.
    """
    unit = v.max().item() / LARGEST
    total = u * unit * (1 + SAFE if up else 1 - SAFE)
    copies = total.max().item() / LARGEST
    if unit == 0:
        return u.new_zeros(len(u), 0, dtype=torch.int8), v.new_zeros(len(v), 0, dtype=torch.int8)
    if unit < SMALL or not copies <= MOST:
        return None
    copies, rounded = int(copies) + 1, torch.ceil if up else torch.floor
    digit = (v / unit).floor()
    rest = rounded(LARGEST * (v / unit - digit)).clamp(max=LARGEST)
    tokens = [rounded(total / LARGEST)[:, None], rounded(total / copies)[:, None].expand(-1, copies)]
    features = [rest[:, None], digit[:, None].expand(-1, copies)]
    sign = 1 if up else -1
    return torch.cat(tokens, 1).to(torch.int8), (sign * torch.cat(features, 1)).to(torch.int8)
