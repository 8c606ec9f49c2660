"""How sure a number is: over rows of text by bootstrap, over training seeds by Student's t."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

# Student's t at 97.5% for n - 1 degrees of freedom, by number of seeds n.
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def over_rows(table: pd.DataFrame, by: Sequence[str], level: float = 0.95) -> pd.DataFrame:
    """Each number with its percentile interval over bootstrap replicates of the rows (Efron 1979).

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
    tail = (1 - level) / 2
    bounds = {"low": resampled.quantile(tail), "high": resampled.quantile(1 - tail)}
    return (
        pd.DataFrame({"value": value, **bounds})
        .dropna()
        .loc[lambda t: value.index[value.index.isin(t.index)]]
        .reset_index()
    )


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
        raise ValueError(f"an interval over seeds needs 2 to 10 of them, but there are {result['seeds'].min()}")
    half = result["seeds"].map(T_975) * result.pop("spread") / np.sqrt(result["seeds"])
    result.insert(2 if len(by) == 1 else len(by) + 1, "low", result["value"] - half)
    result.insert(result.columns.get_loc("low") + 1, "high", result["value"] + half)
    return result


def shown(table: pd.DataFrame, digits: int = 3) -> pd.Series:
    """``value [low, high]`` as text, for display."""
    parts = (table[c].map(f"{{:.{digits}f}}".format) for c in ("value", "low", "high"))
    value, low, high = parts
    return value + " [" + low + ", " + high + "]"
