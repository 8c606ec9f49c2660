"""Dashboards as HTML with inline styles, no scripts: untrusted notebooks, GitHub and nbconvert show them as they are.

GitHub drops styles, so nothing is told by colour alone: strong tokens are bold, and numbers are text.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from tclib.features import FeatureActivations, search
from tclib.features.connect import strongest
from tclib.features.dashboard import LIVE, Dashboard, collect
from tclib.features.dashboard_figure import figure
from tclib.features.index import Index
from tclib.io.paths import write_whole
from tclib.plots import highlighted
from tclib.replacement_model import ReplacementModel
from tclib.ui.markup import in_one_line, picture

CELL = "padding: 1px 8px; text-align: right"
MISSING = "\N{EM DASH}"


def dashboard_html(d: Dashboard) -> str:
    """A feature's page as one fragment."""
    parts = [f"<h2>{d.name}</h2>", _statistics(d)]
    if d.link:
        parts.append(f'<p><a href="{d.link}">{d.link}</a></p>')
    parts += [figure_html(d), _examples(d), _tables(d)]
    return f'<div style="font-family: sans-serif; max-width: 1000px">{"".join(parts)}</div>'


def figure_html(d: Dashboard) -> str:
    """The figure as a PNG inside an ``img``."""
    drawn = figure(d)
    plt.close(drawn)
    told = f"{d.name}: histogram of activations, de-embedding, logit lens, strongest inputs and outputs, heads"
    return picture(drawn, told, round(90 * drawn.get_figwidth()))


def save_dashboard(d: Dashboard, path: str | Path) -> None:
    """One HTML file that needs nothing else."""
    _write(Path(path), d.name, dashboard_html(d))


def export(
    replacement: ReplacementModel,
    index: Index,
    layer: int,
    features: Sequence[int],
    folder: str | Path,
    truth: pd.DataFrame | None = None,
) -> Path:
    """The layer's index page, and a page for each of the features given; returns the index page.

    Raises:
        ValueError: as `collect`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for feature in features:
        d = collect(replacement, index, layer, feature, truth)
        back = f'<p><a href="layer_{layer}.html">all features of layer {layer}</a></p>'
        _write(folder / _name(layer, feature), d.name, back + dashboard_html(d))
    page = folder / f"layer_{layer}.html"
    _write(
        page,
        f"layer {layer}",
        layer_html(replacement.model, index, layer, truth, {f: _name(layer, f) for f in features}),
    )
    return page


def layer_html(
    model: TransformerBridge,
    index: Index,
    layer: int,
    truth: pd.DataFrame | None = None,
    pages: Mapping[int, str] | None = None,
) -> str:
    """All features of a layer in one table, most frequent first; a link for each that has a page.

    Columns: feature, tokens, share of tokens, largest and mean activation, the token it fires on most, and the label
    that its firing predicts best, with F1.
    """
    table = search.statistics(index, layer).sort_values("count", ascending=False, kind="stable")
    table["most"] = _commonest(model, index, layer)[table["feature"]]
    if truth is not None:
        best = search.best_labels(index, layer, truth)
        table["label"] = [
            f"{name} ({f1:.2f})" if name else "" for name, f1 in zip(best["label"], best["f1"], strict=True)
        ]
        table["label"] = table["label"].to_numpy()[table["feature"]]
    rows = []
    for row in table.to_dict("records"):
        link, name = (pages or {}).get(row["feature"]), str(row["feature"])
        name = f'<a href="{link}">{name}</a>' if link else name
        cells = [name, f"{row['count']:,}", f"{row['frequency']:.3%}", _number(row["max"]), _number(row["mean"])]
        cells += [html.escape(row["most"])] + ([html.escape(row["label"])] if truth is not None else [])
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    heads = ["feature", "tokens", "share", "max", "mean", "fires most on"] + ["label (F1)"] * (truth is not None)
    live = (table["frequency"] > LIVE).sum()
    about = f"{live} of {len(table)} features fire more than once in 10,000 of {index.n_tokens:,} tokens."
    head = "".join(f'<th style="padding: 1px 8px">{name}</th>' for name in heads)
    body = f'<table style="border-spacing: 8px 1px"><tr>{head}</tr>{"".join(rows)}</table>'
    return f'<div style="font-family: sans-serif"><h2>layer {layer}</h2><p>{about}</p>{body}</div>'


def _statistics(d: Dashboard) -> str:
    s = d.statistics
    if not s["count"]:
        return f"<p>It never fired on {s['tokens']:,} tokens; what follows is read from the weights alone.</p>"
    live = "live" if s["live"] else "not live"
    return (
        f"<p>Fires on {s['count']:,} of {s['tokens']:,} tokens ({s['frequency']:.3%}, {live} by the paper's measure); "
        f"mean activation where it fires {s['mean']:.3g}, largest {s['max']:.3g}.</p>"
    )


def _examples(d: Dashboard) -> str:
    parts = []
    for band in sorted({e.band for e in d.examples}):
        of_band = [e for e in d.examples if e.band == band]
        low, high = of_band[0].low, of_band[0].high
        title = "strongest activations" if band == 0 else f"band {band}, drawn at random"
        parts.append(f"<h3>{title}: {low:.3g} to {high:.3g}</h3>")
        for e in of_band:
            shown = highlighted(in_one_line(e.tokens), e.activations.tolist(), d.statistics["max"])
            where = f"row {e.row}, position {e.position}"
            at = float(e.activations.max()) if len(e.activations) else 0.0
            parts.append(f'<div title="{where}; largest shown {at:.2f}">{shown}</div>')
    return "".join(parts)


def _tables(d: Dashboard) -> str:
    parts = []
    if len(d.top_tokens):
        parts.append(_fold("tokens it fires on", d.top_tokens.assign(token=d.top_tokens["token"].map(repr)), True))
    if d.labels is not None:
        parts.append(_fold("labels its firing predicts", d.labels, True))
    for title, table in (("inputs", d.incoming), ("outputs", d.outgoing)):
        for by in ("input_invariant", "input_x_gradient", "target_weighted"):
            best = strongest(table[table[by] != 0], by, 10)
            if len(best):
                parts.append(_fold(f"strongest {title} by {by.replace('_', ' ')}", best))
    ends = {"promoted": d.logit_lens.head(15), "suppressed": d.logit_lens.tail(15)[::-1]}
    ends |= {"drive it directly": d.de_embedding.head(15), "inhibit it directly": d.de_embedding.tail(15)[::-1]}
    for title, scores in ends.items():
        table = pd.DataFrame({"token": [repr(t) for t in scores.index], "score": scores.to_numpy()})
        parts.append(_fold(f"tokens that {title}" if "directly" in title else f"tokens {title}", table))
    return "".join([*parts, _fold("features that write in a similar direction", d.similar)])


def _fold(title: str, table: pd.DataFrame, opened: bool = False) -> str:
    head = "".join(f'<th style="{CELL}">{html.escape(str(name)).replace("_", " ")}</th>' for name in table)
    rows = "".join(
        "<tr>" + "".join(f'<td style="{CELL}">{html.escape(_number(value))}</td>' for value in row) + "</tr>"
        for row in table.itertuples(index=False)
    )
    state = " open" if opened else ""
    return f"<details{state}><summary>{title}</summary><table><tr>{head}</tr>{rows}</table></details>"


def _number(value) -> str:
    if isinstance(value, float | np.floating):
        return MISSING if np.isnan(value) else f"{value:.3g}"
    return str(value)


def _commonest(model: TransformerBridge, index: Index, layer: int) -> np.ndarray:
    """The token each feature fires on most often, as text; empty for one that never fired."""
    names = np.full(index.n_features(layer), "", dtype=object)
    for feature in np.flatnonzero(np.diff(index.layer_offsets(layer))).tolist():
        token = int(FeatureActivations(index, layer, feature).top_tokens(1)["token"][0])
        names[feature] = repr(model.tokenizer.decode([token]))
    return names


def _name(layer: int, feature: int) -> str:
    return f"layer_{layer}_feature_{feature}.html"


def _write(path: Path, title: str, body: str) -> None:
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title></head>'
    write_whole(path, f"{head}<body>{body}</body></html>\n".encode())
