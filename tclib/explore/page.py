"""A circuit to click through: plain HTML without scripts or network, so that an untrusted notebook shows it too.

Notebooks that are not trusted drop scripts and drawings (SVG). The tree is made of folds alone and stays; the drawing,
with hover titles, is for a saved file or a trusted notebook.
"""

from __future__ import annotations

import html
from pathlib import Path

import networkx as nx

from tclib.explore.figure import label
from tclib.explore.layout import layout
from tclib.views import NEGATIVE, POSITIVE


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
    """The drawing of `circuit_figure` as one SVG element; resting on a node or edge tells its numbers."""
    plan = layout(circuit, top)
    width = max(x for x, _ in plan.places.values()) * 90 + 160
    height = len(plan.rows) * 70 + 70

    def at(name: str) -> tuple[float, float]:
        x, y = plan.places[name]
        return 90 + 90 * x, height - 80 - 70 * y

    edges = [(s, r, w) for s, r, w in circuit.edges(data="weight") if s in plan.places and r in plan.places]
    largest = max((abs(weight) for *_, weight in edges), default=1.0)
    parts = []
    for source, reader, weight in sorted(edges, key=lambda edge: abs(edge[2])):
        (x1, y1), (x2, y2), share = at(source), at(reader), abs(weight) / largest
        line = f'stroke="{POSITIVE}"' if weight > 0 else f'stroke="{NEGATIVE}" stroke-dasharray="6 3"'
        told = html.escape(f"{source} to {reader}: {weight:+.3f}")
        parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {line} '
            f'stroke-width="{0.8 + 6 * share:.2f}" opacity="{0.35 + 0.6 * share:.2f}"><title>{told}</title></line>'
        )
    for name in plan.places:
        (x, y), data = at(name), circuit.nodes[name]
        text = label(name, data)
        half = 5 + 3.9 * len(text)
        told = f"{name} {data.get('token', '')!r}: {data['contribution']:+.3f}"
        parts.append(
            f'<g><title>{html.escape(told)}</title><rect x="{x - half:.1f}" y="{y - 10:.1f}" width="{2 * half:.1f}" '
            f'height="20" rx="4" fill="white" stroke="gray"/><text x="{x:.1f}" y="{y + 4:.1f}" font-size="11" '
            f'text-anchor="middle">{html.escape(text)}</text></g>'
        )
    for y, row in enumerate(plan.rows):
        parts.append(f'<text x="4" y="{height - 76 - 70 * y}" font-size="12">{html.escape(row)}</text>')
    for x, column in plan.columns:
        text = html.escape(column.replace("\n", " @"))
        parts.append(f'<text x="{90 + 90 * x:.1f}" y="{height - 40}" font-size="12" text-anchor="middle">{text}</text>')
    parts.append(f'<text x="4" y="{height - 12}" font-size="11" fill="gray">{html.escape(plan.footnote)}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" font-family="sans-serif">'
    return f"{head}{''.join(parts)}</svg>"


def save_page(circuit: nx.DiGraph, path: str | Path, title: str, top: int = 30) -> None:
    """One self-contained HTML file: the drawing above the tree."""
    body = f"<h1>{html.escape(title)}</h1>{circuit_svg(circuit, top)}{circuit_tree(circuit)}"
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title></head>'
    Path(path).write_text(f"{head}<body>{body}</body></html>\n", encoding="utf-8")
