"""Checks of notebooks 11 and 11b: other dictionaries, and a dictionary that knows the labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.nb.teaching.verdict import call, judge, random


def orthogonal_pursuit(answer: Callable[[Tensor, Tensor, int], Float[Tensor, " unit"]]) -> None:
    """Exercise 11.1, sizes of `k` units of `D` for `y`, all fitted anew after each pick.

    Expected: what is left is found by projecting with the picks' QR decomposition, and the sizes by its triangle.
    """
    D = torch.randn(12, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    D /= D.norm(dim=1, keepdim=True)
    y = 2.0 * D[3] - 1.5 * D[7] + 0.3 * D[1]
    k = 4
    tried = "a vector of width 6, 12 units that are not orthogonal, 4 picks"
    picks, left = [], y
    for _ in range(k):
        picks.append(int((D @ left).abs().argmax()))
        Q, R = torch.linalg.qr(D[picks].T)
        left = y - Q @ (Q.T @ y)
    sizes = torch.linalg.solve_triangular(R, (Q.T @ y)[:, None], upper=True)[:, 0]
    expected = _placed(picks, sizes, len(D))
    first = (D @ y).abs().topk(k).indices.tolist()
    mistakes = {
        "sizes are never fitted anew: that is plain matching pursuit": _plain(y, D, k, signed=True),
        "only positive products are picked; the largest in size may be negative": _plain(y, D, k, signed=False),
        "all units were picked at once, by their products with y and not with what is left": _placed(
            first, torch.linalg.lstsq(D[first].T, y).solution, len(D)
        ),
        "sizes are products with y: units that are not orthogonal need a least-squares fit": _placed(
            picks, D[picks] @ y, len(D)
        ),
        "the sizes alone: put each at the place of its unit": sizes,
        "that is what is left of y, not the sizes": left,
    }
    cause = "pick by |left . D_i|, fit all sizes so far by least squares, subtract what that fit gives"
    judge(tried, call(answer, tried, y, D, k), expected, mistakes, cause)


def label_fvu(answer: Callable[[Tensor, Tensor], float]) -> None:
    """Exercise 11b.1, what is left unexplained if each token is answered by the mean of its kind, from ``y, kind``.

    Expected: a least-squares fit of `y` by one column per kind.
    """
    kind: Int[Tensor, " token"] = torch.tensor([0] * 20 + [4] * 6 + [9] * 2)
    centres = {0: 0.0, 4: 3.0, 9: -4.0}
    y = random((len(kind), 3))[0]
    y += torch.tensor([centres[int(one)] for one in kind])[:, None]
    tried = "28 tokens of three kinds, 20, 6 and 2 of them"
    columns = torch.stack([(kind == one).double() for one in centres], 1)
    left = y - columns @ torch.linalg.lstsq(columns, y).solution
    total = (y - y.mean(0)).square().sum()
    expected = float(left.square().sum() / total)
    within = {one: float((y[kind == one] - y[kind == one].mean(0)).square().sum()) for one in centres}
    counts = Counter(kind.tolist())
    share = np.mean([within[one] / counts[one] for one in centres]) / (float(total) / len(y))
    middle = y - torch.stack([y[kind == int(one)].median(0).values for one in kind])
    mistakes = {
        "that is the share explained: FVU is 1 minus it": 1 - expected,
        "every kind counts alike: sum over tokens, so that a common kind counts more": share,
        "the mean was not subtracted from y in the denominator": float(left.square().sum() / y.square().sum()),
        "the squared error is not divided by the variance": float(left.square().sum()),
        "lengths instead of squared lengths": float(left.norm(dim=1).sum() / (y - y.mean(0)).norm(dim=1).sum()),
        "the median of a kind is not the best answer to a squared error": float(middle.square().sum() / total),
    }
    judge(tried, call(answer, tried, y, kind), expected, mistakes, "the variance within kinds over the total variance")


def _placed(picks: list[int], sizes: Tensor, n: int) -> Float[Tensor, " unit"]:
    z = torch.zeros(n, dtype=sizes.dtype)
    return z.index_add_(0, torch.tensor(picks), sizes)


def _plain(y: Tensor, D: Tensor, k: int, signed: bool) -> Float[Tensor, " unit"]:
    """Matching pursuit without a fit, or (unsigned) with the fit but only positive picks."""
    z, left, picks = torch.zeros(len(D), dtype=y.dtype), y, []
    for _ in range(k):
        fit = D @ left
        pick = int((fit.abs() if signed else fit).argmax())
        if signed:
            z[pick] += fit[pick]
            left = left - fit[pick] * D[pick]
        else:
            picks.append(pick)
            z = _placed(picks, torch.linalg.lstsq(D[picks].T, y).solution, len(D))
            left = y - z @ D
    return z
