"""Checks of notebook 01: training a transcoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tclib.nb.teaching.verdict import call, judge


def forward(answer: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
    """Exercise 01.1, ``TC(x)`` from ``x, W_enc, b_enc, W_dec, b_dec``. Expected: loops over single numbers."""
    x, W_enc, b_enc, W_dec, b_dec = weights = _random((5, 4), (4, 6), (6,), (6, 3), (3,))
    tried = "your transcoder on 5 inputs of width 4, with 6 features"
    expected = []
    for row in x.tolist():
        z = [max(0.0, _dot(row, column) + b) for column, b in zip(W_enc.T.tolist(), b_enc.tolist(), strict=True)]
        expected.append([_dot(z, column) + b for column, b in zip(W_dec.T.tolist(), b_dec.tolist(), strict=True)])
    pre = x @ W_enc + b_enc
    z = pre.relu()
    mistakes = {
        "there is no ReLU, so negative pre-activations pass": pre @ W_dec + b_dec,
        "b_enc is missing inside the ReLU": (x @ W_enc).relu() @ W_dec + b_dec,
        "b_enc is added after the ReLU instead of before it": ((x @ W_enc).relu() + b_enc) @ W_dec + b_dec,
        "b_dec is missing": z @ W_dec,
        "the output has a ReLU as well; only the features have one": (z @ W_dec + b_dec).relu(),
        "that is z, the feature activations: they still have to be decoded": z,
    }
    judge(tried, call(answer, tried, *weights), expected, mistakes, "the order of the two equations")


def fold(answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Exercise 01.2, the encoder bias that replaces an input bias, from ``b_in, W_enc, b_enc``.

    Expected: what the paper's form gives at x = 0, where the folded form gives its bias alone.
    """
    b_in, W_enc, b_enc = weights = _random((4,), (4, 6), (6,))
    tried = "the pre-activations with your folded bias, against those of the paper's form"
    expected = [_dot([-b for b in b_in.tolist()], column) for column in W_enc.T.tolist()]
    expected = [a + b for a, b in zip(expected, b_enc.tolist(), strict=True)]
    mistakes = {
        "the sign: the paper subtracts b_in from x": b_enc + b_in @ W_enc,
        "the old b_enc is lost": -(b_in @ W_enc),
        "b_enc came back unchanged": b_enc,
        "b_in itself was changed, not what the encoder makes of it": b_in,
    }
    judge(tried, call(answer, tried, *weights), expected, mistakes, "multiply out (x - b_in) W_enc")


def dodge(answer: Callable[[float], Sequence[float]] | Sequence[float]) -> None:
    """Exercise 01.3, factors of error and price if activations shrink by 4 and decoder rows grow by 4.

    Expected: both measured on a random transcoder, before and after.
    """
    x, y, W_enc, b_enc, W_dec, b_dec = _random((20, 4), (20, 3), (4, 6), (6,), (6, 3), (3,))
    tried = "your two factors, against error and price measured before and after"

    def measured(c: float) -> tuple[float, float]:
        z = (x @ (W_enc / c) + b_enc / c).relu()
        return (y - z @ (c * W_dec) - b_dec).square().sum().item(), z.abs().sum().item()

    expected = [after / before for after, before in zip(measured(4.0), measured(1.0), strict=True)]
    mistakes = {
        "the error does not change: the longer rows make up for the smaller activations": (0.25, 0.25),
        "the price counts the activations, which became smaller": (1.0, 4.0),
        "the price counts activations alone, not the length of the rows": (1.0, 1.0),
        "the price is a sum of activations, not of their squares": (1.0, 1 / 16),
        "the order: first the error, then the price": (0.25, 1.0),
    }
    judge(tried, call(answer, tried), expected, mistakes, "write z/4 and 4 W_dec into both terms of the loss")


def best_activation(answer: Callable[[Tensor, float], Tensor]) -> None:
    """Exercise 01.4, the z >= 0 that minimises ``(a - z)^2 + l1 z``, from ``a [n], l1``. Expected: search on a grid."""
    a, l1 = torch.tensor([-1.0, 0.0, 0.2, 0.5, 1.0, 3.0], dtype=torch.float64), 0.8
    tried = f"a = {a.tolist()} at the price {l1}"
    grid = torch.linspace(0, 4, 40_001, dtype=torch.float64)
    expected = grid[((a[:, None] - grid) ** 2 + l1 * grid).argmin(1)]
    mistakes = {
        "that is a without shrinking, the best z at price 0": a.clamp(min=0),
        "a factor 2: the derivative of (a - z)^2 is 2 (z - a)": (a - l1).clamp(min=0),
        "z may not be negative": a - l1 / 2,
        "the sign: the price makes z smaller": (a + l1 / 2).clamp(min=0),
        "that switches small ones off but does not shrink the others": torch.where(a > l1 / 2, a, 0.0),
    }
    judge(
        tried, call(answer, tried, a, l1), expected, mistakes, "set the derivative by z to 0, then look at z = 0", 1e-3
    )


def _random(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
