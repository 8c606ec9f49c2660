"""Sums over tokens of a text that streams by, once plainly and once per bootstrap replicate."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Sums:
    """Sums over tokens: ``total[name] [replicate, ...]`` and ``place[name] [pos]``, in float64."""

    def __init__(self):
        self.total: dict[str, Tensor] = defaultdict(lambda: torch.zeros(1, dtype=torch.float64))
        self.place: dict[str, Tensor] = defaultdict(lambda: torch.zeros(1, dtype=torch.float64))

    def add(self, weights: Float[Tensor, "replicate row"], keep: Bool[Tensor, "row pos"], **values: Tensor) -> None:
        keep = keep.float()
        for name, value in {"n": keep, **values}.items():
            masked = value * keep.view(*keep.shape, *[1] * (value.ndim - 2))
            self.total[name] = self.total[name] + torch.tensordot(weights, masked.sum(1).cpu().double(), dims=1)
            if value.ndim == 2:
                self.place[name] = self.place[name] + masked.sum(0).cpu().double()

    def mean(self, name: str) -> Float[np.ndarray, " replicate"]:
        return (self.total[name] / self.total["n"]).numpy()

    def mean_at(self, name: str) -> Float[np.ndarray, " pos"]:
        return (self.place[name] / self.place["n"]).numpy()


def bootstrap_weights(rows: int, replicates: int, draw: torch.Generator) -> Float[Tensor, "replicate row"]:
    """How often each row counts: once in replicate 0, Poisson(1) times in the others."""
    plain = torch.ones(rows, 1, dtype=torch.float64)
    # Drawn row by row, so that the batch size does not matter.
    resampled = torch.poisson(torch.ones(rows, replicates, dtype=torch.float64), generator=draw)
    return torch.cat([plain, resampled], dim=1).T
