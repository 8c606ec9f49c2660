"""A circuit as a still picture that survives print: blue solid edges excite, orange dashed ones inhibit."""

from __future__ import annotations

import matplotlib.pyplot as plt
import networkx as nx
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from tclib.circuits.layout import label, layout
from tclib.plots import NEGATIVE, POSITIVE


def circuit_figure(circuit: nx.DiGraph, title: str, top: int = 30, ax: Axes | None = None) -> Axes:
    """Layers upwards, positions across; an edge's width grows with its magnitude. The title should state the finding.

    Args:
        top: how many nodes are drawn beside the target, largest |contribution| first.

    Raises:
        ValueError: ``top`` below 1.
    """
    plan = layout(circuit, top)
    if ax is None:
        width, height = (max(part) + 1 for part in zip(*plan.places.values(), strict=True))
        _, ax = plt.subplots(figsize=(min(14, max(6, 0.75 * width)), 0.8 * (height + 1) + 1.4), layout="constrained")
    edges = [(s, r, w) for s, r, w in circuit.edges(data="weight") if s in plan.places and r in plan.places]
    largest = max((abs(weight) for *_, weight in edges), default=1.0)
    for source, reader, weight in sorted(edges, key=lambda edge: abs(edge[2])):
        share = abs(weight) / largest
        style = {
            "arrowstyle": "-",
            "color": POSITIVE if weight > 0 else NEGATIVE,
            "linestyle": "-" if weight > 0 else (0, (4, 2)),
            "linewidth": 0.5 + 4.5 * share,
            "alpha": 0.35 + 0.6 * share,
            "shrinkA": 7,
            "shrinkB": 7,
            "connectionstyle": "arc3,rad=0.08",
        }
        ax.annotate("", plan.places[reader], plan.places[source], arrowprops=style)
    for name, (x, y) in plan.places.items():
        ax.text(x, y, label(name, circuit.nodes[name]), ha="center", va="center", fontsize=7.5, zorder=3, bbox=_BOX)
    ax.set(title=title, xlabel=_wrapped("token and position", plan.footnote), ylabel="layer")
    ax.set_xticks([x for x, _ in plan.columns], [name for _, name in plan.columns], fontsize=8)
    ax.set_yticks([y for y, _ in plan.rows], [name for _, name in plan.rows])
    ax.set_xlim(-0.4, max(x for x, _ in plan.places.values()) + 0.9)
    ax.set_ylim(-0.6, max(y for _, y in plan.places.values()) + 0.6)
    ax.grid(False)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    keys = [
        Line2D([], [], color=POSITIVE, linestyle="-", linewidth=2, label=f"excites (widest: {largest:.2f})"),
        Line2D([], [], color=NEGATIVE, linestyle="--", linewidth=2, label="inhibits"),
    ]
    ax.legend(handles=keys, loc="upper left", fontsize=8)
    return ax


_BOX = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "0.4", "linewidth": 0.8}


def _wrapped(first: str, second: str) -> str:
    return f"{first}\n({second})" if second else first
