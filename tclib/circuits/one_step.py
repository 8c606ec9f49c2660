"""All one-step tables of one prompt, ready for a search: what `tclib.attribution` gives, for many readers at once.

A path runs from a target back through active features and attention heads (paper, section 4.1). A feature i that
contributes c to a path passes it on to the sources of its pre-activation, scaled by c / pre_i; a head passes it on to
the sources of what it read. The activation of an active feature equals its pre-activation for every architecture here
(ReLU, TopK, BatchTopK, JumpReLU), so a path's contributions always add up: nothing is lost at a nonlinearity.

Set up once: everything written to the residual stream as rows of one matrix, ordered by position and time, and what
each head moves from each position. The table of any reader is then one product with a part of those rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tclib.sources import Features, Heads, sources
from tclib.targets import Target
from tclib.tracing import Trace

KINDS = ("embedding", "position", "attention_bias", "value_bias", "mlp", "feature", "skip", "error", "transcoder_bias")
FEATURE = KINDS.index("feature")
ERRORS = ("error", "mlp")
BIASES = ("attention_bias", "value_bias", "transcoder_bias", "norm_bias", "target_bias")


class Node(NamedTuple):
    """A source in a path. Kinds are those of `tclib.attribution.attribute`; fields that do not apply are None.

    A head's ``position`` is where it reads. The biases of a reader (its own b_enc, its LayerNorm's) carry its fields.
    """

    kind: str
    layer: int | None = None
    head: int | None = None
    position: int | None = None
    feature: int | None = None

    @property
    def goes_on(self) -> bool:
        """Whether a path continues from here: features and heads; everything else is terminal."""
        return self.kind in ("feature", "head")

    @property
    def name(self) -> str:
        """A name of its own in the paper's notation: ``mlp1[207]@5``, ``attn2.h3@4``, ``embedding@4``."""
        part = "" if self.layer is None else f"{'mlp' if self.head is None else 'attn'}{self.layer}"
        part += "" if self.head is None else f".h{self.head}"
        part += "" if self.feature is None else f"[{self.feature}]"
        if self.kind == "attention_bias":
            part, kind = f"attn{self.layer}", "bias"
        elif self.kind == "target_bias" and part:
            kind = "own bias"
        else:
            kind = "" if self.kind in ("feature", "head", "mlp") else self.kind.replace("_", " ")
        return f"{part} {kind}".strip() + ("" if self.position is None else f"@{self.position}")


@dataclass(frozen=True)
class States:
    """Where a number of paths have arrived: each reads the residual stream, scaled by its path so far."""

    readers: Float[Tensor, "state d_model"]
    reads: Int[Tensor, " state"]  # the last stage that has written to what it reads, see `PromptGraph.stages`
    positions: Int[Tensor, " state"]
    own_bias: Float[Tensor, " state"]  # b_enc or b_U
    norm_bias: Float[Tensor, " state"]  # of the LayerNorm it reads through

    def __getitem__(self, rows: Int[Tensor, " some"]) -> States:
        return States(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Tables:
    """One-step contributions to those ``states`` of a batch that stand at one position, over the same sources."""

    states: Int[Tensor, " state"]
    sources: Int[Tensor, " source"]
    values: Float[Tensor, "state source"]
    valid: Bool[Tensor, "state source"]  # False where the source comes too late or does not exist


@dataclass(frozen=True)
class PromptGraph:
    """The set-up of one prompt. Sources are numbered: writes, then heads by (layer, position, head), then two biases.

    ``stages`` orders time: embeddings 0, attention of layer l is 2l+1, its MLP 2l+2.
    """

    trace: Trace
    writes: Float[Tensor, "write d_model"]  # by position, then stage
    stages: Int[Tensor, " write"]
    layers: Int[Tensor, " write"]  # which a source belongs to, and a feature reads at; -1 for embeddings
    kinds: Int[Tensor, " write"]
    indices: Int[Tensor, " write"]  # feature, or head of a value bias
    activations: Float[Tensor, " write"]  # of features; 1 for others
    starts: Int[Tensor, " pos+1"]  # first write of each position, and the end
    moved: Float[Tensor, "layer pos head d_model"]  # what a head moves with attention 1, without its value bias
    patterns: Float[Tensor, "layer head target source"]

    @cached_property
    def heads(self) -> tuple[int, int, int]:
        """How many layers, positions and heads there are."""
        layers, pos, heads, _ = self.moved.shape
        return layers, pos, heads

    @property
    def first_head(self) -> int:
        """The number of the first head source."""
        return len(self.writes)

    @property
    def first_bias(self) -> int:
        """The number of the reader's own bias; the next one is its LayerNorm's."""
        layers, pos, heads = self.heads
        return self.first_head + layers * pos * heads

    def node(self, source: int, reader: Node | None = None) -> Node:
        """What stands behind a number; ``reader`` (None: the target) owns the two biases."""
        if source >= self.first_bias:
            kind = "target_bias" if source == self.first_bias else "norm_bias"
            return Node(kind) if reader is None else Node(kind, *reader[1:])
        if source >= self.first_head:
            _, pos, heads = self.heads
            layer, rest = divmod(source - self.first_head, pos * heads)
            return Node("head", layer, rest % heads, rest // heads)
        kind, at, index = KINDS[self.kinds[source]], int(self.layers[source]), int(self.indices[source])
        position = int((self.starts <= source).sum()) - 1
        layer = at if at >= 0 else None
        head, feature = (index if kind == k else None for k in ("value_bias", "feature"))
        return Node(kind, layer, head, position, feature)

    def root(self, target: Target) -> States:
        """The start of every path: the target itself."""
        reads = self.trace.stage(target.place, target.layer)
        make = self.writes.new_tensor
        return States(
            target.pulled_back(self.trace)[None],
            torch.tensor([reads], device=self.writes.device),
            torch.tensor([target.position], device=self.writes.device),
            make([target.bias]),
            make([target.norm_bias(self.trace)]),
        )

    def tables(self, states: States) -> Iterator[Tables]:
        """The one-step contributions to every state, as `attribute` gives them, grouped by position."""
        layers, pos, heads = self.heads
        for position in states.positions.unique().tolist():
            rows = (states.positions == position).nonzero().squeeze(-1)
            readers, reads = states.readers[rows], states.reads[rows]
            start, end = self.starts[position : position + 2].tolist()
            latest = int(reads.max())
            end = start + int((self.stages[start:end] <= latest).sum())
            before = (latest + 1) // 2  # layers whose attention some state reads
            through = (self.moved[:before].flatten(0, 2) @ readers.T).T.view(len(rows), before, pos, heads)
            weights = self.patterns[:before, :, position].transpose(1, 2)  # [layer, source, head]
            biases = torch.stack([states.own_bias[rows], states.norm_bias[rows]], 1)
            values = torch.cat([readers @ self.writes[start:end].T, (through * weights).flatten(1), biases], 1)
            in_time = (2 * torch.arange(before, device=reads.device) + 1)[:, None, None] <= reads[:, None, None, None]
            causal = torch.arange(pos, device=reads.device)[:, None].expand(pos, heads) <= position
            early = self.stages[start:end] <= reads[:, None]
            valid = torch.cat([early, (in_time & causal).flatten(1), biases != 0], 1)
            sources = torch.cat([
                torch.arange(start, end), self.first_head + torch.arange(before * pos * heads),
                self.first_bias + torch.arange(2),
            ]).to(reads.device)  # fmt: skip
            yield Tables(rows, sources, values, valid)

    def follow(self, parents: States, sources: Int[Tensor, " state"], values: Float[Tensor, " state"]) -> States:
        """The states behind features and heads that contribute ``values`` to ``parents``, one source for each."""
        trace, (_, pos, heads) = self.trace, self.heads
        readers, norm_bias = torch.empty_like(parents.readers), torch.zeros_like(parents.norm_bias)
        own_bias, reads, positions = torch.zeros_like(norm_bias), torch.empty_like(sources), torch.empty_like(sources)
        written = sources < self.first_head
        for layer in self.layers[sources[written]].unique().tolist():
            rows = written.nonzero().squeeze(-1)
            rows = rows[self.layers[sources[rows]] == layer]
            s, transcoder = sources[rows], trace.transcoders[layer]
            index, here = self.indices[s], torch.searchsorted(self.starts, s, right=True) - 1
            weight = values[rows] / self.activations[s]
            readers[rows] = weight[:, None] * trace.pull_norm("mlp_in", layer, transcoder.W_enc[:, index].T, here)
            own_bias[rows] = weight * transcoder.b_enc[index]
            positions[rows], reads[rows] = here, trace.stage("mlp_in", layer)
        layers = torch.where(written, -1, (sources - self.first_head) // (pos * heads))
        for layer in layers.unique().tolist():
            rows = (layers == layer).nonzero().squeeze(-1)
            if layer < 0:
                continue
            offset = sources[rows] - self.first_head
            head, here = offset % heads, offset // heads % pos
            weight = self.patterns[layer, head, parents.positions[rows], here]
            block = trace.block(layer)
            inner = torch.einsum("nde,ne->nd", block.W_O[head], parents.readers[rows])
            outer = weight[:, None] * torch.einsum("ned,nd->ne", block.W_V[head // block.group], inner)
            readers[rows] = trace.pull_norm("attn_in", layer, outer, here)
            norm_bias[rows] = outer @ trace.gain("attn_in", layer)[1]
            positions[rows], reads[rows] = here, trace.stage("attn_in", layer)
        return States(readers, reads, positions, own_bias, norm_bias)


@torch.no_grad()
def prompt_graph(trace: Trace) -> PromptGraph:
    """Collect a prompt's writes and what its heads move. One set-up serves every target and search."""
    parts, moved, patterns = [], [], []
    everywhere = torch.arange(len(trace.tokens), device=trace.like.device)
    for source in sources(trace):
        if isinstance(source, Heads):
            moved.append(source.moved().transpose(0, 1))
            patterns.append(source.pattern)
            continue
        if isinstance(source, Features):
            positions, items, rows = source.written
            activations = source.z[positions, items]
        else:
            every = source.items(everywhere)
            amounts = source.amounts(everywhere, every)
            positions, which = amounts.nonzero(as_tuple=True)
            items = every[which] if source.kind == "value_bias" else torch.full_like(which, -1)
            rows = amounts[positions, which][:, None] * source.vectors(every)[which]
            activations = torch.ones_like(rows[:, 0])
        layer = -1 if source.layer is None else source.layer
        same = tuple(torch.full_like(positions, x) for x in (source.stage, layer, KINDS.index(source.kind)))
        parts.append((rows, *same, items, positions, activations))
    stages, layers, kinds, indices, positions, activations = (
        torch.cat(column) for column in zip(*(part[1:] for part in parts), strict=True)
    )
    order = (positions * (trace.stage("final", 0) + 1) + stages).argsort(stable=True)
    writes = trace.like.new_empty(len(order), trace.like.shape[-1])
    place = order.argsort()
    for rows, where in zip((p[0] for p in parts), place.split([len(p[0]) for p in parts]), strict=True):
        writes[where] = rows
    counts = torch.bincount(positions, minlength=len(trace.tokens))
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    stages, layers, kinds, indices, activations = (c[order] for c in (stages, layers, kinds, indices, activations))
    heads = torch.stack(moved), torch.stack(patterns)
    return PromptGraph(trace, writes, stages, layers, kinds, indices, activations, starts, *heads)
