"""Checks of notebook 13: after the paper."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tclib.nb.teaching.verdict import call, judge


def error_share(answer: Callable[[Tensor, Tensor, Tensor, Tensor], float]) -> None:
    """Exercise 13.1, how much influence ends at errors, from ``N, weights, errors, inputs``.

    Expected: every path from the targets is walked, one edge at a time.
    """
    sources = {
        2: {0: 0.75, 1: 0.25},  # a feature that reads an input (0) and an error (1)
        4: {0: 0.2, 2: 0.5, 3: 0.3},  # a later one, which also reads that feature and another error (3)
        5: {2: 0.1, 3: 0.3, 4: 0.6},
        6: {0: 0.5, 4: 0.5},
    }
    weights = torch.tensor([0, 0, 0, 0, 0, 0.6, 0.3], dtype=torch.float64)  # 5 and 6 are the targets
    errors, inputs = (torch.tensor([i in some for i in range(7)]) for some in ((1, 3), (0,)))
    N = torch.zeros(7, 7, dtype=torch.float64)
    for target, row in sources.items():
        for source, share in row.items():
            N[target, source] = share

    def ends(node: int, carried: float) -> dict[int, float]:
        if node not in sources:
            return {node: carried}
        found: dict[int, float] = {}
        for source, share in sources[node].items():
            for end, amount in ends(source, carried * share).items():
                found[end] = found.get(end, 0.0) + amount
        return found

    def share_of(starts: list[float]) -> float:
        arrived = torch.zeros(7, dtype=torch.float64)
        for node, weight in enumerate(starts):
            if weight:
                for end, amount in ends(node, weight).items():
                    arrived[end] += amount
        return float(arrived[errors].sum() / (arrived[errors].sum() + arrived[inputs].sum()))

    right = share_of(weights.tolist())
    one_step = weights @ N
    everywhere = weights @ (torch.linalg.inv(torch.eye(7, dtype=torch.float64) - N))
    mistakes = {
        "only paths of one step: what a feature receives has to be followed further back": float(
            one_step[errors].sum() / (one_step[errors].sum() + one_step[inputs].sum())
        ),
        "divide by what ends at errors and inputs: features pass on what they receive": float(
            everywhere[errors].sum() / everywhere[:5].sum()
        ),
        "that is the share which ends at inputs": 1 - right,
        "that is the influence itself, not its share": float(everywhere[errors].sum()),
        "each target counts by its weight": share_of([float(weight > 0) for weight in weights]),
    }
    tried = "a graph of two targets, two features, two errors and one input"
    cause = "start with the weights, multiply by N again and again, and add up what arrives at each node"
    judge(tried, call(answer, tried, N, weights.clone(), errors, inputs), right, mistakes, cause)
