"""Paths merged into one circuit, a networkx graph in which nothing is lost: at every node, what enters leaves.

Edges run with the computation, from source to reader; ``weight`` is the signed contribution that flows along them to
the target. What a node gets from sources that no path lists enters from three nodes of their own: ``error`` (MLPs and
what transcoders miss of them), ``bias`` and ``remainder`` (everything else, and paths that were not followed further).
"""

from __future__ import annotations

from collections.abc import Iterable

import networkx as nx
import torch
from torch import Tensor

from tclib.attribution import UnbalancedError
from tclib.circuits.one_step import BIASES, ERRORS, KINDS, Node, PromptGraph, Tables
from tclib.circuits.path_search import Path
from tclib.targets import Target

_Trie = dict[int, "_Trie"]  # source -> the sources behind it
UNLISTED = ("error", "bias", "remainder")


@torch.no_grad()
def merge(graph: PromptGraph, target: Target, paths: Iterable[Path]) -> nx.DiGraph:
    """One graph of all paths, with exact flows. Edges that several paths share are counted once for each way onward.

    Returns:
        Nodes are named as `tclib.circuits.one_step.Node.name` and the target by its name, with attributes ``kind``,
        ``layer``, ``head``, ``position``, ``feature``, ``token`` where they apply, and ``contribution``, what flows
        through. ``graph.graph`` holds ``target``, ``value`` and ``tokens``.

    Raises:
        ValueError: no paths.
        UnbalancedError: what enters a node is not what leaves it, beyond rounding.
    """
    trie: _Trie = {}
    for path in paths:
        below = trie
        for source in path.sources:
            below = below.setdefault(source, {})
    if not trie:
        raise ValueError("there are no paths to merge: search with a lower threshold")
    value, tokens = target.value(graph.trace), graph.trace.token_strings
    circuit = nx.DiGraph(target=target.name, value=value, tokens=list(tokens))
    circuit.add_node(target.name, kind="target", layer=target.layer, position=target.position, size=0.0)
    states, level = graph.root(target), [(target.name, None, trie)]
    while level:
        onward: list[tuple[int, int, float, tuple]] = []
        for table in graph.tables(states):
            classes = _classes(graph, table)
            for row, state in enumerate(table.states.tolist()):
                name, reader, below = level[state]
                values = torch.where(table.valid[row], table.values[row], 0.0)
                columns = {s: (table.sources == s).nonzero().item() for s in below}
                for source, column in columns.items():
                    node, flow = graph.node(source, reader), values[column].item()
                    _flow(circuit, _add(circuit, node, tokens), name, flow)
                    if below[source]:
                        onward.append((state, source, flow, (node.name, node, below[source])))
                    elif node.goes_on:
                        _flow(circuit, _add(circuit, Node("remainder"), tokens), node.name, flow)
                circuit.nodes[name]["size"] += values.abs().sum().item()
                values[list(columns.values())] = 0.0
                for kind, part in zip(UNLISTED, classes, strict=True):
                    _flow(circuit, _add(circuit, Node(kind), tokens), name, values[part].sum().item())
        level = [item for *_, item in onward]
        if level:
            rows, sources = (torch.tensor([o[k] for o in onward], device=graph.writes.device) for k in (0, 1))
            states = graph.follow(states[rows], sources, graph.writes.new_tensor([o[2] for o in onward]))
    for name in circuit:
        circuit.nodes[name]["contribution"] = circuit.out_degree(name, weight="weight")
    circuit.nodes[target.name]["contribution"] = value
    check_flows(circuit, 1e-5 if graph.writes.dtype == torch.float32 else 1e-10)
    for _, attributes in circuit.nodes(data=True):
        attributes.pop("size", None)
    return circuit


def check_flows(circuit: nx.DiGraph, tolerance: float = 1e-5) -> None:
    """Raise `UnbalancedError` unless what enters each node is its contribution, within rounding."""
    for name, attributes in circuit.nodes(data=True):
        entering = [weight for *_, weight in circuit.in_edges(name, data="weight")]
        gap = abs(sum(entering) - attributes["contribution"])
        if entering and not gap <= tolerance * attributes.get("size", sum(map(abs, entering))) + 1e-12:
            raise UnbalancedError(f"{sum(entering):.6f} enters {name}, but {attributes['contribution']:.6f} leaves it")


def _classes(graph: PromptGraph, table: Tables) -> tuple[Tensor, Tensor, Tensor]:
    """Which sources of a table are errors, biases, and neither."""
    kinds = graph.kinds[table.sources.clamp(max=graph.first_head - 1)]
    written = table.sources < graph.first_head
    error = written & torch.isin(kinds, kinds.new_tensor([KINDS.index(k) for k in ERRORS]))
    bias = written & torch.isin(kinds, kinds.new_tensor([KINDS.index(k) for k in BIASES if k in KINDS]))
    bias = bias | (table.sources >= graph.first_bias)
    return error, bias, ~(error | bias)


def _add(circuit: nx.DiGraph, node: Node, tokens: list[str]) -> str:
    if node.name not in circuit:
        attributes = {key: value for key, value in node._asdict().items() if value is not None}
        if node.position is not None:
            attributes["token"] = tokens[node.position]
        circuit.add_node(node.name, **attributes, size=0.0)
    return node.name


def _flow(circuit: nx.DiGraph, source: str, reader: str, weight: float) -> None:
    if circuit.has_edge(source, reader):
        circuit.edges[source, reader]["weight"] += weight
    elif weight:
        circuit.add_edge(source, reader, weight=weight)
