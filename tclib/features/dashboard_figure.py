"""The drawn half of a dashboard: histogram, tokens read and promoted, connections, heads, as one figure."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tclib.features.connect import strongest
from tclib.features.dashboard import Dashboard
from tclib.plots import NEGATIVE, POSITIVE, feature_name, heatmap

BARS = 7


def figure(d: Dashboard, names: Callable[[int, int], str] | None = None) -> Figure:
    """Six panels; the feature's name and how often it fires above them.

    Where the feature has no transcoder after it, the tokens on which it fires take the place of its outputs.

    Args:
        names: what to call feature ``(layer, feature)``, for example `Names.full`; ``mlp2[867]`` by default.
    """
    names = names or feature_name
    drawn, axes = plt.subplots(2, 3, figsize=(11.5, 6.8), layout="constrained")
    s = d.statistics
    often = f"fires on {s['frequency']:.3%} of" if s["count"] else "is silent on"
    drawn.suptitle(f"{_drawable(names(d.layer, d.feature))} {often} {s['tokens']:,} tokens")
    _histogram(d, axes[0, 0])
    _ends(d.de_embedding, "tokens that drive it directly", "de-embedding", axes[0, 1])
    _ends(d.logit_lens, "tokens it promotes and suppresses", "logit per unit of activation / scale", axes[0, 2])
    _connections(d.incoming, "strongest inputs", names, axes[1, 0])
    if d.outgoing.empty and len(d.top_tokens):
        best, title = d.top_tokens.head(2 * BARS), "tokens on which it fires"
        _bars([*map(repr, best["token"])], 100 * best["share"].to_numpy(), title, "% of its activations", axes[1, 1])
    else:
        _connections(d.outgoing, "strongest outputs", names, axes[1, 1])
    _heads(d, axes[1, 2])
    return drawn


def _histogram(d: Dashboard, ax: Axes) -> None:
    table = d.histogram
    if table.empty:
        return _nothing(ax, "it never fired on this text")
    ax.bar(table["low"], table["count"], table["high"] - table["low"], align="edge", color=POSITIVE, edgecolor="white")
    ax.set(title="how strongly, where it fires", xlabel="activation", ylabel="tokens")


def _ends(scores: pd.Series, title: str, unit: str, ax: Axes) -> None:
    whole = scores[[name.isprintable() and "\ufffd" not in name for name in scores.index]]  # no pieces of letters
    ends = pd.concat([whole.head(BARS), whole.tail(BARS)])
    _bars([repr(name) for name in ends.index], ends.to_numpy(), title, unit, ax)


def _connections(table: pd.DataFrame, title: str, names: Callable[[int, int], str], ax: Axes) -> None:
    weighted = table["target_weighted"].abs().sum() > 0
    by = "target_weighted" if weighted else "input_invariant"
    best = strongest(table, by, 2 * BARS)
    if best.empty:
        return _nothing(ax, "no transcoder on that side")
    named = [names(*source) for source in zip(best["layer"], best["feature"], strict=True)]
    unit = "expected attribution where the reader fires" if weighted else "input-invariant connection"
    _bars(named, best[by].to_numpy(), title, unit, ax)


def _bars(names: list[str], values: np.ndarray, title: str, unit: str, ax: Axes) -> None:
    ax.barh(range(len(names)), values, color=np.where(values > 0, POSITIVE, NEGATIVE))
    ax.set_yticks(range(len(names)), [_drawable(name) for name in names], fontsize=8)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.invert_yaxis()
    ax.set(title=title, xlabel=unit)


def _drawable(name: str) -> str:
    """Without mathematics, and without letters that matplotlib's own font lacks."""
    name = "".join(c if c < "\u0530" or c == "\ufffd" else ascii(c)[1:-1] for c in name)
    return name.replace("$", r"\$")


def _heads(d: Dashboard, ax: Axes) -> None:
    values = d.heads.to_numpy()
    heatmap(values, "what heads can bring", "head", "layer", "length read through OV, direct = 1", ax=ax)
    ax.set_yticks(range(len(d.heads)), d.heads.index)
    ax.set_xticks(range(0, values.shape[1], 1 + values.shape[1] // 12))
    ax.grid(False)


def _nothing(ax: Axes, why: str) -> None:
    ax.axis("off")
    ax.text(0.5, 0.5, why, ha="center", va="center")
