"""Where the nodes of a circuit stand: layers upwards, positions across."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx

from tclib.circuits.one_step import BIASES
from tclib.circuits.path_graph import UNLISTED

ACROSS = 10.0  # widths of a node: cells with many nodes get several lines, so that a drawing is no wider than a page
LINE = 0.5  # from one line of a cell to the next; from one level to the next it is 1
LONGEST = 24  # letters of a label


@dataclass(frozen=True)
class Layout:
    """Coordinates of the nodes that are drawn, the ticks of both axes, and what is left to a footnote."""

    places: dict[str, tuple[float, float]]  # centres, in widths of a node and levels
    rows: list[tuple[float, str]]  # height and name of each level, from the embeddings up
    columns: list[tuple[float, str]]  # centre and token of each position that occurs
    aside: dict[str, float]  # what enters from biases, errors and the remainder, which are not drawn
    footnote: str


def layout(circuit: nx.DiGraph, top: int = 30) -> Layout:
    """Places for the target and the ``top`` largest nodes by |contribution|; biases and what no path lists are summed.

    Raises:
        ValueError: ``top`` below 1.
    """
    if top < 1:
        raise ValueError(f"top is {top}: draw at least 1 node")
    data = dict(circuit.nodes(data=True))
    aside = {name: d["kind"] for name, d in data.items() if is_unlisted(d) or d["kind"] in BIASES}
    drawn = [name for name in data if name not in aside]
    drawn.sort(key=lambda name: (data[name]["kind"] != "target", -abs(data[name]["contribution"])))
    hidden = len(drawn)
    drawn = set(drawn[: top + 1])
    # A node whose readers are all too small to be drawn would hang in the air.
    while loose := {n for n in drawn if data[n]["kind"] != "target" and not drawn & set(circuit.successors(n))}:
        drawn -= loose
    hidden -= len(drawn)
    cells: dict[tuple, list[str]] = {}
    for name in sorted(drawn):
        cells.setdefault((data[name].get("position", -1), _level(data[name])), []).append(name)
    widths = {name: _width(label(name, data[name])) for name in drawn}
    lines = _broken(cells, widths)
    heights, rows, height = {}, [], 0.0
    for level in sorted({level for _, level in cells}):
        most = max(len(own) for (_, at), own in lines.items() if at == level)
        heights[level] = height
        rows.append((height + (most - 1) * LINE / 2, _level_name(level)))
        height += 1 + (most - 1) * LINE
    places, columns, left = {}, [], 0.0
    for position in sorted({p for p, _ in cells}):
        own = {level: found for (p, level), found in lines.items() if p == position}
        width = max(sum(widths[n] for n in line) for found in own.values() for line in found)
        for level, found in own.items():
            for number, line in enumerate(found):
                x = left + (width - sum(widths[n] for n in line)) / 2
                for name in line:
                    places[name] = (x + widths[name] / 2, heights[level] + number * LINE)
                    x += widths[name]
        names = [n for found in own.values() for line in found for n in line]
        token = next((data[n]["token"] for n in names if "token" in data[n]), "")
        token = token or (circuit.graph["tokens"][position] if position >= 0 and "tokens" in circuit.graph else "")
        columns.append((left + width / 2, f"{token}\n{position}" if position >= 0 else ""))
        left += width + 0.3
    sums: dict[str, float] = {}
    for name, kind in aside.items():
        kind = "bias" if kind in BIASES else kind
        passed = circuit.in_degree(name, weight="weight")  # a remainder may hold nodes that only pass something on
        sums[kind] = sums.get(kind, 0.0) + data[name]["contribution"] - passed
    parts = [f"{kind} {value:+.2f}" for kind, value in sums.items()] + [f"{hidden} smaller nodes"] * (hidden > 0)
    footnote = "not drawn: " + ", ".join(parts) if parts else ""
    return Layout(places, rows, columns, sums, footnote)


def label(name: str, attributes: dict) -> str:
    """A short name: layer and position are told by the axes."""
    if attributes["kind"] == "head":
        return f"h{attributes['head']}"
    if attributes["kind"] == "feature":
        return f"[{attributes['feature']}]"
    text = name if attributes["kind"] == "target" else attributes["kind"].replace("_", " ")
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def is_unlisted(attributes: dict) -> bool:
    """Whether a node only collects what no path lists."""
    return attributes["kind"] in UNLISTED and "layer" not in attributes


def _width(text: str) -> float:
    return max(1.0, (3 + len(text)) / 9)


def _broken(cells: dict[tuple, list[str]], widths: dict[str, float]) -> dict[tuple, list[list[str]]]:
    """The nodes of each cell in lines, as long as the whole drawing allows."""
    longest = {key: sum(widths[n] for n in names) for key, names in cells.items()}

    def across(limit: float) -> float:
        columns = {position for position, _ in cells}
        return sum(min(limit, max(longest[key] for key in cells if key[0] == p)) + 0.3 for p in columns)

    limit = next((most / 2 for most in range(2 * int(ACROSS), 2, -1) if across(most / 2) <= ACROSS), 1.0)
    lines = {}
    for key, names in cells.items():
        number = min(len(names), -int(-longest[key] // limit))
        ends = [round(i * len(names) / number) for i in range(number + 1)]
        lines[key] = [names[start:end] for start, end in zip(ends, ends[1:], strict=False)]
    return lines


def _level(attributes: dict) -> tuple[float, int]:
    kind, layer = attributes["kind"], attributes.get("layer")
    if kind == "target":
        return float("inf"), 0
    if kind in ("embedding", "position") or layer is None:
        return -1, 0
    attention = kind in ("head", "attention_bias", "value_bias") or "head" in attributes
    return layer, int(not attention and attributes.get("part") != "attn")


def _level_name(level: tuple[float, int]) -> str:
    layer, part = level
    if layer in (-1, float("inf")):
        return "embedding" if layer == -1 else "target"
    return f"{'mlp' if part else 'attn'}{layer}"
