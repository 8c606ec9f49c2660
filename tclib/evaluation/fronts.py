"""Comparisons at equal sparsity: the front of a method, read at one L0 by interpolation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float


def at_l0(
    front: pd.DataFrame, l0: float | Sequence[float], by: Sequence[str], column: str = "ce_increase"
) -> pd.DataFrame:
    """Each front read at the given L0: ``column``, linear in log L0 between the two nearest points.

    Args:
        front: points with ``l0`` and ``column``; ``by`` names the fronts, for example ``["layer", "name", "seed"]``.

    Returns:
        ``by``, ``l0``, ``column``; NaN where a front does not reach that L0: nothing is extrapolated.

    Raises:
        ValueError: an L0 that is not positive.
    """
    wanted = np.atleast_1d(np.asarray(l0, dtype=float))
    if (wanted <= 0).any() or (front["l0"] <= 0).any():
        raise ValueError("L0 must be positive: a dictionary that never fires has no place on a front")
    tables = []
    for name, curve in front.groupby(list(by), sort=False):
        curve = curve.sort_values("l0")
        values = np.interp(np.log(wanted), np.log(curve["l0"]), curve[column], left=np.nan, right=np.nan)
        tables.append(pd.DataFrame([name] * len(wanted), columns=list(by)).assign(l0=wanted, **{column: values}))
    return pd.concat(tables, ignore_index=True)


def shared_l0(front: pd.DataFrame, name: str = "name", points: int = 5) -> Float[np.ndarray, " point"]:
    """``points`` values of L0, evenly spaced in log L0, over the range that all fronts called ``name`` reach.

    Raises:
        ValueError: there is no such range.
    """
    reach = front.groupby(name)["l0"].agg(["min", "max"])
    low, high = reach["min"].max(), reach["max"].min()
    if not low < high:
        raise ValueError(f"the fronts share no L0: {reach.round(1).to_dict('index')}; train more penalties")
    return np.geomspace(low, high, points)


def gap(front: pd.DataFrame, one: str, other: str, by: Sequence[str], column: str = "ce_increase") -> pd.DataFrame:
    """Mean difference of ``column`` between two fronts over the L0 both reach; below 0 favours ``one``.

    ``by`` names what is compared with itself, for example ``["layer", "seed"]``: the same text, the same seed.
    """
    records = []
    for key, part in front[front["name"].isin([one, other])].groupby(list(by), sort=False):
        read = at_l0(part, shared_l0(part).tolist(), ["name"], column).pivot(index="l0", columns="name", values=column)
        records.append(dict(zip(by, key, strict=True)) | {"gap": (read[one] - read[other]).mean()})
    return pd.DataFrame(records)


def undominated(front: pd.DataFrame, columns: Sequence[str] = ("l0", "fvu")) -> Bool[np.ndarray, " row"]:
    """Which points no other point beats: at most as large in all ``columns``, and smaller in one (Pareto).

    Returns:
        One bool per row; equal points do not beat each other, and NaN is never undominated.
    """
    values = front[list(columns)].to_numpy(dtype=float)
    at_most = (values[:, None] <= values[None]).all(-1)  # [i, j]: i is nowhere larger than j
    smaller = (values[:, None] < values[None]).any(-1)
    return np.logical_not((at_most & smaller).any(0) | np.isnan(values).any(1))
