"""Checks of notebook 10: other routes to the circuit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tclib.nb.teaching.verdict import call, judge, random


def integrated(answer: Callable[[Callable[[Tensor], Tensor], Tensor, Tensor, int], Tensor]) -> None:
    """Exercise 10.1, integrated gradients from ``slope(x), x, base, steps``. Expected: differences of the function.

    The function is a sum of one function of each coordinate, so each attribution must be that one's difference.
    """
    x, base = torch.tensor([2.0, -1.0, 1.5], dtype=torch.float64), torch.tensor([0.5, 1.0, -1.0], dtype=torch.float64)
    weights, steps = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), 100

    def slope(at: Tensor) -> Tensor:
        return 3 * weights * at**2  # of m(x) = sum of weights * x^3

    tried = f"m(x) = x0^3 - 2 x1^3 + x2^3 / 2, from {base.tolist()} to {x.tolist()} in {steps} steps"
    expected = weights * x**3 - weights * base**3
    middles = (torch.arange(steps) + 0.5) / steps
    along = torch.stack([slope(base + a * (x - base)) for a in middles])
    mistakes = {
        "that is the slope at x alone: attribution patching": (x - base) * slope(x),
        "that is the slope at the base alone": (x - base) * slope(base),
        "the mean slope still has to be multiplied by x - base": along.mean(0),
        "multiply by the whole way, x - base, not by x": x * along.mean(0),
        "the slopes are averaged, not added": (x - base) * along.sum(0),
        "the sign: the way leads from base to x": -expected,
        "the way starts at base, not at zero": (x - base) * torch.stack([slope(a * x) for a in middles]).mean(0),
    }
    cause = "average the slope at points along the straight line from base to x"
    judge(tried, call(answer, tried, slope, x.clone(), base.clone(), steps), expected, mistakes, cause, 1e-2)


def visible_part(answer: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Exercise 10.2, the part of a direction that some answer reads, from ``v [d], W [d, answers]``.

    Expected: Gram and Schmidt's orthogonalisation of the answers' columns, one after the other.
    """
    W, v = random((6, 3), (6,))
    W = torch.cat([W, W[:, :1] - 2 * W[:, 1:2]], 1)  # one answer is a mixture of two others
    tried = "a direction in 6 dimensions and 4 answers, of which one is a mixture of two others"
    basis: list[Tensor] = []
    for column in W.T:
        for other in basis:
            column = column - (column @ other) * other
        if column.norm() > 1e-9:
            basis.append(column / column.norm())
    expected = sum(((v @ direction) * direction for direction in basis), torch.zeros_like(v))
    mistakes = {
        "that is the part which no answer reads": v - expected,
        "that is what the answers read, not the part of v that they read": v @ W,
        "the answers' columns are neither of length 1 nor orthogonal, so W W^T is no projection": W @ (W.T @ v),
        "keep its length: a part of v, not a unit vector": expected / expected.norm(),
        "v came back unchanged: some of it is read by no answer": v,
    }
    cause = "a projection onto the space that the columns of W span"
    judge(tried, call(answer, tried, v.clone(), W.clone()), expected, mistakes, cause)
