"""All-paths effects: every active feature's effect on every later one, and on chosen logits, over all attention paths.

Frozen are the attention patterns and LayerNorm scales of one prompt. Between transcoders the model is then one linear
map, and the effect of a source on a target sums over every route through attention (and through the affine part of
skip transcoders), but through no other feature. These are the "direct effects" of attribution graphs (Ameisen et al.
2025; circuit-tracer). The paper's one-step table (`tclib.attribution`) keeps heads apart: never mix their numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tclib.attribution import UnbalancedError
from tclib.circuits.direct_effects import CHUNK, Readers, Sources, influence_of_columns
from tclib.model import token_name
from tclib.targets import Target, before_cap
from tclib.tracing import Trace

COLUMNS = ["kind", "layer", "position", "token", "feature", "activation", "value", "weight", "name", "logit"]
TYPES = dict.fromkeys(("layer", "position", "feature", "logit"), "Int64")
TYPES |= dict.fromkeys(("activation", "value", "weight"), "float64")


@dataclass(frozen=True)
class Graph:
    """Nodes and their effects on each other: each row of the adjacency sums to its node's value.

    ``nodes`` columns: ``kind`` (feature, error, mlp, embedding, position, bias, remainder, target), ``layer``,
    ``position``, ``token``, ``feature``, ``activation`` (features), ``value`` (what the incoming effects sum to: a
    pre-activation, a logit; empty for nodes that nothing explains), ``weight`` (targets), ``name`` and
    ``logit`` (the id of the token whose logit a target is).
    """

    nodes: pd.DataFrame
    adjacency: Float[Tensor, "target source"]

    def __post_init__(self):
        check_rows(self)


@dataclass(frozen=True)
class Plan:
    """Cost of a graph, known before the heavy step."""

    features: int  # active features of the prompt
    rows: int  # of them, those that get incoming effects; the rest goes into one remainder node
    nodes: int
    bytes: int  # at the peak, beside the model and its transcoders
    flops: int


def plan(trace: Trace, max_features: int | None = None, targets: int = 10) -> Plan:
    """Count nodes, memory and multiplications of `build_graph` without doing any of it.

    Args:
        max_features: as for `build_graph`.
        targets: how many targets (10 is the most `salient_logits` gives).

    Raises:
        ValueError: a budget below 1.
    """
    if max_features is not None and max_features < 1:
        raise ValueError(f"max_features is {max_features}: give at least 1, or None for all")
    cfg, pos = trace.model.cfg, len(trace.tokens)
    by_layer = {layer: (z != 0).sum(-1) for layer, z in trace.features.items()}
    features = sum(int(count.sum()) for count in by_layer.values())
    rows_written = sum(int(count.sum()) * trace.transcoders[layer].reach for layer, count in by_layer.items())
    rows = min(features, max_features or features)
    others = pos * (cfg.n_layers + 1 + ("hook_pos_embed" in trace.cache)) + 1
    nodes = rows + others + (rows < features) + targets
    width, size = features + others, trace.like.element_size()
    matrices = nodes**2 + (2 * (rows + targets) * width if rows < features else 0)
    vectors = (features + rows_written) * cfg.d_model + 4 * cfg.n_layers * cfg.d_model * cfg.n_heads * cfg.d_head
    chunk = 6 * min(CHUNK, rows + targets) * pos * cfg.d_model
    # Attention's first step happens at one position, further ones at every position that can be seen, the last by half.
    further = torch.arange(1, pos + 1)
    steps = sum(int((n * (1 + max(layer - 0.5, 0) * further.to(n))).sum()) for layer, n in by_layer.items())
    steps = steps * rows // max(features, 1) + targets * pos * cfg.n_layers
    heads = cfg.n_heads + trace.block(0).W_V.shape[0]  # outputs of all heads, values of those that have their own
    flops = steps * 2 * cfg.d_model * heads * cfg.d_head + width * (rows + targets) * cfg.d_model // 2
    return Plan(features, rows, nodes, size * (matrices + vectors + chunk), flops)


def salient_logits(trace: Trace, position: int = -1, mass: float = 0.95, most: int = 10) -> list[tuple[Target, float]]:
    """The likeliest next tokens, until they hold ``mass`` of the probability, as (logit minus mean logit, probability).

    As circuit-tracer chooses and centres them.
    """
    position = trace.position(position)
    probabilities = trace.logits[position].softmax(-1)
    top = probabilities.topk(min(most, len(probabilities)))
    count = int((top.values.cumsum(0) < mass).sum()) + 1
    readers, biases = trace.model.W_U, trace.model.b_U
    mean, mean_bias = readers.mean(1), biases.mean()
    chosen = []
    for token, probability in zip(top.indices[:count].tolist(), top.values.tolist(), strict=False):
        name = f"logit {token_name(trace.model, token)} - mean logit{before_cap(trace)}"
        reader, bias = readers[:, token] - mean, (biases[token] - mean_bias).item()
        chosen.append((Target(name, "final", trace.model.cfg.n_layers, position, reader, bias, token), probability))
    return chosen


@torch.no_grad()
def build_graph(
    trace: Trace, targets: Sequence[tuple[Target, float]] | None = None, max_features: int | None = None
) -> Graph:
    """The graph of one prompt: every active feature, and the targets, from everything that reaches them.

    Sources are active features, transcoder errors (a whole MLP where a layer has no transcoder), token and position
    embeddings, and one bias node: all biases, those of attention, LayerNorm, transcoders and the target's own. Skip
    transcoders' affine part is linear, so paths go through it, as they go through attention (as in circuit-tracer).

    Args:
        targets: what to explain, with weights for pruning; `salient_logits` by default.
        max_features: keep this many, chosen most influential first; all others become one ``remainder`` node.

    Raises:
        ValueError: no targets, or a budget below 1.
        UnbalancedError: a row does not sum to its node within 1e-5 (float64: 1e-10) of its summed absolute values.
    """
    targets = salient_logits(trace) if targets is None else list(targets)
    if not targets:
        raise ValueError("there is nothing to explain: give at least one target with its weight")
    size = plan(trace, max_features, len(targets))
    sources = Sources(trace)
    readers = Readers.of_features(trace, sources.features)
    roots = Readers.of_targets(trace, [target for target, _ in targets])
    if size.rows == size.features:
        keep = torch.arange(size.features, device=trace.like.device)
        adjacency = trace.like.new_zeros(size.nodes, size.nodes)
        sources.effects(readers, adjacency[: len(readers), : sources.width])
        sources.effects(roots, adjacency[-len(roots) :, : sources.width])
    else:
        weights = trace.like.new_tensor([weight for _, weight in targets])
        keep, effects = _most_influential(sources, readers, roots, weights, size.rows)
        adjacency = _with_remainder(effects, keep, size.features)
    nodes = _nodes(trace, sources, keep, readers.values[keep], targets, roots)
    return Graph(nodes, adjacency)


def _most_influential(
    sources: Sources, readers: Readers, roots: Readers, weights: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """Greedy, as circuit-tracer: next the rows of the features that matter most by the rows known, a quarter a time."""
    known, effects = torch.zeros(0, dtype=torch.long, device=weights.device), sources.effects(roots)
    while len(known) < rows:
        reached = influence_of_columns(effects, weights, known)[: len(readers)]
        reached[known] = -1
        new = reached.topk(min(rows - len(known), -(-rows // 4))).indices
        effects = torch.cat([effects[: len(known)], sources.effects(readers[new]), effects[len(known) :]])
        known = torch.cat([known, new])
    order = known.argsort()
    return known[order], torch.cat([effects[: len(known)][order], effects[len(known) :]])


def _nodes(trace: Trace, sources: Sources, keep: Tensor, values: Tensor, targets: list, roots: Readers) -> pd.DataFrame:
    parts = [sources.features.iloc[keep.cpu().numpy()].assign(value=values.tolist()), sources.others]
    if len(keep) < len(sources.features):
        parts.append(pd.DataFrame([{"kind": "remainder"}]))
    rows = [
        ("target", t.layer, t.position, w, v, t.name, t.token)
        for (t, w), v in zip(targets, roots.values.tolist(), strict=True)
    ]
    parts.append(pd.DataFrame(rows, columns=["kind", "layer", "position", "weight", "value", "name", "logit"]))
    parts = [part.reindex(columns=COLUMNS).astype(TYPES) for part in parts]
    nodes = pd.concat(parts, ignore_index=True)
    nodes["token"] = [None if pd.isna(p) else trace.token_strings[p] for p in nodes["position"]]
    return nodes


def _with_remainder(effects: Tensor, keep: Tensor, n_features: int) -> Tensor:
    """Rows for features and targets as a matrix over all nodes; features that were not kept become one column."""
    rest = effects[:, :n_features].sum(1, keepdim=True) - effects[:, keep].sum(1, keepdim=True)
    effects = torch.cat([effects[:, keep], effects[:, n_features:], rest], 1)
    width, n_targets = effects.shape[1], len(effects) - len(keep)
    square = effects.new_zeros(width + n_targets, width + n_targets)
    square[: len(keep), :width] = effects[: len(keep)]
    square[width:, :width] = effects[len(keep) :]
    return square


def check_rows(graph: Graph) -> None:
    """Raise `UnbalancedError` unless every row sums to its node's value within rounding."""
    values = torch.tensor(graph.nodes["value"].tolist(), dtype=torch.float64, device=graph.adjacency.device)
    tolerance = 1e-5 if graph.adjacency.dtype == torch.float32 else 1e-10
    size = torch.linalg.vector_norm(graph.adjacency, 1, dim=1)
    off = (graph.adjacency.sum(1) - values).abs() - tolerance * size
    off[values.isnan()] = 0  # sources that nothing explains
    if not (off <= 0).all():
        worst = graph.nodes.iloc[int(off.argmax())]
        raise UnbalancedError(
            f"the effects on {worst['kind']} {worst['layer']}/{worst['feature']} at {worst['position']} do not sum to "
            f"{worst['value']:.6f}: is this a model of a supported family without other edits?"
        )
