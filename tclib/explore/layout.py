"""Where the nodes of a circuit stand: layers upwards, positions across."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx

from tclib.prompt_graph import BIASES

UNLISTED = ("error", "bias", "remainder")


@dataclass(frozen=True)
class Layout:
    """Coordinates of the nodes that are drawn, the ticks of both axes, and what is left to a footnote."""

    places: dict[str, tuple[float, float]]
    rows: list[str]  # names of the levels, from the embeddings up
    columns: list[tuple[float, str]]  # centre and token of each position that occurs
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
    levels = sorted({_level(data[name]) for name in drawn})
    cells: dict[tuple, list[str]] = {}
    for name in drawn:
        cells.setdefault((data[name].get("position", -1), _level(data[name])), []).append(name)
    places, columns, left = {}, [], 0.0
    for position in sorted({p for p, _ in cells}):
        own = {level: names for (p, level), names in cells.items() if p == position}
        width = max(map(len, own.values()))
        for level, names in own.items():
            for i, name in enumerate(sorted(names)):
                places[name] = (left + (i + 0.5) * width / len(names), levels.index(level))
        token = next((data[n]["token"] for n in sum(own.values(), []) if "token" in data[n]), "")
        token = token or (circuit.graph["tokens"][position] if position >= 0 and "tokens" in circuit.graph else "")
        columns.append((left + width / 2, f"{token}\n{position}" if position >= 0 else ""))
        left += width + 0.4
    sums: dict[str, float] = {}
    for name, kind in aside.items():
        kind = "bias" if kind in BIASES else kind
        sums[kind] = sums.get(kind, 0.0) + data[name]["contribution"]
    parts = [f"{kind} {value:+.2f}" for kind, value in sums.items()] + [f"{hidden} smaller nodes"] * (hidden > 0)
    footnote = "not drawn: " + ", ".join(parts) if parts else ""
    return Layout(places, [_level_name(level) for level in levels], columns, footnote)


def is_unlisted(attributes: dict) -> bool:
    """Whether a node only collects what no path lists."""
    return attributes["kind"] in UNLISTED and "layer" not in attributes


def _level(attributes: dict) -> tuple[float, int]:
    kind, layer = attributes["kind"], attributes.get("layer")
    if kind == "target":
        return float("inf"), 0
    if kind in ("embedding", "position") or layer is None:
        return -1, 0
    return layer, int(kind not in ("head", "attention_bias", "value_bias") and "head" not in attributes)


def _level_name(level: tuple[float, int]) -> str:
    layer, part = level
    if layer in (-1, float("inf")):
        return "embedding" if layer == -1 else "target"
    return f"{'mlp' if part else 'attn'}{layer}"


def from_graph(graph: nx.DiGraph) -> nx.DiGraph:
    """An all-paths graph, as `tclib.pruning.to_networkx` gives it, in the form of these views.

    Nodes get names, and as ``contribution`` a target's value, or the sum of the effects on others.
    """
    circuit = nx.DiGraph()
    names = {}
    for node, row in graph.nodes(data=True):
        kept = {key: row[key] for key in ("kind", "token") if key in row}
        kept |= {key: int(row[key]) for key in ("layer", "position", "feature") if key in row}
        names[node] = row["name"] if kept["kind"] == "target" else _graph_name(kept)
        value = row["value"] if kept["kind"] == "target" else graph.out_degree(node, weight="weight")
        circuit.add_node(names[node], **kept, contribution=value)
    for source, reader, weight in graph.edges(data="weight"):
        circuit.add_edge(names[source], names[reader], weight=weight)
    return circuit


def _graph_name(row: dict) -> str:
    part = f"mlp{row['layer']}" if "layer" in row else ""
    part += f"[{row['feature']}]" if "feature" in row else ""
    kind = "" if row["kind"] in ("feature", "mlp") else row["kind"]
    return f"{part} {kind}".strip() + (f"@{row['position']}" if "position" in row else "")
