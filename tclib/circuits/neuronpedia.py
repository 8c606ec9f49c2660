"""Attribution graphs as the JSON that Neuronpedia and circuit-tracer's own viewer read, and links to feature pages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tclib import __version__
from tclib.circuits.graph import Graph
from tclib.circuits.pruning import MOST_EDGES, influence
from tclib.inputs import counted
from tclib.io.paths import read_text, write_whole
from tclib.tracing import Trace

PAGES = "https://www.neuronpedia.org"
_KINDS = {"error": "mlp reconstruction error", "mlp": "mlp reconstruction error", "feature": "cross layer transcoder"}
# Bias and remainder have no counterpart.
_KINDS |= {"embedding": "embedding", "position": "embedding", "target": "logit"}
_NODE = {
    "node_id": "", "feature": -1, "layer": "", "ctx_idx": 0, "feature_type": "", "token_prob": 0.0,
    "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0, "jsNodeId": "", "clerp": "", "influence": None,
    "activation": None,
}  # fmt: skip


def neuronpedia_url(layer: int, feature: int, scan: str = "gpt2-small", source: str = "tres-dc") -> str:
    """The page of a feature; by default, of the paper's published GPT-2 transcoders.

    Raises:
        ValueError: a layer or feature that is no whole number from 0 on.
    """
    layer, feature = counted("layer", layer), counted("feature", feature)
    return f"{PAGES}/{scan}/{layer}-{source}/{feature}"


def save_graph_json(
    trace: Trace, graph: Graph, folder: str | Path, slug: str, scan: str, source: str | None = None, **shown: Any
) -> Path:
    """Write `graph_json`, with ``shown`` for its other arguments, as ``folder/slug.json``; return its path.

    The graph is entered in ``folder/graph-metadata.json``.
    """
    folder = Path(folder)
    content = graph_json(trace, graph, slug, scan, source, **shown)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug}.json"
    write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    index = folder / "graph-metadata.json"
    listed = json.loads(read_text(index))["graphs"] if index.is_file() else []
    listed = [other for other in listed if other["slug"] != slug] + [content["metadata"]]
    write_whole(index, (json.dumps({"graphs": listed}, indent=1) + "\n").encode())
    return path


def graph_json(
    trace: Trace,
    graph: Graph,
    slug: str,
    scan: str,
    source: str | None = None,
    pinned: Collection[tuple[int, int, int]] = (),
    groups: Mapping[str, Collection[tuple[int, int, int]]] | None = None,
    names: Callable[[int, int], str] | None = None,
) -> dict:
    """An attribution graph as those viewers read it.

    An MLP without a transcoder becomes an error node, and a token's position embedding joins its token node. Biases and
    a remainder have no node there: their share of all |effects| is said in the description.

    Args:
        graph: of this trace, pruned (`tclib.circuits.pruning.prune`): the format is for looking at.
        slug: the graph's name: letters, digits, ``-`` and ``_``.
        scan: the model's name on Neuronpedia, ``"gpt2-small"``.
        source: the set of features on Neuronpedia, ``"tres-dc"`` for the paper's; None where it has no pages.
        pinned: features (layer, position, feature) that the viewer shows at once; those that the graph lacks are left
            out.
        groups: features that the viewer shows as one node of this name.
        names: gives a feature of a layer the name that stands at its nodes, such as `tclib.features.naming.Names`.

    Raises:
        ValueError: a slug that is no plain name, or more edges than anyone could look at.
    """
    if not re.fullmatch(r"[\w-]+", slug):
        raise ValueError(f"slug {slug!r} is not a plain name: use letters, digits, - and _")
    nodes, ids = _nodes(trace, graph, names)
    rows, columns = graph.adjacency.nonzero(as_tuple=True)
    effects = zip(rows.tolist(), columns.tolist(), graph.adjacency[rows, columns].tolist(), strict=True)
    if len(rows) > MOST_EDGES:
        raise ValueError(f"the graph has {len(rows)} edges, more than {MOST_EDGES}: prune it first")
    weights: dict[tuple[str, str], float] = {}
    lost = total = 0.0
    for target, origin, weight in effects:
        total += abs(weight)
        if origin in ids:
            edge = ids[origin], ids[target]
            weights[edge] = weights.get(edge, 0.0) + weight
        else:
            lost += abs(weight)
    share = lost / total if total else 0.0
    metadata = {
        "slug": slug,
        "scan": scan,
        "transcoder_list": [],
        "prompt_tokens": trace.token_strings,
        "prompt": trace.model.tokenizer.decode(trace.tokens[1:]),
        "node_threshold": 1.0,  # viewers hide nodes whose influence is above it: show all that the file has
        "schema_version": 1,
        "feature_details": {"neuronpedia_source_set": source} if source else {},
        "info": {
            "generator": {"name": "tclib", "version": __version__},
            "description": f"Biases and what was pruned, {share:.0%} of all absolute effects, have no nodes here.",
        },
    }
    links = [{"source": origin, "target": target, "weight": w} for (origin, target), w in weights.items()]
    there = {node["node_id"] for node in nodes}

    def present(features: Collection[tuple[int, int, int]]) -> list[str]:
        names = (f"{layer}_{feature}_{position}" for layer, position, feature in features)
        return [name for name in names if name in there]

    supernodes = [[name, *members] for name, of in (groups or {}).items() if (members := present(of))]
    shown = dict.fromkeys([*present(pinned), *(member for _, *members in supernodes for member in members)])
    state = {"pinnedIds": list(shown), "supernodes": supernodes, "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": state, "nodes": nodes, "links": links}


def node_ids(trace: Trace, graph: Graph) -> dict[int, str]:
    """The id of the node that each row of a graph goes into; biases and a remainder go into none."""
    return _nodes(trace, graph)[1]


def _nodes(
    trace: Trace, graph: Graph, names: Callable[[int, int], str] | None = None
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    rank = _cumulative(graph)
    made: dict[str, dict[str, Any]] = {}
    ids: dict[int, str] = {}
    table = graph.nodes
    taken = {f"{n.layer}_{n.feature}_{n.position}" for n in table[table["kind"] == "feature"].itertuples()}
    targets = 0
    for row, node in enumerate(table.to_dict("records")):
        if node["kind"] not in _KINDS:
            continue
        at = int(node["position"])
        common = {"ctx_idx": at, "feature_type": _KINDS[node["kind"]], "influence": rank[row]}
        if node["kind"] == "feature":
            layer, index = int(node["layer"]), int(node["feature"])
            paired = (layer + index) * (layer + index + 1) // 2 + index  # Cantor's pairing
            new = {"node_id": f"{layer}_{index}_{at}", "feature": paired, "layer": str(layer)}
            new |= {"jsNodeId": f"{layer}_{index}-0", "activation": node["activation"]}
            new |= {"clerp": names(layer, index) if names else ""}
        elif node["kind"] in ("error", "mlp"):
            name = f"0_{node['layer']}_{at}"
            # That is also the id of layer 0's feature number ``layer``.
            name = f"error_{node['layer']}_{at}" if name in taken else name
            new = {"node_id": name, "layer": str(node["layer"]), "jsNodeId": f"{node['layer']}_{at}-0"}
        elif node["kind"] in ("embedding", "position"):
            token = int(trace.tokens[at])
            new = {"node_id": f"E_{token}_{at}", "feature": at, "layer": "E", "jsNodeId": f"E_{token}-{at}"}
        else:
            layer, token = trace.model.cfg.n_layers + 1, node["logit"]
            if pd.isna(token) or f"{layer}_{token}_{at}" in made:  # numbers behind the vocabulary, as in circuit-tracer
                token = trace.model.cfg.d_vocab + targets
            common["influence"] = None
            new = {"node_id": f"{layer}_{token}_{at}", "feature": int(token), "layer": str(layer)}
            new |= {"jsNodeId": f"L_{token}-{at}", "token_prob": node["weight"], "is_target_logit": targets == 0}
            new |= {"clerp": f"{node['name']} (p={node['weight']:.3f})"}
            targets += 1
        made.setdefault(new["node_id"], _NODE | common | new)
        ids[row] = new["node_id"]
    return list(made.values()), ids


def _cumulative(graph: Graph) -> list[float]:
    """The share of all influence that a node and the more influential ones hold together: pruning keeps low ones."""
    reached = influence(graph)
    order = reached.argsort(descending=True)
    shares = reached[order].cumsum(0) / reached.sum().clamp(min=1e-30)
    return torch.empty_like(shares).scatter(0, order, shares).tolist()
