"""Screening in int8: twice as fast as in bfloat16 (`screening`), with a wider bound, for floors that are known.

A row of x or of the weights becomes integers of at most 127, times a scale. With x' and w' for what these stand for,

    |x w - x' w'| <= |x| |w - w'| + |x - x'| |w'|

by measured lengths; integers are added exactly. Divided by the two scales, these terms and the bias are products of a
number of the token and one of the feature. `_coordinates` rounds each in the safe direction to a few more coordinates,
so that a pair is a candidate if one product of integers is not negative.

Rows with a few large entries are rounded coarsely. Where the bound would be looser than `LOOSE`, or would need more
than `MOST` coordinates, there is no answer, and bfloat16 screens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

LOOSE = 0.7  # standard deviations of a product of independent entries; 0.41 for normal ones
MOST = 64
SMALLEST = 0.03  # of the largest row: smaller rows share its scale, or they would need many coordinates
LARGEST = 126  # of a coordinate before the last rounding
ROOM = 2**23  # products at once: 34 MB
BLOCK = 256  # rows that are rounded and measured at once, in the cache
PADDING = 32  # widths are multiples of this
SAFE = 1e-5  # more than float32 loses in a few operations


def int8_hardware() -> bool:
    """Whether this processor adds products of int8 exactly and fast (VNNI, AMX) and torch can tell."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return hasattr(torch, "_int_mm") and any(known.get(name, False) for name in ("avx512_vnni", "amx_int8"))


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
    ) -> Int[Tensor, " candidate"] | None:
        """Every pair above its feature's floor and some a little below it, as ``feature * tokens + token``, ascending;
        or None if the bound is too loose."""
        if not len(x):
            return torch.empty(0, dtype=torch.int64)
        t, w, d = _rounded(x), _rounded(weights), x.shape[1]
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
        tokens, features = (torch.cat([r.whole, *side], 1) for r, side in zip((t, w), zip(*terms), strict=True))
        if tokens.shape[1] > d + MOST:
            return None
        tokens, features = (torch.nn.functional.pad(side, (0, -side.shape[1] % PADDING)) for side in (tokens, features))
        n, found = len(x), []
        step = max(1, ROOM // n)
        for first in range(0, len(features), step):
            part = features[first : first + step]
            size = len(part) * n
            upper, above = self.room[:size].view(len(part), n), self.above[:size]
            torch._int_mm(part, tokens.T, out=upper)
            np.greater_equal(upper.numpy(), 0, out=above.reshape(upper.shape))
            found.append(np.flatnonzero(above) + first * n)
        return torch.from_numpy(np.concatenate(found))


class _Rounded(NamedTuple):
    whole: Int8[Tensor, "row d"]
    scale: Float[Tensor, " row"]
    length: Float[Tensor, " row"]
    kept: Float[Tensor, " row"]  # the length of ``whole * scale``
    lost: Float[Tensor, " row"]  # that of the difference

    def loss(self) -> float:
        return (torch.linalg.vector_norm(self.lost) / torch.linalg.vector_norm(self.length).clamp(min=1e-30)).item()


def _rounded(rows: Float[Tensor, "row d"]) -> _Rounded:
    largest = torch.cat([part.abs().amax(1) for part in rows.split(BLOCK)])
    scale = largest.clamp(min=max(SMALLEST * largest.max().item(), 1e-30)) / 127
    whole, lengths = torch.empty(rows.shape, dtype=torch.int8), []
    for part, room, s in zip(rows.split(BLOCK), whole.split(BLOCK), scale.split(BLOCK), strict=True):
        kept = (part / s[:, None]).round_()
        room.copy_(kept)
        kept *= s[:, None]
        norms = [torch.linalg.vector_norm(values, dim=1) for values in (part, kept, kept - part)]
        lengths.append(torch.stack(norms) * (1 + SAFE))
    length, kept, lost = torch.cat(lengths, 1)
    return _Rounded(whole, scale, length, kept, lost + SAFE * length)


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
    if not copies <= MOST:
        return None
    copies, rounded = int(copies) + 1, torch.ceil if up else torch.floor
    digit = (v / unit).floor()
    rest = rounded(LARGEST * (v / unit - digit)).clamp(max=LARGEST)
    tokens = [rounded(total / LARGEST)[:, None], rounded(total / copies)[:, None].expand(-1, copies)]
    features = [rest[:, None], digit[:, None].expand(-1, copies)]
    sign = 1 if up else -1
    return torch.cat(tokens, 1).to(torch.int8), (sign * torch.cat(features, 1)).to(torch.int8)
