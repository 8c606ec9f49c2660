"""What a unit that compares looks like: a step in its effect on the 100 numbers, and the years for which it fires."""

from __future__ import annotations

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor


def fit_steps(effects: Float[Tensor, "unit 100"]) -> pd.DataFrame:
    """The best single step under each curve of effects on the logits of 00 to 99, by least squares.

    Returns:
        One row per curve: ``location`` (the step lies between this number and the next), ``height`` (mean effect above
        minus mean effect up to it; positive steps say "later"), ``r2`` (share of the curve's variance that the step
        explains: 1 is a pure step, a straight line has 0.75) and ``sharpness`` (how much of the height lies within
        five numbers on either side: about 1 for a step, about 0.1 for a straight line).
    """
    effects = effects.double().cpu()
    counts = torch.arange(1, 100, dtype=torch.float64)  # numbers up to the step, for the 99 places where it can be
    below = effects.cumsum(dim=1)[:, :-1] / counts
    above = (effects.sum(dim=1, keepdim=True) - effects.cumsum(dim=1)[:, :-1]) / (100 - counts)
    explained = (above - below).square() * counts * (100 - counts) / 100
    place = explained.argmax(dim=1)
    rows = torch.arange(len(effects))
    height = (above - below)[rows, place]
    variance = (effects - effects.mean(dim=1, keepdim=True)).square().sum(dim=1)
    near = torch.stack(
        [
            e[p + 1 : p + 6].mean() - e[max(p - 4, 0) : p + 1].mean()
            for e, p in zip(effects, place.tolist(), strict=True)
        ]
    )
    columns = {"location": place, "height": height, "r2": explained[rows, place] / variance, "sharpness": near / height}
    return pd.DataFrame({name: values.numpy() for name, values in columns.items()})
