"""Upper bounds on path contributions, from every node to its terminals, for a search that misses nothing.

A contribution does not only shrink along a path: where sources cancel, one of them is larger than their sum. So a
search that drops small partial paths can lose large ones. The bound here is a dynamic program over the absolute
one-step tables, layer by layer: the gain of a feature is the largest |contribution| that a whole path can bring to its
pre-activation, divided by it. A head has no table of its own (it depends on who reads it), so it gets a norm instead:
``|contribution| <= attention * |W_O reader| * reach``. That is where the bound is loose, never wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tclib.circuits.one_step import FEATURE, PromptGraph, States, Tables


@dataclass(frozen=True)
class Bounds:
    """``gains`` [write]: times a contribution, at most what a path through it brings. ``reach`` [layer, pos, head]."""

    graph: PromptGraph
    gains: Float[Tensor, " write"]
    reach: Float[Tensor, "layer pos head"]

    def beyond(self, states: States, table: Tables) -> Float[Tensor, "state source"]:
        """An upper bound of |contribution| of every path that continues through each source of a table."""
        graph, sizes = self.graph, table.values.abs()
        writes, heads = table.sources < graph.first_head, table.sources >= graph.first_head
        heads &= table.sources < graph.first_bias
        sizes[:, writes] *= self.gains[table.sources[writes]]
        before = int(heads.sum()) // (self.reach.shape[1] * self.reach.shape[2])
        if before:
            position = int(states.positions[table.states[0]])
            inner = _inner_norms(graph, states.readers[table.states], before)  # [state, layer, head]
            weights = graph.patterns[:before, :, position].transpose(1, 2)  # [layer, source, head]
            sizes[:, heads] = (inner[:, :, None] * weights * self.reach[:before]).flatten(1)
        return torch.where(table.valid, sizes, 0.0)


def _inner_norms(graph: PromptGraph, readers: Tensor, before: int) -> Float[Tensor, "state layer head"]:
    """``|W_O reader|`` of each head."""
    return torch.stack([torch.einsum("hde,ne->nhd", W_O, readers).norm(dim=-1) for W_O in _outputs(graph, before)], 1)


def _outputs(graph: PromptGraph, before: int) -> list[Float[Tensor, "head d_head d_model"]]:
    return [graph.trace.block(layer).W_O for layer in range(before)]


@torch.no_grad()
def suffix_bounds(graph: PromptGraph, ends_anywhere: bool = False) -> Bounds:
    """Gains of all features and reaches of all heads, from layer 0 upwards.

    Args:
        ends_anywhere: paths may also end at a feature or head, as they do where their length is limited.
    """
    layers, pos, heads = graph.heads
    gains, reach = torch.ones_like(graph.activations), graph.moved.new_zeros(layers, pos, heads)
    bounds = Bounds(graph, gains, reach)
    for layer in range(layers):
        joint = _joint_norms(graph, layer)
        for position in range(pos):
            reach[layer, position] = _reach(bounds, joint, layer, position, ends_anywhere)
        if layer in graph.trace.transcoders:
            for position in range(pos):
                _fill_gains(bounds, layer, position, ends_anywhere)
    # Rounding must not make a bound too small.
    return Bounds(graph, gains * (1 + 1e-4), reach * (1 + 1e-4))


def _joint_norms(graph: PromptGraph, layer: int) -> Float[Tensor, "head before second"]:
    """How much longer each head's reader can become on its way into each earlier head, at LayerNorm scale 1."""
    trace, block = graph.trace, graph.trace.block(layer)
    into = (block.W_V * trace.gain("attn_in", layer)[0][:, None]).mT
    into = block.per_head(trace.centre("attn_in", layer, into).mT)
    through = [torch.einsum("gde,hec->hgdc", W_O, into) for W_O in _outputs(graph, layer)]
    return torch.stack([torch.linalg.matrix_norm(both, 2) for both in through], 1) if layer else into[:, :0, 0]


def _reach(bounds: Bounds, joint: Tensor, layer: int, position: int, ends_anywhere: bool) -> Float[Tensor, " head"]:
    """The longest vector, in each head's own space, that anything it reads can be, gains included."""
    graph, trace = bounds.graph, bounds.graph.trace
    scale, (gain, bias) = trace.scale("attn_in", layer)[position], trace.gain("attn_in", layer)
    start, end = graph.starts[position : position + 2].tolist()
    early = graph.stages[start:end] <= trace.stage("attn_in", layer)
    rows = (graph.writes[start:end] * bounds.gains[start:end, None])[early]
    rows = torch.cat([trace.centre("attn_in", layer, rows) / scale * gain, bias[None]])
    block = trace.block(layer)
    pulled = block.per_head(torch.einsum("ne,hed->hnd", rows, block.W_V))
    if ends_anywhere:  # the head's own value is the end of a path too
        pulled = torch.cat([pulled, trace.values(layer)[position][:, None]], 1)
    longest = pulled.norm(dim=-1).amax(1)
    if layer:  # through a second head
        weighted = graph.patterns[:layer, :, position].transpose(1, 2) * bounds.reach[:layer]  # [layer, source, head]
        through = joint / scale * weighted.amax(1)  # [head, layer, second head]
        longest = torch.maximum(longest, through.flatten(1).amax(1))
    return longest


def _fill_gains(bounds: Bounds, layer: int, position: int, ends_anywhere: bool) -> None:
    """Gains of the features of one MLP at one position, from those of everything before it."""
    graph, trace = bounds.graph, bounds.graph.trace
    start, end = graph.starts[position : position + 2].tolist()
    here = (graph.layers[start:end] == layer) & (graph.kinds[start:end] == FEATURE)
    own = start + here.nonzero().squeeze(-1)
    if not len(own):
        return
    transcoder, index = trace.transcoders[layer], graph.indices[own]
    where = torch.full_like(own, position)
    readers = trace.pull_norm("mlp_in", layer, transcoder.W_enc[:, index].T, where)
    reads = torch.full_like(own, trace.stage("mlp_in", layer))
    states = States(readers, reads, where, transcoder.b_enc[index], torch.zeros_like(transcoder.b_enc[index]))
    for table in graph.tables(states):
        best = bounds.beyond(states, table).amax(1) / graph.activations[own]
        bounds.gains[own] = best.clamp(min=1.0) if ends_anywhere else best
