"""Yardsticks for whatever ranks parts of a model: a cheap score beside a measured effect, and a few parts in its place.

Parts are nodes of a circuit or units of a dictionary; scores and effects are lists with one number for each part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import pandas as pd
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

Part = TypeVar("Part")
Numbers = Sequence[float] | Tensor


def rank_correlation(scores: Numbers, effects: Numbers) -> float:
    """Spearman's correlation of the magnitudes, ties sharing their rank; NaN if all magnitudes of a side are equal.

    Raises:
        ValueError: the lists differ in length, are empty, or hold numbers that are not finite.
    """
    a, b = (pd.Series(values.abs().numpy()).rank() for values in _paired(scores, effects))
    return float(a.corr(b))


def precision(scores: Numbers, effects: Numbers, k: int) -> float:
    """Share of the k parts of largest |score| that are among the k of largest |effect|.

    Raises:
        ValueError: as for `rank_correlation`, or no k between 1 and the number of parts.
    """
    pair = _paired(scores, effects)
    if not 1 <= k <= len(pair[0]):
        raise ValueError(f"k = {k}, but there are {len(pair[0])} parts: choose k between 1 and that number")
    best = (set(values.abs().argsort(descending=True, stable=True)[:k].tolist()) for values in pair)
    return len(set.intersection(*best)) / k


def agreement(scores: Numbers, effects: Numbers, k: int = 10, shuffles: int = 20, seed: int = 0) -> dict[str, float]:
    """How far scores agree with measured effects, beside the same scores shuffled among the parts.

    Returns:
        ``order`` (`rank_correlation`), ``order, shuffled`` (the largest of ``shuffles``), ``linear`` (Pearson's
        correlation, signs included) and ``best k`` (`precision`, with the number in the name).

    Raises:
        ValueError: as for `precision`.
    """
    a, b = _paired(scores, effects)
    generator = torch.Generator().manual_seed(seed)
    shuffled = [rank_correlation(a[torch.randperm(len(a), generator=generator)], b) for _ in range(shuffles)]
    linear = float(pd.Series(a.numpy()).corr(pd.Series(b.numpy())))
    order = {"order": rank_correlation(a, b), "order, shuffled": max(shuffled, default=float("nan"))}
    return order | {"linear": linear, f"best {k}": precision(a, b, k)}


def kept_shares(
    measure: Callable[[Sequence[Part]], float], ranked: Sequence[Part], sizes: Sequence[int], empty: float, whole: float
) -> dict[int, float]:
    """Faithfulness of the first n parts: (m(first n) - m(none)) / (m(model) - m(none)), for each n of ``sizes``.

    1 is the whole model and 0 is nothing; above 1, what was left out had worked against the behaviour.

    Args:
        measure: m, of the model in which only the given parts are live.
        ranked: all parts, best first; an n beyond their number means all of them.
        empty, whole: m with no part live and of the untouched model.

    Raises:
        ValueError: the model does no better than nothing does, or a negative size.
    """
    if empty == whole:
        raise ValueError(f"the model and nothing at all both have {whole:.4g}: no share of a difference can be given")
    if min(sizes, default=0) < 0:
        raise ValueError(f"there are no first {min(sizes)} parts: sizes are 0 or more")
    return {size: (measure(ranked[:size]) - empty) / (whole - empty) for size in sizes}


@dataclass
class Cost:
    """What was spent: prompts that the model ran forwards, prompts that gradients came back from, and seconds."""

    forward: int = 0
    backward: int = 0
    seconds: float = 0.0


@contextmanager
def cost_of(model: TransformerBridge) -> Iterator[Cost]:
    """Count what a block of code asks of the model; afterwards the model is as it was, also after an error."""
    spent, start = Cost(), time.perf_counter()

    def count(module: torch.nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
        spent.forward += len(logits)
        if logits.requires_grad:
            logits.register_hook(returned)

    def returned(gradient: Tensor) -> None:
        spent.backward += len(gradient)

    handle = model.unembed.register_forward_hook(count)
    try:
        yield spent
    finally:
        handle.remove()
        spent.seconds = time.perf_counter() - start


def _paired(scores: Numbers, effects: Numbers) -> tuple[Tensor, Tensor]:
    a, b = (torch.as_tensor(values, dtype=torch.float64).detach().flatten().cpu() for values in (scores, effects))
    if len(a) != len(b) or not len(a):
        raise ValueError(f"{len(a)} scores for {len(b)} effects: give one of each for every part, and at least one")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("scores and effects must be finite numbers")
    return a, b
