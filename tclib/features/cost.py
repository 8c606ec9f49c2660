"""Estimate an index's disk and memory use from a few rows of the text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from tclib.features.active import CHUNK, ActiveFinder
from tclib.features.build import BATCH_ROWS, MERGED_AT_ONCE, PART_TOKENS, active_pairs, check_input
from tclib.features.index import DTYPES
from tclib.replacement_model import ReplacementModel


@dataclass(frozen=True)
class Plan:
    """Estimated cost of an index, from a few rows of the text."""

    tokens: int
    activations: dict[int, int]  # by layer
    disk: int  # bytes of the finished index, but for its tables of tokens: 3.2 kB for each feature that fires often
    working_disk: int  # bytes at the worst moment, parts included
    memory: int  # bytes beside the weights; grows with a batch and a part, not with the text

    def __str__(self) -> str:
        return (
            f"{self.tokens:,} tokens, about {sum(self.activations.values()):,} activations: {self.disk / 1e6:,.1f} MB "
            f"on disk ({self.working_disk / 1e6:,.1f} MB while it is made), {self.memory / 1e6:,.0f} MB of memory"
        )


def plan(replacement: ReplacementModel, tokens: Int[Tensor, "row pos"]) -> Plan:
    """Predict disk and memory before anything long is run; the density is measured on one batch of rows.

    Raises:
        ValueError: no text, or no transcoder.
    """
    tokens, model, transcoders = check_input(replacement, tokens), replacement.model, replacement.transcoders
    spread = torch.linspace(0, len(tokens) - 1, min(BATCH_ROWS, len(tokens))).long().unique()
    finders = {layer: ActiveFinder(t) for layer, t in transcoders.items()}
    found = active_pairs(model, finders, tokens[spread], 0)
    share = len(tokens) / len(spread)
    activations = {layer: round(len(pairs["values"]) * share) for layer, pairs in found.items()}
    each = sum(d.itemsize for d in DTYPES.values())
    fixed = sum(8 * (t.config.d_features + 1) + 4 * tokens.numel() for t in transcoders.values()) + 4 * tokens.numel()
    disk = each * sum(activations.values()) + fixed
    batch, width = min(BATCH_ROWS, len(tokens)) * tokens.shape[1], tokens.shape[1]
    c = model.cfg
    forward = 4 * batch * (20 * c.d_model + 4 * c.n_heads * width + 2 * len(transcoders) * c.d_model)
    encoding = 4 * 4 * CHUNK * max(t.config.d_features for t in transcoders.values())
    large = [f for f in finders.values() if f.screen]
    encoding += sum(6 * f.rows.numel() for f in large)  # rows and their bfloat16 copies
    of_part = min(1.0, PART_TOKENS / tokens.numel())
    collected = (10 * sum(activations.values()) + 40 * max(activations.values())) * of_part
    return Plan(
        tokens.numel(), activations, disk, 2 * disk, round(forward + encoding + collected + 40 * MERGED_AT_ONCE)
    )
