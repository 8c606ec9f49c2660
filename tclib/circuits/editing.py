"""Edit a circuit: prune and group its nodes without losing flow, take its features out or set them to a value.

Pure functions of a circuit (`path_graph.merge`), of a graph or of a trace; the explorer `tclib.ui.editor` measures and
predicts by them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import networkx as nx
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tclib import interventions
from tclib.activations import hook_in, hook_out
from tclib.circuits import validation
from tclib.circuits.graph import Graph
from tclib.circuits.one_step import BIASES, PromptGraph
from tclib.circuits.path_graph import UNLISTED, merge
from tclib.circuits.path_search import SearchResult, best_first
from tclib.plots import feature_name
from tclib.targets import Target
from tclib.tracing import Trace

MOST_TABLES, MOST_PATHS = 400, 300  # of one search, so that it answers soon and can be drawn
FROZEN: dict[str, tuple[interventions.Frozen, ...]] = {
    "all else answers": (),
    "attention frozen": ("patterns", "scales"),
    "all else frozen": ("patterns", "scales", "mlps"),
}


def search(graph: PromptGraph, target: Target, share: float) -> tuple[SearchResult, nx.DiGraph]:
    """Paths of at least ``share`` of the target's value, at most `MOST_PATHS`, and the circuit they merge into."""
    found = best_first(graph, target, share * abs(target.value(graph.trace)), limit=MOST_TABLES)
    if rest := [path.contribution for path in found.paths[MOST_PATHS:]]:
        found = replace(
            found,
            paths=found.paths[:MOST_PATHS],
            remainder=found.remainder + sum(rest),
            absolute=found.absolute + sum(map(abs, rest)),
            guarantee=max(found.guarantee, abs(rest[0])),
        )
    return found, merge(graph, target, found.paths)


def contract(circuit: nx.DiGraph, nodes: Collection[str], name: str, **attributes) -> nx.DiGraph:
    """Merge some nodes of a circuit into one; what flows to and between the other nodes is unchanged.

    A node of that name that is there already is joined by them.
    """
    members = set(nodes) | ({name} & set(circuit))
    result = nx.DiGraph(**circuit.graph)
    result.add_nodes_from((n, dict(d)) for n, d in circuit.nodes(data=True) if n not in members)
    result.add_node(name, **attributes)
    for source, reader, weight in circuit.edges(data="weight"):
        ends = (name if source in members else source, name if reader in members else reader)
        if ends[0] != ends[1]:
            before = result.edges[ends]["weight"] if result.has_edge(*ends) else 0.0
            result.add_edge(*ends, weight=before + weight)
    result.nodes[name]["contribution"] = float(result.out_degree(name, weight="weight"))
    return result


def prune(circuit: nx.DiGraph, top: int, pinned: Collection[str] = ()) -> nx.DiGraph:
    """The ``top`` largest nodes, the pinned ones, and from each of these its strongest way to the target; all others
    become the remainder.

    Raises:
        ValueError: a pinned node that the circuit does not have.
    """
    if unknown := set(pinned) - set(circuit):
        raise ValueError(f"the circuit has no node {sorted(unknown)[0]!r}: lower the threshold, or unpin it")
    listed = [n for n in circuit if not apart(circuit, n)]
    kept = set(sorted(listed, key=lambda n: -abs(circuit.nodes[n]["contribution"]))[:top]) | set(pinned)
    for node in list(kept):
        while circuit.nodes[node]["kind"] != "target":
            node = max(circuit.out_edges(node, data="weight"), key=lambda edge: abs(edge[2]))[1]
            kept.add(node)
    dropped = set(listed) - kept - {n for n in circuit if circuit.nodes[n]["kind"] == "target"}
    return contract(circuit, dropped, "remainder", kind="remainder") if dropped else circuit.copy()


def group(circuit: nx.DiGraph, nodes: Collection[str], name: str) -> nx.DiGraph:
    """Several nodes as one, which stands at the highest layer and last position of its members.

    Raises:
        ValueError: fewer than two nodes, or one that cannot be grouped.
    """
    if len(set(nodes)) < 2:
        raise ValueError("a group needs at least two nodes: choose several (with Shift or Ctrl)")
    if wrong := [n for n in nodes if n not in circuit or apart(circuit, n)]:
        raise ValueError(f"{wrong[0]} cannot be part of a group: choose nodes of the circuit other than the answer")
    data = [circuit.nodes[n] for n in nodes]
    top = max(data, key=lambda d: (d.get("layer", -1), d["kind"] != "head"))
    last = max(data, key=lambda d: d.get("position", 0))
    place = {k: d[k] for d, keys in ((top, ("layer",)), (last, ("position", "token"))) for k in keys if k in d}
    if top["kind"] == "head":
        place["part"] = "attn"
    return contract(circuit, nodes, name, kind=f"{name} ({len(set(nodes))})", **place)


def imbalance(circuit: nx.DiGraph) -> float:
    """The largest difference between what enters and what leaves a node that is no end; the remainder may be one."""
    gaps = [
        abs(circuit.in_degree(n, weight="weight") - circuit.nodes[n]["contribution"])
        for n, d in circuit.nodes(data=True)
        if circuit.in_degree(n) and d["kind"] in ("feature", "head", "target")
    ]
    return float(max(gaps, default=0.0))


def ablation(
    trace: Trace,
    target: Target,
    nodes: Sequence[tuple[int, int, int]],
    frozen: str,
) -> pd.DataFrame:
    """Features taken out: predicted and measured change of the target, each alone and all together.

    Args:
        nodes: (layer, position, feature) of active features.
        frozen: a key of `FROZEN`. With all else frozen the prediction is exact.

    Raises:
        ValueError: no features, a silent one, or skip transcoders with MLPs frozen.
    """
    if not nodes:
        raise ValueError("there is no feature to take out: choose some (heads and tokens cannot be)")
    table = pd.DataFrame(nodes, columns=["layer", "position", "feature"])
    each = validation.compare(trace, table, [target], FROZEN[frozen])
    names = [f"{feature_name(layer, feature)}@{position}" for layer, position, feature in nodes]
    rows = pd.DataFrame({"without": names, "predicted": each["predicted"], "measured": each["measured"]})
    if len(nodes) > 1:
        change = target.value(edited_trace(trace, nodes, [0.0] * len(nodes), frozen)) - target.value(trace)
        rows.loc[len(rows)] = ["all of them", rows["predicted"].sum(), change]
    return rows


@torch.no_grad()
def edited_trace(trace: Trace, nodes: Sequence[tuple[int, int, int]], values: Sequence[float], frozen: str) -> Trace:
    """The prompt with features set to values, all at once: residual stream, scales, logits and features are the edited
    model's. An edited feature keeps its value whatever earlier edits would have made of it; ``features`` has what its
    encoder reads.

    Args:
        nodes, values, frozen: as in `ablation`.
    """
    hooks = interventions.freeze(trace.cache, FROZEN[frozen])
    together: dict[tuple[int, int], dict[int, float]] = {}
    for (layer, position, feature), value in zip(nodes, values, strict=True):
        together.setdefault((layer, position), {})[feature] = float(value)
    for (layer, position), new in together.items():
        transcoder, z = trace.transcoders[layer], trace.features[layer][position]
        goal = z.index_put((z.new_tensor(list(new), dtype=torch.long),), z.new_tensor(list(new.values())))
        if "mlps" not in FROZEN[frozen]:
            hooks += interventions.set_features(layer, transcoder, list(new), goal, position)
            continue
        for later in range(transcoder.reach):  # frozen outputs hold what the features wrote before
            added = torch.zeros_like(trace.cache[hook_out(layer)])
            added[position] = (goal - z) @ transcoder.rows(later)
            writes = trace.transcoders[layer + later].config.hook_out
            hooks.append((writes, lambda y, hook, added=added: y + added))
    needed = {name for name in trace.cache if "hook_resid" in name or name.endswith(("hook_scale", "hook_embed"))}
    needed |= {"ln_final.hook_normalized", *map(hook_in, trace.transcoders)}
    with interventions.edited(trace.model, hooks):
        _, cache = trace.model.run_with_cache(trace.tokens[None], names_filter=needed.__contains__)
    kept = {name: value[0] for name, value in cache.items()}
    features = {layer: t.encode(kept[hook_in(layer)]) for layer, t in trace.transcoders.items()}
    return replace(trace, cache=kept, features=features)


@torch.no_grad()
def predict(trace: Trace, graph: Graph, edits: Mapping[int, float], frozen: str) -> Float[Tensor, " node"]:
    """What a graph says that edits change: of each feature its activation, of each target its value; 0 elsewhere.

    The effects of what is edited add up. With all else frozen that is all, and exact for targets; otherwise later
    features answer, layer by layer, by their own threshold, and pass on what that changes. Silent features, errors,
    attention and LayerNorm scales do not answer (Ameisen et al. 2025), nor do TopK's features compete.

    Args:
        edits: row of a feature in the graph to its new activation.
        frozen: a key of `FROZEN`.

    Raises:
        ValueError: all else frozen with skip transcoders, whose skip paths are in the graph.
    """
    if "mlps" in FROZEN[frozen] and any(t.W_skip is not None for t in trace.transcoders.values()):
        raise ValueError(
            "the effects in this graph run through skip paths, which frozen MLPs cut: choose 'attention frozen' instead"
        )
    nodes, effects = graph.nodes, graph.adjacency
    old, value = (effects.new_tensor(nodes[name].fillna(0).tolist()) for name in ("activation", "value"))
    change, moved = torch.zeros_like(old), torch.zeros_like(old)  # moved: as a share of the old activation
    for row, new in edits.items():
        change[row] = new - old[row]
        moved[row] = change[row] / old[row]
    for layer, transcoder in sorted(trace.transcoders.items()):
        here = ((nodes["kind"] == "feature") & (nodes["layer"] == layer)).to_numpy().nonzero()[0].tolist()
        rows = torch.tensor([row for row in here if row not in edits], dtype=torch.long, device=old.device)
        pre, threshold = value[rows] + effects[rows] @ moved, transcoder.threshold
        least = 0 if threshold is None else threshold[nodes["feature"].iloc[rows.tolist()].tolist()]
        change[rows] = pre * (pre > least) * (pre > 0) - old[rows]
        if "mlps" not in FROZEN[frozen]:
            moved[rows] = change[rows] / old[rows]
    ends = torch.tensor((nodes["kind"] == "target").to_numpy(), device=old.device)
    change[ends] = effects[ends] @ moved
    return change


def apart(circuit: nx.DiGraph, node: str) -> bool:
    """Whether a node is the target or stands for what no path lists: it can be neither grouped nor taken out."""
    data = circuit.nodes[node]
    return data["kind"] in ("target", *BIASES) or (data["kind"] in UNLISTED and "layer" not in data)
