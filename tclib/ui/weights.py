"""Which earlier features drive a feature: by the weights alone (the pullback), beside what a text makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets as w
import pandas as pd
from matplotlib.figure import Figure

from tclib.connections import overlap
from tclib.features.connect import incoming, strongest
from tclib.features.feature_activations import FeatureActivations
from tclib.features.index import Index
from tclib.plots import NEGATIVE, POSITIVE, feature_name
from tclib.transcoder import Transcoder
from tclib.ui.base import Explorer, whole_number
from tclib.ui.markup import bars, picture
from tclib.ui.selected import Selected

KS = (1, 2, 5, 10, 20, 50, 100, 200)
WEIGHTED = {"target-weighted": "target_weighted", "mean input x gradient": "input_x_gradient"}
TOP = 10


def rankings(fired: FeatureActivations, transcoders: Mapping[int, Transcoder], source: int) -> pd.DataFrame:
    """All features of layer ``source`` as sources of one later feature on the direct path, by feature index:
    ``input_invariant`` (the pullback), ``input_x_gradient``, ``target_weighted`` (NaN if it never fired).

    Raises:
        ValueError: layers in the wrong order or without a transcoder.
    """
    layer = fired.layer
    if not {layer, source} <= transcoders.keys() or source >= layer:
        raise ValueError(f"layers {source} and {layer}: the source comes first, and both need a transcoder")
    pair = {source: transcoders[source], layer: transcoders[layer]}
    return incoming(fired, pair).set_index("feature").drop(columns="layer")


def agreement(table: pd.DataFrame, by: str, ks: Sequence[int] = KS) -> pd.DataFrame:
    """How many of the k most exciting sources both rankings share: ``k``, ``overlap``, ``chance``."""
    return overlap(table["input_invariant"], table[by], [k for k in ks if k <= len(table)])


def overlap_figure(table: pd.DataFrame, title: str) -> Figure:
    """The overlap of the first k for every k, and what two random rankings would share."""
    figure = Figure(figsize=(4.2, 2.9), dpi=90, layout="none")  # pyright: ignore[reportArgumentType]
    ax = figure.subplots()
    figure.subplots_adjust(left=0.14, right=0.97, top=0.86, bottom=0.18)
    ax.plot(table["k"], table["overlap"], color=POSITIVE, marker="o", label="weights and text")
    ax.plot(table["k"], table["chance"], color=NEGATIVE, marker="x", linestyle="--", label="by chance")
    ax.set(xscale="log", ylim=(-0.03, 1.03), xlabel="first k sources", ylabel="share in common")
    ax.set_title(title, fontsize=10)
    ax.set_xticks(table["k"], table["k"].astype(str))
    ax.minorticks_off()
    ax.legend(fontsize=8)
    return figure


class Weights(Explorer):
    """A feature by layer and number, a source layer, and one of the two weightings by text."""

    def __init__(
        self,
        transcoders: Mapping[int, Transcoder],
        index: Index,
        layer: int,
        feature: int,
        selected: Selected | None = None,
    ):
        self.transcoders, self.index = transcoders, index
        layers = sorted(transcoders)
        if len(layers) < 2:
            raise ValueError("connections between features need transcoders of at least two layers")
        short = w.Layout(width="200px")
        self.layer: Any = w.Dropdown(options=layers[1:], value=layer, description="layer", layout=short)
        self.feature = w.Text(str(feature), description="feature", continuous_update=False, layout=short)
        self.source: Any = w.Dropdown(options=[a for a in layers if a < layer], description="sources in", layout=short)
        self.source.value = max(self.source.options)
        self.by: Any = w.ToggleButtons(options=WEIGHTED, description="by text:", style={"button_width": "auto"})
        self.invariant, self.weighted, self.curve = w.HTML(), w.HTML(), w.HTML()
        controls = [(self.layer, self.feature, self.source), (self.by,)]
        super().__init__("Weights explorer", controls, [self.invariant, self.weighted, self.curve], selected)
        self.watch(self._other_layer, self.layer)
        self.watch(self._choose, self.feature)
        self.watch(self._show, self.source, self.by)
        self.follow(lambda: self._shown, self._follow)
        self.start(self._show)

    def _other_layer(self) -> str:
        self.source.options = [layer for layer in sorted(self.transcoders) if layer < self.layer.value]
        self.source.value = max(self.source.options)
        return self._show()

    def _choose(self) -> str:
        said = self._show()
        self.choose(*self._shown)
        return said

    def _follow(self) -> str:
        layer, feature = self.selected.feature
        if layer not in self.layer.options:
            name = feature_name(layer, feature)
            return f"{name} was chosen in another explorer; no earlier layer has features to drive it."
        self.layer.value, self.feature.value = layer, str(feature)
        return self._other_layer()

    def _show(self) -> str:
        layer, source, by = self.layer.value, self.source.value, self.by.value
        feature = whole_number(self.feature.value, "feature", self.index.n_features(layer))
        fired = FeatureActivations(self.index, layer, feature)
        table = rankings(fired, self.transcoders, source)
        self._shown = (layer, feature)
        name = feature_name(layer, feature)
        self.invariant.value = _ranked(table, "input_invariant", source, f"{name} by weights alone")
        if not fired.count:
            self.weighted.value = self.curve.value = ""
            return f"{name} never fired on the {self.index.n_tokens:,} tokens of this text: only its weights speak."
        self.weighted.value = _ranked(table, by, source, f"{name} by text")
        shared = agreement(table, by)
        at = shared[shared["k"] <= 20].iloc[-1]
        title = f"{at.overlap:.0%} of the first {at.k:.0f} in common"
        told = ", ".join(f"{row.overlap:.2f} of the first {row.k}" for row in shared.itertuples())
        self.curve.value = picture(overlap_figure(shared, title), f"share in common: {told}", 378)
        fired_on = f"{name} fired on {fired.count:,} of {self.index.n_tokens:,} tokens"
        return f"{fired_on}; {title} (by chance {at.chance:.1%})."


def _ranked(table: pd.DataFrame, by: str, source: int, caption: str) -> str:
    best = strongest(table.reset_index(), by, TOP)
    names = [feature_name(source, feature) for feature in best["feature"]]
    return bars(list(zip(names, best[by], strict=True)), caption, by.replace("_", " "))
