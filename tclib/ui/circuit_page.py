"""A circuit to click through: plain HTML without scripts or network, so that an untrusted notebook shows it too.

Notebooks that are not trusted drop scripts and drawings (SVG). The tree is made of folds alone and stays; the drawing,
with hover titles, is for a saved file or a trusted notebook.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import networkx as nx
import numpy as np

from tclib.circuits.layout import label, layout
from tclib.plots import NEGATIVE, POSITIVE

UNIT, LEVEL, TALL, MARGIN = 60, 62, 10, 84  # pixels: width of a node, height of a level, half a box, left margin
BOWS = (0, *(sign * bow for bow in (14, 28, 42, 56, 70) for sign in (1, -1)))  # pixels off the straight line


def circuit_tree(circuit: nx.DiGraph, top: int = 6, depth: int = 6) -> str:
    """Nested folds: the target, and under each node the ``top`` largest of its sources, opened on a click.

    Raises:
        ValueError: a graph without a target.
    """
    targets = [name for name, kind in circuit.nodes(data="kind") if kind == "target"]
    if not targets:
        raise ValueError("the graph has no node of kind 'target' to start from")
    parts = [_fold(circuit, target, circuit.nodes[target]["contribution"], top, depth, True) for target in targets]
    return f'<div style="font-family: monospace; line-height: 1.6">{"".join(parts)}</div>'


def _fold(circuit: nx.DiGraph, name: str, weight: float, top: int, depth: int, opened: bool = False) -> str:
    color, token = POSITIVE if weight > 0 else NEGATIVE, circuit.nodes[name].get("token")
    text = f'<span style="color: {color}">{weight:+.3f}</span> {html.escape(name)}'
    text += f" <b>{html.escape(repr(token))}</b>" if token is not None else ""
    sources = sorted(circuit.in_edges(name, data="weight"), key=lambda edge: -abs(edge[2]))
    if not sources or not depth:
        return f'<div style="margin-left: 20px">{text}</div>'
    inner = "".join(_fold(circuit, source, w, top, depth - 1) for source, _, w in sources[:top])
    if rest := sources[top:]:
        inner += f'<div style="margin-left: 20px">{sum(w for *_, w in rest):+.3f} {len(rest)} other sources</div>'
    state = " open" if opened else ""
    return f'<details{state} style="margin-left: 20px"><summary>{text}</summary>{inner}</details>'


def circuit_svg(circuit: nx.DiGraph, top: int = 30) -> str:
    """The drawing of `circuit_figure` as one SVG element; resting on a node or edge tells its numbers.

    It is as wide as the page allows, up to its natural size.
    """
    plan = layout(circuit, top)
    width = UNIT * max(x for x, _ in plan.places.values()) + MARGIN + 60
    height = LEVEL * max(y for _, y in plan.places.values()) + 104
    boxes = {}
    for name, (x, y) in plan.places.items():
        half = 4 + 3.3 * len(label(name, circuit.nodes[name]))
        boxes[name] = (MARGIN + UNIT * x, height - 80 - LEVEL * y, half)
    edges = [(s, r, w) for s, r, w in circuit.edges(data="weight") if s in boxes and r in boxes]
    largest = max((abs(weight) for *_, weight in edges), default=1.0)
    parts = []
    for source, reader, weight in sorted(edges, key=lambda edge: abs(edge[2])):
        share = abs(weight) / largest
        line = f'stroke="{POSITIVE}"' if weight > 0 else f'stroke="{NEGATIVE}" stroke-dasharray="6 3"'
        told = html.escape(f"{source} to {reader}: {weight:+.3f}")
        (x1, y1), *rest = _route(boxes, source, reader)
        curve = " ".join(f"{x:.1f} {y:.1f}" for x, y in rest)
        parts.append(
            f'<path d="M{x1:.1f} {y1:.1f}C{curve}" fill="none" {line} '
            f'stroke-width="{0.8 + 6 * share:.2f}" opacity="{0.35 + 0.6 * share:.2f}"><title>{told}</title></path>'
        )
    for name, (x, y, half) in boxes.items():
        data = circuit.nodes[name]
        told = f"{name} {data.get('token', '')!r}: {data['contribution']:+.3f}"
        parts.append(
            f'<g><title>{html.escape(told)}</title><rect x="{x - half:.1f}" y="{y - TALL:.1f}" width="{2 * half:.1f}" '
            f'height="{2 * TALL}" rx="4" stroke="gray" fill="white"/><text x="{x:.1f}" y="{y + 4:.1f}" '
            f'font-size="11.5" fill="black" text-anchor="middle">{html.escape(label(name, data))}</text></g>'
        )
    for y, row in plan.rows:
        parts.append(f'<text x="2" y="{height - 76 - LEVEL * y:.1f}" font-size="12">{html.escape(row)}</text>')
    for x, column in plan.columns:
        for line, text in enumerate(column.split("\n")):
            at = f'x="{MARGIN + UNIT * x:.1f}" y="{height - 50 + 15 * line:.1f}"'
            parts.append(f'<text {at} font-size="12" text-anchor="middle">{html.escape(text)}</text>')
    parts.append(f'<text x="2" y="{height - 10:.1f}" font-size="12" fill="#555555">{html.escape(plan.footnote)}</text>')
    style = f'style="width: 100%; max-width: {width:.0f}px; min-width: {0.6 * width:.0f}px; height: auto"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" {style}'
    return f'{head} font-family="sans-serif">{"".join(parts)}</svg>'


def _route(boxes: Mapping[str, tuple[float, float, float]], source: str, reader: str) -> list[tuple[float, float]]:
    """The four points of a cubic curve: the plainest one that runs through no other box, or through as few as can be.

    A straight line, else one that leaves upwards and arrives from below, each more and more to the side; where all of
    these run through a box, the two ends may lean to different sides.
    """
    start, end = np.array(boxes[source][:2]), np.array(boxes[reader][:2])
    others = np.array([box for name, box in boxes.items() if name not in (source, reader)]).reshape(-1, 3)
    t = np.linspace(0, 1, 80)[:, None]
    step = end - start
    aside = np.array([step[1], -step[0]]) / max(float(np.hypot(*step)), 1.0)
    best: list[tuple[float, float]] = []
    least = np.inf
    leans = sorted(product(BOWS, BOWS), key=lambda pair: (pair[0] != pair[1], abs(pair[0]) + abs(pair[1])))
    for first, last in leans:
        for up in (None, 0.5, 0.9):
            along = step / 3 if up is None else np.array([0.0, step[1] * up])
            controls = start + along + 4 / 3 * first * aside, end - along + 4 / 3 * last * aside
            points = np.stack([start, *controls, end])
            weights = np.hstack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
            x, y = (weights @ points).T[:, :, None]
            inside = (abs(x - others[:, 0]) < others[:, 2] + 1) & (abs(y - others[:, 1]) < TALL + 1)
            hits = int(inside.sum()) + 1000 * bool(x.min() < MARGIN / 2 or y.min() < 2)
            if hits < least:
                best, least = points.tolist(), hits
            if not hits:
                return best
    return best


def page_html(circuit: nx.DiGraph, title: str, top: int = 30) -> str:
    """One self-contained page, which needs no kernel and no network: the drawing above the tree."""
    body = f"<h1>{html.escape(title)}</h1>{circuit_svg(circuit, top)}{circuit_tree(circuit)}"
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title></head>'
    return f"{head}<body>{body}</body></html>\n"


def save_page(circuit: nx.DiGraph, path: str | Path, title: str, top: int = 30) -> None:
    """Write `page_html` to a file."""
    Path(path).write_text(page_html(circuit, title, top), encoding="utf-8")
