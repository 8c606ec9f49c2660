"""Uncertainty of a mean over nouns and centuries, which are crossed: every noun occurs in every century.

Prompts are not independent draws: those of one noun share it. The bootstrap therefore draws nouns and, independently
of them, centuries (the crossed-factor bootstrap of Owen 2007, "The pigeonhole bootstrap"), never single prompts.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float


def cell_means(values: Float[np.ndarray, " prompt"], frame: pd.DataFrame) -> pd.DataFrame:
    """Mean of a per-prompt metric for each noun (rows) and century (columns) of a `Prompts.frame`."""
    return frame.assign(value=np.asarray(values)).pivot_table(index="noun", columns="century", values="value")


def bootstrap(
    cells: Float[np.ndarray, "noun century ..."], draws: int = 2000, seed: int = 0
) -> Float[np.ndarray, "draws ..."]:
    """Means over cells of ``draws`` resamples: nouns with replacement, and independently centuries with replacement.

    A factor with one level has no spread of its own, so the interval is only as wide as the other factor makes it.
    """
    cells = np.asarray(cells, dtype=float)
    if cells.ndim < 2 or not cells.size or np.isnan(cells).any():
        raise ValueError("the bootstrap needs a value for every noun in every century")
    generator = np.random.default_rng(seed)
    weights = [generator.multinomial(n, np.full(n, 1 / n), size=draws) / n for n in cells.shape[:2]]
    return np.einsum("bn,bc,nc...->b...", *weights, cells)


def interval(cells: pd.DataFrame, level: float = 0.95, seed: int = 0) -> pd.Series:
    """``mean``, ``low`` and ``high`` of a table of `cell_means`: the bootstrap's percentile interval."""
    low, high = np.quantile(bootstrap(cells.to_numpy(), seed=seed), [(1 - level) / 2, (1 + level) / 2])
    return pd.Series({"mean": float(cells.to_numpy().mean()), "low": low, "high": high})
