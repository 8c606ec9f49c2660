"""Which pairs of token and feature may be active: found by one product, in chunks of tokens that stay in the cache.

The product may be in bfloat16. Then each result is raised by a bound on its error, so that no active pair is missed.
With x' and w' for the rounded factors, Cauchy-Schwarz gives

    |x w - x' w'| <= |x| |w - w'| + |x - x'| |w'|     at most ((1 + 2^-8)^2 - 1) |x| |w|, by measured losses about half
    + SUMS |x'| |w'|                                  float32 sums of products, in any order
    bias - floor <= high + low                        two bfloat16 numbers, rounded up

The bound and the bias are four more coordinates of x and w, so they cost no pass of their own. The result's own
rounding keeps its sign; where its size matters (TopK), 2^-8 of it is given away in either direction.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

ROUNDING = 2.0**-8  # bfloat16 keeps 8 bits
CHUNK = 512  # tokens; their bfloat16 products with 24,576 features take 25 MB
BLOCK = 256  # rows that are rounded and measured at once, in the cache
GROUP = 32  # features whose maximum stands for them in the search for the k-th largest
PADDING = 4  # widths of bfloat16 products are multiples of this


def bfloat16_hardware() -> bool:
    """Whether this processor multiplies bfloat16 by itself (AVX512-BF16, AMX, ARM's BF16) and torch can tell."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def exact(
    x: Float[Tensor, "token d_in"],
    weights: Float[Tensor, "d_features d_in"],
    bias: Float[Tensor, " d_features"],
    floor: Float[Tensor, " d_features"],
    k: int | None = None,
) -> tuple[Int[Tensor, " pair"], Float[Tensor, " pair"]]:
    """Pairs with a pre-activation above their feature's floor or, with k, a superset of each token's k largest
    positive ones; as ``feature * tokens + token``, with the pre-activations."""
    keys, values = [], []
    for first in range(0, len(x), CHUNK):
        pre = torch.addmm(bias[:, None], weights, x[first : first + CHUNK].T)
        if k is None:
            above = pre.numpy() > floor.numpy()[:, None]
        else:
            least = kth(grouped(pre, k), k).numpy()
            above = (pre.numpy() >= least) & (pre.numpy() > 0)
        hits = np.flatnonzero(above)
        keys.append(_keys(hits, pre.shape[1], first, len(x)))
        values.append(pre.flatten()[torch.from_numpy(hits)])
    return torch.cat(keys), torch.cat(values)


class Screen:
    """The bfloat16 product, and the memory that it uses again in each step."""

    def __init__(self, features: int, d_in: int):
        self.width = d_in + 4 + -d_in % PADDING
        self.raised = torch.zeros(features, self.width, dtype=torch.bfloat16)
        self.room = torch.empty(features * CHUNK, dtype=torch.bfloat16)
        self.above = np.empty(features * CHUNK, dtype=bool)

    def __call__(
        self,
        x: Float[Tensor, "token d_in"],
        weights: Float[Tensor, "d_features d_in"],
        bias: Float[Tensor, " d_features"],
        floor: Float[Tensor, " d_features"],
        k: int | None = None,
    ) -> Int[Tensor, " candidate"]:
        """As `exact`: every such pair, and some whose pre-activation is a little lower."""
        margin, slack = self.load(weights, bias - floor)
        inputs, length = _inputs(x, self.width)
        keys, features = [], len(bias)
        for first in range(0, len(x), CHUNK):
            chunk = inputs[first : first + CHUNK]
            size, shape = features * len(chunk), (features, len(chunk))
            upper = torch.mm(self.raised, chunk.T, out=self.room[:size].view(shape))
            order = upper.view(torch.int16)  # positive numbers compare as these integers do
            least = np.int16(1)
            if k is not None:
                best = grouped(order, k).clamp(min=0).view(torch.bfloat16).float()
                excess = grouped(margin, k) @ length[first : first + CHUNK].T
                lower = best * (1 - 2 * ROUNDING) - excess - grouped(slack[:, None], k)
                low = (kth(lower, k) * (1 - 2 * ROUNDING)).clamp(min=0)
                least = (low.view(torch.int32) >> 16).clamp(min=1).to(torch.int16).numpy()  # rounded down
            np.greater_equal(order.numpy(), least, out=self.above[:size].reshape(shape))
            keys.append(_keys(np.flatnonzero(self.above[:size]), len(chunk), first, len(x)))
        return torch.cat(keys)

    def load(
        self, weights: Float[Tensor, "d_features d_in"], bias: Float[Tensor, " d_features"]
    ) -> tuple[Float[Tensor, "d_features 2"], Float[Tensor, " d_features"]]:
        """Load weights, bias and bound; return the coefficients of the largest error of a product: the first times
        the two lengths of `_inputs`, plus the second."""
        raised, d, sums = self.raised, weights.shape[1], 4 * self.width * 2.0**-24
        length, lost = _rounded(weights, raised[:, :d])
        high = bias.bfloat16()
        slack = (2.0**-15 + sums) * bias.abs() + 1e-30
        raised[:, d] = high
        raised[:, d + 1] = bias - high + slack
        raised[:, d + 2] = _up(lost + sums * length)  # meets |x|
        raised[:, d + 3] = _up((1 + sums) * length)  # meets |x - x'|
        return 2 * raised[:, d + 2 : d + 4].float(), 2 * slack.float()


def _inputs(x: Float[Tensor, "token d_in"], width: int) -> tuple[Tensor, Float[Tensor, "token 2"]]:
    """x in bfloat16 with the coordinates that meet those of `Screen.load`; and ``|x|``, ``|x - x'|``, rounded up."""
    d = x.shape[1]
    inputs = torch.zeros(len(x), width, dtype=torch.bfloat16)
    _, lost = _rounded(x, inputs[:, :d])
    inputs[:, d : d + 2] = 1
    inputs[:, d + 2] = _up(torch.linalg.vector_norm(x, dim=1))
    inputs[:, d + 3] = _up(lost)
    return inputs, inputs[:, d + 2 : d + 4].float()


def _rounded(rows: Float[Tensor, "row d"], out: Tensor) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Write rows as bfloat16; the lengths of what is written and of what is lost."""
    written, missing = [], []
    for part, room in zip(rows.split(BLOCK), out.split(BLOCK), strict=True):
        kept = room.copy_(part).to(part)
        written.append(torch.linalg.vector_norm(kept, dim=1))
        missing.append(torch.linalg.vector_norm(kept - part, dim=1))
    return torch.cat(written), torch.cat(missing)


def _up(value: Tensor) -> Tensor:
    return (value * (1 + 2 * ROUNDING)).bfloat16()


def grouped(values: Tensor, k: int) -> Tensor:
    """The largest of each group of features, for at least k groups."""
    size = max(1, min(GROUP, len(values) // (4 * k)))
    count = len(values) // size
    return values[: count * size].view(size, count, -1).amax(0)


def kth(values: Tensor, k: int) -> Tensor:
    """The k-th largest of each column. That of group maxima is at most that of all."""
    columns = values.T.contiguous().numpy()
    return torch.from_numpy(np.partition(columns, -k, axis=1)[:, -k].copy())


def _keys(hits: np.ndarray, width: int, first: int, tokens: int) -> Tensor:
    """Positions in a block of ``width`` tokens as ``feature * tokens + token``."""
    feature, token = np.divmod(hits, width)
    return torch.from_numpy(feature * tokens + (token + first))
