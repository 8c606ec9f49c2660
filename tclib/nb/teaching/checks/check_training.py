"""Checks of notebook 01: training a transcoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tclib.nb.teaching.verdict import call, judge, random


def transcoder(answer: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    """Exercise 01.1, ``z``, ``TC(x)`` and the loss from ``x, y, W_enc, b_enc, W_dec, b_dec, l1``.

    Expected: loops over single numbers.
    """
    x, y, W_enc, b_enc, W_dec, b_dec = given = random((5, 4), (5, 3), (4, 6), (6,), (6, 3), (3,))
    l1, tried = 0.25, "loss, imitation and z on 5 inputs of width 4, with 6 features, joined"
    z, imitation = [], []
    for row in x.tolist():
        z.append([max(0.0, _dot(row, column) + b) for column, b in zip(W_enc.T.tolist(), b_enc.tolist(), strict=True)])
        imitation.append([_dot(z[-1], column) + b for column, b in zip(W_dec.T.tolist(), b_dec.tolist(), strict=True)])
    pairs = zip(sum(imitation, []), y.flatten().tolist(), strict=True)
    error, active = sum((b - a) ** 2 for a, b in pairs), sum(sum(z, []))
    expected = _joined(z, imitation, (error + l1 * active) / 5)

    def wrong(z: Tensor, out: Tensor) -> Tensor:
        return _joined(z, out, (y - out).pow(2).sum(-1).mean() + l1 * z.sum(-1).mean())

    pre = x @ W_enc + b_enc
    z, late = pre.relu(), (x @ W_enc).relu() + b_enc
    out = z @ W_dec + b_dec
    squares = (y - out).pow(2)
    mistakes = {
        "there is no ReLU, so negative pre-activations pass": wrong(pre, pre @ W_dec + b_dec),
        "b_enc is missing inside the ReLU": wrong((x @ W_enc).relu(), (x @ W_enc).relu() @ W_dec + b_dec),
        "b_enc is added after the ReLU instead of before it": wrong(late, late @ W_dec + b_dec),
        "b_dec is missing": wrong(z, z @ W_dec),
        "the output has a ReLU as well; only the features have one": wrong(z, out.relu()),
        "the loss has no penalty": _joined(z, out, squares.sum(-1).mean()),
        "a mean over all coordinates: the error of a token is a sum over them": _joined(
            z, out, squares.mean() + l1 * z.sum(-1).mean()
        ),
        "the penalty is averaged over features: of a token it is a sum": _joined(
            z, out, squares.sum(-1).mean() + l1 * z.mean()
        ),
        "a sum over all tokens: the loss is a mean over them": _joined(z, out, squares.sum() + l1 * z.sum()),
        "the loss alone came back: return z, the imitation and the loss": wrong(z, out)[0],
    }
    got = call(answer, tried, *given, l1)
    if isinstance(got, tuple | list) and len(got) == 3 and all(part is not None for part in got):
        got = _joined(*got)
    judge(tried, got, expected, mistakes, "the order: z, the imitation, the loss")


def dodge(answer: Callable[[float], Sequence[float]] | Sequence[float]) -> None:
    """Exercise 01.2, factors of error and penalty if activations shrink by 4 and decoder rows grow by 4.

    Expected: both measured on a random transcoder, before and after.
    """
    x, y, W_enc, b_enc, W_dec, b_dec = random((20, 4), (20, 3), (4, 6), (6,), (6, 3), (3,))
    tried = "your two factors, against error and penalty measured before and after"

    def measured(c: float) -> tuple[float, float]:
        z = (x @ (W_enc / c) + b_enc / c).relu()
        return (y - z @ (c * W_dec) - b_dec).square().sum().item(), z.abs().sum().item()

    expected = [after / before for after, before in zip(measured(4.0), measured(1.0), strict=True)]
    mistakes = {
        "the error does not change: the longer rows make up for the smaller activations": (0.25, 0.25),
        "the penalty counts the activations, which became smaller": (1.0, 4.0),
        "the penalty counts activations alone, not the length of the rows": (1.0, 1.0),
        "the penalty is a sum of activations, not of their squares": (1.0, 1 / 16),
        "the order: first the error, then the penalty": (0.25, 1.0),
    }
    judge(tried, call(answer, tried), expected, mistakes, "write z/4 and 4 W_dec into both terms of the loss")


def best_activation(answer: Callable[[Tensor, float], Tensor]) -> None:
    """Exercise 01.3, the z >= 0 that minimises ``(a - z)^2 + l1 z``, from ``a [n], l1``. Expected: search on a grid."""
    a, l1 = torch.tensor([-1.0, 0.0, 0.2, 0.5, 1.0, 3.0], dtype=torch.float64), 0.8
    tried = f"a = {a.tolist()} with the coefficient {l1}"
    grid = torch.linspace(0, 4, 40_001, dtype=torch.float64)
    expected = grid[((a[:, None] - grid) ** 2 + l1 * grid).argmin(1)]
    mistakes = {
        "that is a without shrinking, the best z without a penalty": a.clamp(min=0),
        "a factor 2: the derivative of (a - z)^2 is 2 (z - a)": (a - l1).clamp(min=0),
        "z may not be negative": a - l1 / 2,
        "the sign: the penalty makes z smaller": (a + l1 / 2).clamp(min=0),
        "that switches small ones off but does not shrink the others": torch.where(a > l1 / 2, a, 0.0),
    }
    judge(
        tried, call(answer, tried, a, l1), expected, mistakes, "set the derivative by z to 0, then look at z = 0", 1e-3
    )


def _joined(*parts: Tensor | Sequence | float) -> Tensor:
    return torch.cat([torch.as_tensor(part, dtype=torch.float64).detach().flatten() for part in reversed(parts)])


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
