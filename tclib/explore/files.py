"""Circuits as files for other programs: GraphML (Gephi, yEd, Cytoscape) and node-link JSON (d3, networkx)."""

from __future__ import annotations

import json
from pathlib import Path

import networkx as nx


def save_graph(circuit: nx.DiGraph, path: str | Path) -> None:
    """Write ``.graphml`` or ``.json``, by the name's ending.

    Raises:
        ValueError: another ending.
    """
    path = Path(path)
    if path.suffix == ".graphml":
        plain = circuit.copy()  # GraphML knows no lists
        plain.graph = {k: json.dumps(v) if isinstance(v, list) else v for k, v in circuit.graph.items()}
        nx.write_graphml_xml(plain, path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(nx.node_link_data(circuit, edges="edges"), indent=1) + "\n", encoding="utf-8")
    else:
        raise ValueError(f"{path.name} ends in neither .graphml nor .json: choose one of the two")


def load_graph(path: str | Path) -> nx.DiGraph:
    """Read what `save_graph` wrote.

    Raises:
        ValueError: another ending, or a damaged file.
    """
    path = Path(path)
    try:
        if path.suffix == ".graphml":
            circuit = nx.read_graphml(path)
            if "tokens" in circuit.graph:
                circuit.graph["tokens"] = json.loads(circuit.graph["tokens"])
            return circuit
        if path.suffix == ".json":
            return nx.node_link_graph(json.loads(path.read_text(encoding="utf-8")), edges="edges")
    except (json.JSONDecodeError, KeyError, nx.NetworkXError, SyntaxError) as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error
    raise ValueError(f"{path.name} ends in neither .graphml nor .json: choose one of the two")
