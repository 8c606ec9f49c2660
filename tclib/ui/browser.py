"""The feature browser: features by token, label, frequency or similarity, and what is known of the chosen one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ipywidgets as w
import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

from tclib.connections import logit_lens
from tclib.features.feature_activations import FeatureActivations
from tclib.features.index import Index
from tclib.features.search import by_similarity
from tclib.features.summary import Summary
from tclib.inputs import bos_id, feature_of, whole
from tclib.model import token_strings
from tclib.plots import feature_name, highlighted
from tclib.replacement_model import ReplacementModel, joined
from tclib.tracing import Trace, trace
from tclib.transcoder import Transcoder
from tclib.ui.base import Explorer, replace_options, whole_number
from tclib.ui.markup import TEXT, bars, in_one_line, paper, shown

if TYPE_CHECKING:
    from tclib.ui.selected import Selected

WAYS = ("frequency", "token", "label", "similarity")
MOST = 200  # features listed
BEFORE, AFTER = 14, 5  # tokens of an example's context
BINS = 12  # of a histogram
TOP = 6  # tokens promoted, and as many suppressed


def of_layer(summary: Summary, layer: int) -> pd.DataFrame:
    """The features of a layer by index, dead ones too. Raises ValueError for a layer that the summary lacks."""
    table = summary.features[summary.features["layer"] == layer]
    if table.empty:
        known = sorted(summary.features["layer"].unique().tolist())
        raise ValueError(f"layer {layer} is not in this summary, which has layers {known}")
    return table.set_index("feature")


def by_frequency(summary: Summary, layer: int, low: float = 0.0, high: float = 1.0) -> pd.DataFrame:
    """Features that fire on this share of tokens, the most frequent first."""
    table = of_layer(summary, layer)
    inside = table[table["frequency"].between(low, high)].sort_values("frequency", ascending=False, kind="stable")
    return _found(inside, f"fires on {low:.3%} to {high:.3%} of tokens: widen the range")


def by_token(model: TransformerBridge, summary: Summary, layer: int, text: str) -> pd.DataFrame:
    """Features that fire on this token more than on any other, largest ``token_share`` first.

    A word is looked up with a space before it too, as it stands inside a sentence.
    """
    if not text.strip():
        raise ValueError("the search is empty: type a token, for example 'war'")
    ids = [
        ids[0] for t in (text, f" {text}") if len(ids := model.tokenizer(t, add_special_tokens=False).input_ids) == 1
    ]
    if not ids:
        pieces = [model.tokenizer.decode([i]) for i in model.tokenizer(text, add_special_tokens=False).input_ids]
        raise ValueError(f"{text!r} is several tokens: search for one of {pieces}")
    table = of_layer(summary, layer)
    found = table[table["token"].isin(ids)].sort_values("token_share", ascending=False, kind="stable")
    return _found(found, f"fires mostly on {text!r}: try another token or layer")


def by_label(summary: Summary, layer: int, text: str) -> pd.DataFrame:
    """Features whose firing predicts a label of this name (or with this in its name) best, largest ``f1`` first."""
    if not text.strip():
        raise ValueError("the search is empty: type a part of a label's name")
    table = of_layer(summary, layer)
    if table["label"].isna().all():
        raise ValueError("this summary has no labels: its text was not labelled")
    found = table[table["label"].str.contains(text, regex=False, na=False)]
    names = ", ".join(table["label"].dropna().unique()[:5])
    found = found.sort_values("f1", ascending=False, kind="stable")
    return _found(found, f"has a label with {text!r} in its name: there are {names}, ...")


def similar(
    transcoders: Mapping[int, Transcoder], summary: Summary, layer: int, feature: int, k: int = 20
) -> pd.DataFrame:
    """Features that write in the most similar direction, with their ``cosine``."""
    table = of_layer(summary, layer)
    feature = feature_of(transcoders, layer, feature)
    near = by_similarity(transcoders[layer], feature, k).set_index("feature")["cosine"]
    return table.loc[near.index].assign(cosine=near)


def examples(model: TransformerBridge, summary: Summary, layer: int, feature: int) -> pd.DataFrame:
    """The examples of a feature in their context: ``band`` (0: strongest), ``activation``, ``tokens``, ``centre``."""
    feature = whole("feature", feature, len(of_layer(summary, layer)), f"layer {layer}")
    chosen = summary.examples.query("layer == @layer and feature == @feature")
    rows = []
    for e in chosen.to_dict("records"):
        start = max(0, e["position"] - BEFORE)
        ids = summary.tokens[e["row"], start : e["position"] + AFTER + 1].astype(int)
        rows.append((e["band"], e["activation"], token_strings(model, torch.tensor(ids)), e["position"] - start))
    return pd.DataFrame(rows, columns=["band", "activation", "tokens", "centre"])


def card(traced: Trace, summary: Summary | None, layer: int, feature: int, index: Index | None = None) -> str:
    """A feature as HTML: how often it fires and on what, examples of all strengths, and what it promotes.

    Args:
        traced: of any prompt; only its weights are read.
        summary: None shows what the weights say alone.
        index: where a histogram of the feature's activations is read; None shows none.

    Raises:
        ValueError: no such feature.
    """
    features = traced.transcoders[traced.layer(layer, with_transcoder=True)].config.d_features
    feature = whole("feature", feature, features, f"layer {layer}")
    lens = logit_lens(traced, layer, feature)
    ends = pd.concat([lens.head(TOP), lens.tail(TOP)])
    promoted = bars([(shown(str(t)), v) for t, v in ends.items()], "tokens it promotes and suppresses", "logit lens")
    told = "" if summary is None else _told(traced.model, of_layer(summary, layer).iloc[feature], summary)
    head = f'<div style="color: {TEXT}; line-height: 1.4"><b>{feature_name(layer, feature)}</b> {told}</div>'
    seen = "" if summary is None else _examples(traced.model, summary, layer, feature)
    strength = "" if index is None else histogram_html(FeatureActivations(index, layer, feature))
    return f'{head}{seen}<div style="display: flex; flex-wrap: wrap">{promoted}{strength}</div>'


def histogram_html(fired: FeatureActivations) -> str:
    """How often a feature fires how strongly on the text of an index, as a table with bars."""
    if not fired.count:
        return ""
    table = fired.histogram(BINS)
    rows = [(f"{row['low']:.2f} to {row['high']:.2f}", float(row["count"])) for row in table.to_dict("records")]
    return bars(rows, f"its activations on {fired.index.n_tokens:,} tokens", "tokens", digits=0)


def _examples(model: TransformerBridge, summary: Summary, layer: int, feature: int) -> str:
    found = examples(model, summary, layer, feature)
    if found.empty:
        return ""
    largest, bands = found["activation"].max(), int(found["band"].max())
    lines = []
    for e in found.to_dict("records"):
        marked = [0.0] * len(e["tokens"])
        marked[e["centre"]] = e["activation"]
        name = "strongest" if e["band"] == 0 else f"band {e['band']} of {bands}"
        text = highlighted(in_one_line(e["tokens"]), marked, largest)
        cell = "color: black; padding: 0 6px; vertical-align: top"
        first = f"{cell}; text-align: left; font-weight: normal; white-space: nowrap"
        lines.append(
            f'<tr><th scope="row" style="{first}">{name}</th>'
            f'<td style="{cell}; text-align: right">{e["activation"]:.2f}</td><td style="{cell}">{text}</td></tr>'
        )
    told = (
        "Examples; the token it fired on is marked, darker where it fired more strongly. Strongest: the largest "
        f"activations of all. Bands: all its activations by strength, cut into {bands} parts of equal number, band 1 "
        f"the strongest and band {bands} the weakest; from each some are drawn at random."
    )
    style = "text-align: left; padding: 2px 6px"
    body = f'<table style="font-size: 12px"><caption style="{style}">{told}</caption>{"".join(lines)}</table>'
    return paper(body)


def _told(model: TransformerBridge, row: pd.Series, summary: Summary) -> str:
    tokens = summary.about["tokens"]
    if not row["count"]:
        return f"never fired on the {tokens:,} tokens of the summary; what follows is read from its weights alone."
    most = shown(token_strings(model, torch.tensor([int(row["token"])]))[0])
    parts = [
        f"fired on {row['count']:,} of {tokens:,} tokens ({row['frequency']:.3%}), at most {row['max']:.2f}",
        f"most often on {most} ({row['token_share']:.0%})",
    ]
    if isinstance(row["label"], str):
        parts.append(f"its firing predicts the label {row['label']!r} best (F1 {row['f1']:.2f})")
    return "; ".join(parts) + "."


def _found(table: pd.DataFrame, nothing: str) -> pd.DataFrame:
    if table.empty:
        raise ValueError(f"no feature of this layer {nothing}")
    return table


class Browser(Explorer):
    """A way to search, what to search for, the list that fits, and the chosen feature's card."""

    def __init__(
        self,
        replacement: ReplacementModel,
        summary: Summary,
        index: Index | None = None,
        selected: Selected | None = None,
    ):
        self.index = index
        if selected:  # which may have been made before there was a summary
            selected.summary, selected.index = summary, index
        self.replacement, self.summary = joined(replacement), summary
        self.traced = trace(replacement, torch.tensor([bos_id(replacement.model) or 0]))
        short = w.Layout(width="200px")
        layers = sorted(replacement.transcoders)
        self.layer: Any = w.Dropdown(options=layers, value=layers[-1], description="layer", layout=short)
        self.by: Any = w.ToggleButtons(options=WAYS, description="search by", style={"button_width": "auto"})
        self.query = w.Text(
            "",
            description="for",
            placeholder="a token or a label",
            continuous_update=False,
            layout=w.Layout(width="280px"),
        )
        powers = [("0", 0.0), *((f"1/{10**n:,}" if n else "1", 10.0**-n) for n in range(5, -1, -1))]
        self.range: Any = w.SelectionRangeSlider(
            options=powers, index=(0, len(powers) - 1), description="share", continuous_update=False
        )
        self.number = w.Text("0", description="feature", continuous_update=False, layout=short)
        self.list: Any = w.Select(description="found", rows=18, layout=w.Layout(width="330px"))
        self.card = w.HTML(layout=w.Layout(flex="1 1 480px"))
        controls = [(self.by, self.layer), (self.query, self.range, self.number)]
        super().__init__("Feature browser", controls, [self.list, self.card])
        self.selected = selected  # its card would be a second one here
        self.watch(self._search, self.layer, self.by, self.query, self.range)
        self.watch(self._number, self.number)
        self.watch(self._choose, self.list)
        self.follow(lambda: self._shown, self._follow)
        self.start(self._search)

    def found(self) -> pd.DataFrame:
        """The features that fit the controls."""
        layer, by = self.layer.value, self.by.value
        if by == "frequency":
            return by_frequency(self.summary, layer, *self.range.value)
        if by == "token":
            return by_token(self.replacement.model, self.summary, layer, self.query.value)
        if by == "label":
            return by_label(self.summary, layer, self.query.value)
        return similar(self.replacement.transcoders, self.summary, layer, self._wanted())

    def _search(self) -> str:
        said = self._list()
        self._card(self.list.value)
        return said

    def _list(self) -> str:
        on = {"frequency": self.range, "similarity": self.number}.get(self.by.value, self.query)
        for control in (self.query, self.range):
            control.disabled = control is not on
        table = self.found()
        note = {"token": "token_share", "label": "f1", "similarity": "cosine"}.get(self.by.value, "frequency")
        options = [
            (f"[{feature}]  {note.replace('_', ' ')} {value:.3g}", feature)
            for feature, value in table[note].head(MOST).items()
        ]
        replace_options(self.list, options)
        listed = f", the first {MOST} are listed" if len(table) > MOST else ""
        return f"{len(table)} of {len(of_layer(self.summary, self.layer.value))} features fit{listed}."

    def _wanted(self) -> int:
        return whole_number(self.number.value, "feature", len(of_layer(self.summary, self.layer.value)))

    def _number(self) -> str:
        if self.by.value == "similarity":
            return self._search()
        return self._chosen(self._wanted())

    def _choose(self) -> str:
        if self.list.value is None:
            return "Nothing is chosen."
        if self.by.value != "similarity":
            self.number.value = str(self.list.value)
        return self._chosen(self.list.value)

    def _chosen(self, feature: int) -> str:
        said = self._card(feature)
        self.choose(self.layer.value, feature)
        return said

    def _follow(self) -> str:
        layer, feature = self.selected.feature
        self.layer.value, self.number.value = layer, str(feature)
        said = self._card(feature)
        if self.by.value != "similarity":
            self._list()
        return f"{feature_name(layer, feature)} was chosen in another explorer. {said}"

    def _card(self, feature: int) -> str:
        layer = self.layer.value
        self.card.value, self._shown = card(self.traced, self.summary, layer, feature, self.index), (layer, feature)
        fired = of_layer(self.summary, layer).loc[feature, "count"]
        return "" if fired else f"{feature_name(layer, feature)} never fired: only its weights speak."
