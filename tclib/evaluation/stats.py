"""How sure a number is: over rows of text and over prompts by bootstrap, over training seeds by Student's t.

Rows are resampled while the text streams by (`Sums`, `bootstrap_weights`), and `over_rows` turns the replicates into
intervals. Prompts are not independent draws: those of one noun share it, and every noun occurs in every century. Their
bootstrap therefore draws nouns and, independently of them, centuries (the crossed-factor bootstrap of Owen 2007, "The
pigeonhole bootstrap"), never single prompts (`cell_means`, `bootstrap`, `interval`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Student's t at 97.5% for n - 1 degrees of freedom, by number of seeds n: all that scipy would be needed for.
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def over_rows(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Each number with its 95% percentile interval over bootstrap replicates of the rows (Efron 1979).

    Args:
        table: any table with a column ``replicate``; differences of two such tables are paired.
        by: what names a row, for example ``["layer"]``.

    Returns:
        Long: ``by``, ``metric``, ``value`` (of the text as it is), ``low``, ``high``.

    Raises:
        ValueError: the table has no replicates.
    """
    if "replicate" not in table or table["replicate"].max() < 1:
        raise ValueError("there are no replicates to take an interval over: measure with replicates=200, say")
    by = list(by)
    long = table.melt([*by, "replicate"], var_name="metric").dropna(subset="value")
    keys = [*by, "metric"]
    value = long[long["replicate"] == 0].set_index(keys)["value"]
    resampled = long[long["replicate"] > 0].groupby(keys, sort=False)["value"]
    bounds = {"low": resampled.quantile(0.025), "high": resampled.quantile(0.975)}
    return value.to_frame().assign(**bounds).dropna().reset_index()


def over_seeds(table: pd.DataFrame, by: Sequence[str], column: str) -> pd.DataFrame:
    """Mean over training seeds with its 95% interval (Student's t, so 3 seeds give a wide one).

    Returns:
        ``by``, ``value`` (the mean), ``low``, ``high``, ``seeds``.

    Raises:
        ValueError: fewer than 2 seeds, or more than 10.
    """
    groups = table.groupby(list(by), sort=False)[column]
    result = groups.agg(value="mean", spread="std", seeds="count").reset_index()
    if not result["seeds"].isin(T_975).all():
        found = result.loc[~result["seeds"].isin(T_975), "seeds"].iloc[0]
        raise ValueError(f"an interval over seeds needs 2 to 10 of them, but there are {found}")
    half = result["seeds"].map(T_975) * result.pop("spread") / np.sqrt(result["seeds"])
    result.insert(len(by) + 1, "low", result["value"] - half)
    result.insert(len(by) + 2, "high", result["value"] + half)
    return result


def shown(table: pd.DataFrame, digits: int = 3) -> pd.Series:
    """``value [low, high]`` as text, for display."""
    parts = (table[c].map(f"{{:.{digits}f}}".format) for c in ("value", "low", "high"))
    value, low, high = parts
    return value + " [" + low + ", " + high + "]"


class Sums:
    """Sums over tokens: ``total[name] [replicate, ...]`` and ``place[name] [pos]``, in float64."""

    def __init__(self):
        self.total: dict[str, Tensor] = defaultdict(lambda: torch.zeros(1, dtype=torch.float64))
        self.place: dict[str, Tensor] = defaultdict(lambda: torch.zeros(1, dtype=torch.float64))

    def add(self, weights: Float[Tensor, "replicate row"], keep: Bool[Tensor, "row pos"], **values: Tensor) -> None:
        """Add values ``[row, pos, ...]`` at the tokens that are kept, with the weight of their row."""
        keep = keep.float()
        for name, value in {"n": keep, **values}.items():
            masked = value * keep.view(*keep.shape, *[1] * (value.ndim - 2))
            self.total[name] = self.total[name] + torch.tensordot(weights, masked.sum(1).cpu().double(), dims=1)
            if value.ndim == 2:
                self.place[name] = self.place[name] + masked.sum(0).cpu().double()

    def mean(self, name: str) -> Float[np.ndarray, " replicate"]:
        """Per token, over all positions."""
        return (self.total[name] / self.total["n"]).numpy()

    def mean_at(self, name: str) -> Float[np.ndarray, " pos"]:
        """Per token, at each position."""
        return (self.place[name] / self.place["n"]).numpy()


def bootstrap_weights(rows: int, replicates: int, draw: torch.Generator) -> Float[Tensor, "replicate row"]:
    """How often each row counts: once in replicate 0, Poisson(1) times in the others."""
    plain = torch.ones(rows, 1, dtype=torch.float64)
    # Drawn row by row, so that the batch size does not matter.
    resampled = torch.poisson(torch.ones(rows, replicates, dtype=torch.float64), generator=draw)
    return torch.cat([plain, resampled], dim=1).T


def cell_means(values: Float[np.ndarray, " prompt"], frame: pd.DataFrame) -> pd.DataFrame:
    """Mean of a per-prompt metric for each noun (rows) and century (columns) of a `Prompts.frame`."""
    return frame.assign(value=np.asarray(values)).pivot_table(index="noun", columns="century", values="value")


def bootstrap(
    cells: Float[np.ndarray, "noun century ..."], draws: int = 2000, seed: int = 0
) -> Float[np.ndarray, "draws ..."]:
    """Means over cells of ``draws`` resamples: nouns with replacement, and independently centuries with replacement.

    A factor with one level has no spread of its own, so the interval is only as wide as the other factor makes it.

    Raises:
        ValueError: a cell without a value.
    """
    cells = np.asarray(cells, dtype=float)
    if cells.ndim < 2 or not cells.size or np.isnan(cells).any():
        raise ValueError("the bootstrap needs a value for every noun in every century")
    generator = np.random.default_rng(seed)
    weights = [generator.multinomial(n, np.full(n, 1 / n), size=draws) / n for n in cells.shape[:2]]
    return np.einsum("bn,bc,nc...->b...", *weights, cells)


def interval(cells: pd.DataFrame, seed: int = 0) -> pd.Series:
    """``mean``, ``low`` and ``high`` of a table of `cell_means`: the bootstrap's percentile interval."""
    low, high = np.quantile(bootstrap(cells.to_numpy(), seed=seed), [0.025, 0.975])
    return pd.Series({"mean": float(cells.to_numpy().mean()), "low": low, "high": high})
