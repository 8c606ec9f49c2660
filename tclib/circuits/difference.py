"""What changed between two circuits: of two prompts, or of two checkpoints on one prompt."""

from __future__ import annotations

import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from tclib.plots import NEGATIVE, POSITIVE


def diff(before: nx.DiGraph, after: nx.DiGraph) -> pd.DataFrame:
    """Edges of both circuits side by side; an edge that one circuit does not list is zero there.

    The two targets are taken for each other whatever their names. Nodes are compared by name, position included.

    Returns:
        ``source``, ``reader``, ``before``, ``after``, ``change`` and ``only_in`` (before, after or empty); largest
        |change| first. The changes of the edges into the target sum to the change of the target's value.
    """
    weights = [_edges(circuit) for circuit in (before, after)]
    rows = []
    for source, reader in weights[0] | weights[1]:
        old, new = (side.get((source, reader)) for side in weights)
        only = "after" if old is None else "before" if new is None else ""
        old, new = old or 0.0, new or 0.0
        rows.append((source, reader, old, new, new - old, only))
    table = pd.DataFrame(rows, columns=["source", "reader", "before", "after", "change", "only_in"])
    return table.sort_values("change", key=abs, ascending=False, ignore_index=True, kind="stable")


def diff_figure(table: pd.DataFrame, title: str, names: tuple[str, str], top: int = 12, ax: Axes | None = None) -> Axes:
    """The ``top`` largest changes of a `diff`: an arrow from each edge's weight before to its weight after."""
    table = table.head(top)
    if ax is None:
        _, ax = plt.subplots(figsize=(8, 0.32 * len(table) + 1.4), layout="constrained")
    heights = np.arange(len(table))
    colors = np.where(table["change"] > 0, POSITIVE, NEGATIVE).tolist()
    ax.hlines(heights, table["before"], table["after"], colors=colors, linewidth=2)
    ax.scatter(table["before"], heights, facecolors="white", edgecolors=colors, zorder=3, label=names[0])
    ax.scatter(table["after"], heights, c=colors, marker="D", zorder=3, label=names[1])
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(heights, [f"{s} to {r}" for s, r in zip(table["source"], table["reader"], strict=True)], fontsize=8)
    ax.invert_yaxis()
    ax.set(title=title, xlabel="contribution along the edge")
    ax.legend(loc="best", fontsize=8)
    return ax


def _edges(circuit: nx.DiGraph) -> dict[tuple[str, str], float]:
    names = {name: "target" if kind == "target" else name for name, kind in circuit.nodes(data="kind")}
    return {(names[s], names[r]): weight for s, r, weight in circuit.edges(data="weight")}
