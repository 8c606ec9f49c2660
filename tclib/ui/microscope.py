"""A prompt under the microscope: which features are active at each token of each layer, and what they write."""

from __future__ import annotations

import html
from typing import Any

import ipywidgets as w
import pandas as pd

from tclib.connections import logit_lens
from tclib.plots import feature_name, highlighted
from tclib.replacement_model import ReplacementModel, joined
from tclib.tracing import Trace, trace
from tclib.ui.base import Explorer, prompt_field, replace_options
from tclib.ui.markup import FAINT, LINE, TEXT, bars, paper, shown
from tclib.ui.selected import Selected

TOP = 6  # tokens promoted, and as many suppressed


def grid(trace: Trace) -> pd.DataFrame:
    """Every token of every layer: ``layer``, ``position``, ``token``, ``active`` (features), ``strongest``, its
    ``activation``; the last two are empty where nothing is active."""
    rows = []
    for layer, z in trace.features.items():
        counts, (largest, which) = (z > 0).sum(1).tolist(), z.max(1)
        for position, token in enumerate(trace.token_strings):
            best, value = (
                (int(which[position]), largest[position].item()) if counts[position] else (pd.NA, float("nan"))
            )
            rows.append((layer, position, token, counts[position], best, value))
    table = pd.DataFrame(rows, columns=["layer", "position", "token", "active", "strongest", "activation"])
    return table.astype({"strongest": "Int64"})


def writes(trace: Trace, layer: int, feature: int, position: int = -1) -> pd.Series:
    """What an active feature adds to the next token's logits on the direct path: activation / scale times its logit
    lens, in logits above the mean. By token string, largest first."""
    position, feature = trace.position(position), trace.feature(layer, feature)
    weight = trace.features[layer][position, feature] / trace.scale("final", 0)[position]
    return (logit_lens(trace, layer, feature) * weight.item()).rename("logit")


def grid_html(table: pd.DataFrame, layer: int, position: int) -> str:
    """Layers upwards, tokens across; a cell holds how many features are active, and a frame marks the chosen one."""
    cell = "padding: 2px 6px; text-align: center; border: 1px solid"
    wide = table.pivot(index="layer", columns="position", values="active").sort_index(ascending=False)
    tokens = table.drop_duplicates("position").set_index("position")["token"]
    largest = max(int(table["active"].max()), 1)
    lines = []
    for at, row in wide.iterrows():
        cells = [f'<th scope="row" style="{cell} transparent; color: {TEXT}">mlp{at}</th>']
        for where, count in row.items():
            chosen = (at, where) == (layer, position)
            frame = f"{TEXT}; outline: 2px solid {TEXT}; font-weight: bold" if chosen else LINE
            back = f"rgba(0, 114, 178, {0.5 * count / largest:.2f})"
            # The grid is made anew, and so begins at its left end again: bring the chosen cell into view.
            mark = _INTO_VIEW if chosen else ""
            cells.append(f'<td style="{cell} {frame}; background: {back}; color: {TEXT}">{count}{mark}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    names = "".join(
        f'<th scope="col" style="{cell} transparent; color: {TEXT}; font-family: monospace; white-space: pre">'
        f"{html.escape(shown(token))}<br>{where}</th>"
        for where, token in tokens.items()
    )
    lines.append(f'<tr><td style="{cell} transparent"></td>{names}</tr>')
    told = f'<caption style="text-align: left; color: {FAINT}">active features by layer and token</caption>'
    style = "border-collapse: collapse; font-size: 12px; line-height: 1.3"
    # Contained, it takes the width that there is, and scrolls; a widget would grow with it and be cut off.
    body = f'<table style="{style}">{told}{"".join(lines)}</table>'
    return f'<div style="overflow-x: auto; contain: inline-size">{body}</div>'


def feature_html(trace: Trace, layer: int, feature: int, position: int) -> str:
    """Where in the prompt a feature is active, and which next tokens it pushes up and down from here."""
    z = trace.features[layer][:, trace.feature(layer, feature)].tolist()
    scores = writes(trace, layer, feature, position)
    ends = pd.concat([scores.head(TOP), scores.tail(TOP)])
    rows = [(shown(str(token)), value) for token, value in ends.items()]
    where = f"{feature_name(layer, feature)} at {position} {shown(trace.token_strings[position])}"
    strip = paper(highlighted(trace.token_strings, z))
    return f"{strip}{bars(rows, f'what {where} writes to the next token', 'logits on the direct path')}"


_INTO_VIEW = (
    '<span style="animation: tclib-shown 1ms" onanimationstart="const cell = this.parentElement, '
    "frame = cell.closest('div'); frame.scrollLeft = cell.offsetLeft - frame.clientWidth / 2\"></span>"
)


class Microscope(Explorer):
    """A token and a layer are chosen with sliders, a feature from the list of those that are active there."""

    def __init__(
        self,
        replacement: ReplacementModel,
        prompt: str,
        selected: Selected | None = None,
    ):
        self.replacement = joined(replacement)
        self.prompt = prompt_field(prompt)
        self.token: Any = w.SelectionSlider(options=[("0", 0)], description="token", layout=w.Layout(width="360px"))
        layers = [(f"mlp{layer}", layer) for layer in sorted(replacement.transcoders)]
        self.layer: Any = w.Dropdown(options=layers, value=max(replacement.transcoders), description="layer")
        self.feature: Any = w.Select(description="active here", rows=14, layout=w.Layout(width="300px"))
        self.overview, self.detail = w.HTML(layout=w.Layout(width="100%")), w.HTML(layout=w.Layout(flex="1 1 420px"))
        super().__init__(
            "Prompt microscope",
            [(self.prompt,), (self.token, self.layer)],
            [self.overview, self.feature, self.detail],
            selected,
        )
        self.watch(self._read, self.prompt)
        self.watch(self._look, self.token, self.layer)
        self.watch(self._choose, self.feature)
        self.follow(lambda: (self.layer.value, self.feature.value), self._follow)
        self.start(self._read)

    def _read(self) -> str:
        self.trace = trace(self.replacement, self.prompt.value)
        self.cells = grid(self.trace)
        self.token.options = [(f"{at}  {shown(token)}", at) for at, token in enumerate(self.trace.token_strings)]
        self.token.value = len(self.trace.tokens) - 1
        return self._look()

    def _look(self) -> str:
        layer, position = self.layer.value, self.token.value
        self.overview.value = grid_html(self.cells, layer, position)
        active = self.trace.active(position).query("layer == @layer")
        options = [(f"[{f}]  {a:.2f}", f) for f, a in zip(active["feature"], active["activation"], strict=True)]
        replace_options(self.feature, options)
        return self._focus()

    def _choose(self) -> str:
        if self.feature.value is not None:
            self.choose(self.layer.value, self.feature.value)
        return self._focus()

    def _follow(self) -> str:
        layer, feature = self.selected.feature
        name, position = feature_name(layer, feature), self.token.value
        if not self.trace.features[layer][position, feature]:
            return f"{name} was chosen in another explorer; it is silent at {position}."
        self.layer.value = layer
        self._look()
        self.feature.value = feature
        return f"{name} was chosen in another explorer. {self._focus()}"

    def _focus(self) -> str:
        layer, position, token = self.layer.value, self.token.value, self.trace.token_strings[self.token.value]
        count, of = len(self.feature.options), self.replacement.transcoders[layer].config.d_features
        said = f"{count} of {of} features of layer {layer} are active at {position} {shown(token)}."
        if self.feature.value is None:
            self.detail.value = ""
            return said
        self.detail.value = feature_html(self.trace, layer, self.feature.value, position)
        return said
