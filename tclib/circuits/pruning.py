"""Influence in a graph of all-paths effects: scores, and the few nodes and edges that matter.

All definitions are those of Ameisen et al. 2025 (Circuit Tracing, "Evaluating attribution graphs") as circuit-tracer
computes them, on absolute values:

    N_ij = |A_ij| / sum_j |A_ij|                               each node's incoming effects as shares
    influence = weights (N + N^2 + ...) = weights ((I - N)^-1 - I)       of each node on the weighted targets

Signs and sums stay in the graph itself. Biases are constants and take no share, as in circuit-tracer, which has none;
position embeddings count with the tokens as the input; a remainder counts as error.
"""

from __future__ import annotations

import networkx as nx
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.circuits.direct_effects import shares
from tclib.circuits.graph import Graph

INPUTS, UNEXPLAINED = ("embedding", "position"), ("error", "mlp", "remainder")
MOST_EDGES = 200_000


def influence(graph: Graph) -> Float[Tensor, " node"]:
    """Each node's influence on the targets over all paths in the graph; the weights sum to the targets' own."""
    return _propagate(_shares(graph), _weights(graph))


def replacement_score(graph: Graph) -> float:
    """How much of the targets' influence ends at the input rather than at errors: 1 if features explain everything."""
    reached = influence(graph)
    inputs, unexplained = reached[_is(graph, INPUTS)].sum(), reached[_is(graph, UNEXPLAINED)].sum()
    return (inputs / (inputs + unexplained)).item()


def completeness_score(graph: Graph) -> float:
    """The share of incoming effects that do not come from errors, averaged over nodes weighted by influence."""
    share, weights = _shares(graph), _weights(graph)
    reached = _propagate(share, weights) + weights
    explained = 1 - share[:, _is(graph, UNEXPLAINED)].sum(1)
    return ((explained * reached).sum() / reached.sum()).item()


def path_length(graph: Graph) -> float:
    """Mean number of edges on the way from the targets to the input, each way weighted by the influence it carries."""
    share, current, inputs = _shares(graph), _weights(graph), _is(graph, INPUTS)
    arrived, edges, length = 0.0, 0.0, 0
    while current.any():
        current, length = current @ share, length + 1
        here = current[inputs].sum().item()
        arrived, edges = arrived + here, edges + length * here
    return edges / arrived if arrived else float("nan")


def by_layer(graph: Graph) -> pd.DataFrame:
    """Where incoming effects come from: shares of their absolute sums, biases aside.

    Returns:
        One row per kind of reader (``features 0``, ..., ``target``), one column per kind of source.
    """
    kinds = graph.nodes["kind"].replace(dict.fromkeys(INPUTS, "tokens") | dict.fromkeys(UNEXPLAINED, "errors"))
    layers = graph.nodes["layer"].astype(str)
    group = kinds.mask(kinds == "feature", "features " + layers).to_numpy()
    sizes = pd.DataFrame(graph.adjacency.abs().cpu().numpy()).groupby(group).sum().T.groupby(group).sum().T
    features = sorted(name for name in sizes if name.startswith("features"))
    sizes = sizes.loc[[*features, "target"], ["tokens", *features, "errors"]]
    return sizes.div(sizes.sum(1), axis=0)


def prune(graph: Graph, nodes: float = 0.8, edges: float = 0.98) -> Graph:
    """The smallest part of a graph that keeps these fractions of all influence; what is left out becomes a remainder.

    Embeddings, biases and targets always stay. Rows still sum to their nodes' values.

    Args:
        nodes: fraction of the summed node influence to keep, the most influential first.
        edges: fraction of the summed edge influence to keep among those nodes.

    Raises:
        ValueError: a fraction outside 0 to 1.
    """
    for name, fraction in {"nodes": nodes, "edges": edges}.items():
        if not 0 <= fraction <= 1:
            raise ValueError(f"{name} is {fraction}: it is the fraction of influence to keep, from 0 to 1")
    fixed = _is(graph, ("embedding", "position", "bias", "remainder", "target"))
    feature = _is(graph, ("feature",))
    reached = influence(graph)
    kept = (reached >= _threshold(reached, nodes)) | fixed
    index = kept.nonzero().squeeze(1)  # few: all that follows is small beside the graph
    among, weights = _shares(graph, index), _weights(graph)[index]
    score = among * (_propagate(among, weights) + weights)[:, None]
    edge = torch.zeros_like(graph.adjacency, dtype=torch.bool)
    edge[index[:, None], index] = (score >= _threshold(score.flatten(), edges)) & (score > 0)
    while True:  # a node without a way in or out leaves, which may strand others
        stays = kept & (edge.any(0) | fixed) & (edge.any(1) | ~feature)
        if (stays == kept).all():
            break
        kept = stays
        edge &= kept[:, None] & kept
    edge |= _is(graph, ("bias",)) & kept[:, None]
    return _with_remainder(graph, kept, edge)


def to_networkx(graph: Graph) -> nx.DiGraph:
    """Nodes by their row, with all columns and ``balance`` (sum of incoming effects - value); edges source -> target
    with the signed effect as ``weight`` and its ``sign``.

    Raises:
        ValueError: more edges than anyone could use; prune first.
    """
    rows, columns = graph.adjacency.nonzero(as_tuple=True)
    if len(rows) > MOST_EDGES:
        raise ValueError(f"the graph has {len(rows)} edges, more than {MOST_EDGES}: prune it first")
    result = nx.DiGraph()
    sums = graph.adjacency.sum(1, dtype=torch.float64).tolist()
    for index, node in enumerate(graph.nodes.to_dict("records")):
        known = {str(name): value for name, value in node.items() if not pd.isna(value)}
        balance = {"balance": sums[index] - node["value"]} if "value" in known else {}
        result.add_node(index, **known, **balance)
    weights = graph.adjacency[rows, columns].tolist()
    for target, source, weight in zip(rows.tolist(), columns.tolist(), weights, strict=True):
        result.add_edge(source, target, weight=weight, sign=1 if weight > 0 else -1)
    return result


def _with_remainder(graph: Graph, kept: Tensor, edge: Tensor) -> Graph:
    adjacency = torch.where(edge, graph.adjacency, 0)
    lost = graph.adjacency.sum(1) - adjacency.sum(1)
    old = _is(graph, ("remainder",))
    if old.any():
        adjacency[:, old] = 0
        lost = graph.adjacency.sum(1) - adjacency.sum(1)
    kept = kept & ~old
    index = kept.nonzero().squeeze(-1)
    table = graph.nodes.iloc[index.cpu().numpy()]
    remainder = pd.DataFrame([{"kind": "remainder"}]).reindex(columns=table.columns)
    targets = int((table["kind"] == "target").sum())
    nodes = pd.concat([table.iloc[:-targets], remainder, table.iloc[-targets:]], ignore_index=True)
    small = adjacency[index][:, index]
    small = torch.cat([small[:, :-targets], lost[index, None], small[:, -targets:]], 1)
    empty = small.new_zeros(1, small.shape[1])
    return Graph(nodes.astype(graph.nodes.dtypes), torch.cat([small[:-targets], empty, small[-targets:]]))


def _shares(graph: Graph, among: Int[Tensor, " node"] | None = None) -> Tensor:
    bias = _is(graph, ("bias",))
    effects = graph.adjacency.abs() if among is None else graph.adjacency[among[:, None], among].abs()
    effects[:, bias if among is None else bias[among]] = 0
    return shares(effects)


def _weights(graph: Graph) -> Tensor:
    return graph.adjacency.new_tensor(graph.nodes["weight"].fillna(0).tolist())


def _is(graph: Graph, kinds: tuple[str, ...]) -> Tensor:
    return torch.tensor(graph.nodes["kind"].isin(kinds).tolist(), device=graph.adjacency.device)


def _propagate(share: Tensor, weights: Tensor) -> Tensor:
    """weights (N + N^2 + ...): ends by itself, because effects only go forward through the layers."""
    total, current = torch.zeros_like(weights), weights @ share
    while current.any():
        total += current
        current = current @ share
    return total


def _threshold(scores: Tensor, fraction: float) -> Tensor:
    """The score down to which the largest together hold the fraction."""
    ordered = scores.sort(descending=True).values
    held = ordered.cumsum(0) / ordered.sum()
    return ordered[min(int(torch.searchsorted(held, fraction)), len(ordered) - 1)]
