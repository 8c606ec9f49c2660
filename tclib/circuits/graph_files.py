"""Circuits as files for other programs: GraphML (Gephi, yEd, Cytoscape) and node-link JSON (d3, networkx)."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

from tclib.io.paths import write_whole

_NOT_XML = re.compile(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def save_graph(circuit: nx.DiGraph, path: str | Path) -> None:
    """Write ``.graphml`` or ``.json``, by the name's ending.

    Raises:
        ValueError: another ending, or text that GraphML cannot hold: XML has no form feed, say, and takes a carriage
            return for a line break.
    """
    path = Path(path)
    if path.suffix == ".graphml":
        for text in _texts(circuit):
            if wrong := _NOT_XML.search(text):
                raise ValueError(
                    f"GraphML cannot hold the character {wrong[0]!r} of {text!r}: save the circuit as .json"
                )
        plain = circuit.copy()  # GraphML knows no lists
        plain.graph = {k: json.dumps(v) if isinstance(v, list) else v for k, v in circuit.graph.items()}
        buffer = io.BytesIO()
        nx.write_graphml_xml(plain, buffer, encoding="utf-8")
        write_whole(path, buffer.getvalue())
    elif path.suffix == ".json":
        write_whole(path, (json.dumps(nx.node_link_data(circuit, edges="edges"), indent=1) + "\n").encode())
    else:
        raise ValueError(f"{path.name} ends in neither .graphml nor .json: choose one of the two")


def _texts(circuit: nx.DiGraph) -> Iterator[str]:
    """Everything that becomes text of the XML as it is; lists are written as JSON, which escapes."""
    for name, attributes in circuit.nodes(data=True):
        yield from (text for text in (name, *attributes.values()) if isinstance(text, str))
    for *_, attributes in circuit.edges(data=True):
        yield from (text for text in attributes.values() if isinstance(text, str))
    yield from (text for text in circuit.graph.values() if isinstance(text, str))
