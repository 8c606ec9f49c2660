"""Static views: figures that survive GitHub, print and a reader who runs nothing."""

from __future__ import annotations

import html
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes

# Two of Okabe and Ito's colours that stay apart for every kind of colour blindness; sign is also told by direction.
POSITIVE, NEGATIVE = "#0072B2", "#D55E00"


def feature_name(layer: int, feature: int) -> str:
    """``mlp2[107]``: a feature by the layer of its MLP and its number."""
    return f"mlp{layer}[{feature}]"


def source_names(table: pd.DataFrame) -> list[str]:
    """One name per row of an attribution table, in the paper's notation: ``mlp1[207]``, ``attn2.h3 @4 ' 17'``."""
    names = []
    for row in table.itertuples():
        place = f"@{row.position} {row.token!r}"
        names.append(
            {
                "feature": f"mlp{row.layer}[{row.feature}]",
                "head": f"attn{row.layer}.h{row.head} {place}",
                "error": f"mlp{row.layer} error",
                "skip": f"mlp{row.layer} skip path",
                "mlp": f"mlp{row.layer} (no transcoder)",
                "transcoder_bias": f"mlp{row.layer} bias",
                "attention_bias": f"attn{row.layer} output bias",
                "value_bias": f"attn{row.layer}.h{row.head} value bias",
                "norm_bias": "LayerNorm bias",
                "query_bias": f"attn{row.layer}.h{row.head} query bias",
                "key_bias": f"attn{row.layer}.h{row.head} key bias",
                "remainder": "all others",
                "target_bias": "the target's own bias",
                "embedding": f"embedding {place}",
                "position": f"position {row.position}",
            }[str(row.kind)]
        )
    return names


def contribution_bars(table: pd.DataFrame, title: str, top: int = 12, ax: Axes | None = None) -> Axes:
    """The ``top`` largest contributions and the sum of the rest: inhibiting to the left, exciting to the right.

    The title should state the finding. The unit is that of the target (a pre-activation or a logit).
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(7, 0.3 * top + 1.2), layout="constrained")
    head, rest = table.head(top), table.iloc[top:]
    names = source_names(head) + [f"{len(rest)} other sources"]
    values = np.append(head["contribution"].to_numpy(float), rest["contribution"].sum())
    ax.barh(names, values, color=np.where(values > 0, POSITIVE, NEGATIVE), hatch=[""] * len(head) + ["///"])
    ax.axvline(0, color="black", linewidth=0.8)
    ax.invert_yaxis()
    ax.set_xlabel(f"contribution to {table.attrs.get('target', 'the target')}")
    ax.set_title(title)
    return ax


def highlighted(tokens: Sequence[str], activations: Sequence[float], largest: float | None = None) -> str:
    """Tokens as inline-styled HTML, darker where the activation is larger; the number is in the tooltip.

    Args:
        tokens: the text.
        activations: one value >= 0 per token.
        largest: the activation shown darkest; the largest one given by default.

    Raises:
        ValueError: the two lengths differ.
    """
    if len(tokens) != len(activations):
        raise ValueError(f"{len(tokens)} tokens but {len(activations)} activations")
    largest = max(largest or max(activations, default=0.0), 1e-12)
    spans = []
    for token, value in zip(tokens, activations, strict=True):
        strength = min(float(value) / largest, 1.0)
        weight = "bold" if strength > 0.5 else "normal"
        spans.append(
            f'<span title="{value:.2f}" style="background-color: rgba(230, 159, 0, {0.85 * strength:.2f}); '
            f'font-weight: {weight}">{html.escape(token)}</span>'
        )
    return '<div style="font-family: monospace; line-height: 1.7">' + "".join(spans) + "</div>"


def heatmap(
    values: Float[np.ndarray, "row column"],
    title: str,
    xlabel: str,
    ylabel: str,
    unit: str,
    extent: tuple[float, float, float, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A matrix as an image with a labelled colour bar; diverging around 0 if it holds both signs."""
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 4.5), layout="constrained")
    both_signs = values.min() < 0 < values.max()
    limit = np.abs(values).max()
    image = ax.imshow(
        values,
        cmap="RdBu_r" if both_signs else "viridis",
        vmin=-limit if both_signs else None,
        vmax=limit if both_signs else None,
        aspect="auto",
        origin="upper",
        extent=extent,
        interpolation="nearest",
    )
    ax.figure.colorbar(image, ax=ax, label=unit)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return ax
