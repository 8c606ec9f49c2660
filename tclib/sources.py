"""The one list of what writes to the residual stream of a prompt; every table, graph and search reads it.

A source is a number of items of one kind. At position p it writes the sum over its items i of

    amount[p, i] * vector[i]        features: activation and decoder row; heads: attention and value; biases: 1 and bias

and the stream that a stage reads is the sum of all sources up to it. Stages order time (`tclib.tracing.Trace.stage`):
embeddings are 0, attention of layer l is 2l + 1, its MLP 2l + 2. What differs between families of models is in
`tclib.blocks`. A cross-layer transcoder is one `Features` for each layer pair, of the layer that it reads at and the
stage that it writes at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.activations import hook_in, hook_out
from tclib.blocks import Norm
from tclib.tracing import Trace
from tclib.transcoder import writers

Items = Int[Tensor, " item"]
Positions = Int[Tensor, " some"]


@dataclass(frozen=True)
class Source:
    """Items of one kind of one layer; embeddings have no layer."""

    kind: str  # as `tclib.attribution.attribute` names it
    layer: int | None
    stage: int

    def items(self, positions: Positions) -> Items:
        """The items that write at any of these positions."""
        raise NotImplementedError

    def amounts(self, positions: Positions, items: Items) -> Float[Tensor, "some item"]:
        """How much of each item is written at each position."""
        raise NotImplementedError

    def vectors(self, items: Items) -> Float[Tensor, "item d_model"]:
        """What is written of each item."""
        raise NotImplementedError

    def along(self, items: Items, readers: Float[Tensor, "d_model reader"]) -> Float[Tensor, "item reader"]:
        """The items' vectors as readers see them."""
        return self.vectors(items) @ readers

    def columns(self, items: Items) -> dict[str, list[int]]:
        """What tells an item from the others of its source, as columns of a table."""
        return {}


@dataclass(frozen=True)
class Each(Source):
    """One vector per position, written there: embeddings, whole MLPs, errors, skip paths."""

    rows: Callable[[Positions], Float[Tensor, "some d_model"]]

    def items(self, positions: Positions) -> Items:
        return positions

    def amounts(self, positions: Positions, items: Items) -> Float[Tensor, "some item"]:
        return (positions[:, None] == items).float()

    def vectors(self, items: Items) -> Float[Tensor, "item d_model"]:
        return self.rows(items)

    def columns(self, items: Items) -> dict[str, list[int]]:
        return {"position": items.tolist()}


@dataclass(frozen=True)
class Biases(Source):
    """Constant vectors: one of attention's output and of a transcoder, one per head of attention's values."""

    biases: Float[Tensor, "item d_model"]
    over: Float[Tensor, "pos item"]  # the amounts

    def items(self, positions: Positions) -> Items:
        return torch.arange(len(self.biases), device=positions.device)

    def amounts(self, positions: Positions, items: Items) -> Float[Tensor, "some item"]:
        return self.over[positions]

    def vectors(self, items: Items) -> Float[Tensor, "item d_model"]:
        return self.biases[items]

    def columns(self, items: Items) -> dict[str, list[int]]:
        return {"head": items.tolist()} if self.kind == "value_bias" else {}


@dataclass(frozen=True)
class Features(Source):
    """The features of a transcoder; an item is a feature."""

    z: Float[Tensor, "pos d_features"]
    W_dec: Float[Tensor, "d_features d_model"]
    after: Norm | None  # between the transcoder's output and the stream
    over: Float[Tensor, " pos"]  # 1 / its frozen scale

    def items(self, positions: Positions) -> Items:
        return (self.z[positions] != 0).any(0).nonzero().squeeze(-1)

    def amounts(self, positions: Positions, items: Items) -> Float[Tensor, "some item"]:
        return self.z[positions][:, items] * self.over[positions, None]

    def vectors(self, items: Items) -> Float[Tensor, "item d_model"]:
        return _through(self.after, self.W_dec[items])

    def columns(self, items: Items) -> dict[str, list[int]]:
        return {"feature": items.tolist(), "written": [self.stage // 2 - 1] * len(items)}

    @cached_property
    def written(self) -> tuple[Int[Tensor, " pair"], Items, Float[Tensor, "pair d_model"]]:
        """All active pairs, by position and feature, and what each writes."""
        positions, index = self.z.nonzero(as_tuple=True)
        rows = self.vectors(index)
        return positions, index, rows.mul_((self.z[positions, index] * self.over[positions])[:, None])


@dataclass(frozen=True)
class Heads(Source):
    """Attention without its biases; an item is a head and a source position, in this order."""

    values: Float[Tensor, "source head d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    pattern: Float[Tensor, "head target source"]

    def items(self, positions: Positions) -> Items:
        heads, pos, _ = self.pattern.shape
        seen = torch.arange(int(positions.max()) + 1, device=positions.device)
        return (pos * torch.arange(heads, device=positions.device)[:, None] + seen).flatten()

    def amounts(self, positions: Positions, items: Items) -> Float[Tensor, "some item"]:
        heads, sources = self._split(items)
        return self.pattern[heads[:, None], positions, sources[:, None]].T

    def vectors(self, items: Items) -> Float[Tensor, "item d_model"]:
        return self.moved().flatten(0, 1)[items]

    def moved(self) -> Float[Tensor, "head source d_model"]:
        """What each head moves from each position with attention 1."""
        return self.values.transpose(0, 1) @ self.W_O

    def along(self, items: Items, readers: Float[Tensor, "d_model reader"]) -> Float[Tensor, "item reader"]:
        through = (self.values.transpose(0, 1) @ (self.W_O @ readers)).flatten(0, 1)  # in d_head, not d_model, numbers
        return through[items]

    def columns(self, items: Items) -> dict[str, list[int]]:
        heads, sources = self._split(items)
        return {"head": heads.tolist(), "position": sources.tolist()}

    def _split(self, items: Items) -> tuple[Items, Items]:
        pos = len(self.values)
        return items // pos, items % pos


def sources(trace: Trace, last: int | None = None) -> Iterator[Source]:
    """Everything that has written when a stage reads: all stages up to ``last``, by default the final one."""
    last = trace.stage("final", 0) if last is None else last
    for kind, name in (("embedding", "hook_embed"), ("position", "hook_pos_embed")):
        if name in trace.cache:
            yield Each(kind, None, 0, trace.cache[name].__getitem__)
    for layer in range(trace.model.cfg.n_layers):
        if 2 * layer + 1 <= last:
            yield from of_attention(trace, layer)
        if 2 * layer + 2 <= last:
            yield from of_mlp(trace, layer)


def of_attention(trace: Trace, layer: int) -> Iterator[Source]:
    """The heads of a layer and, where the model has them, the biases of their values and of their output."""
    block, pattern, stage = trace.block(layer), trace.pattern(layer), 2 * layer + 1
    yield Heads("head", layer, stage, trace.values(layer), block.W_O, pattern)
    if block.b_V.any():
        written = (block.per_head(block.b_V)[:, None] @ block.W_O)[:, 0]
        yield Biases("value_bias", layer, stage, written, pattern.sum(-1).T)
    if block.b_O.any():
        yield Biases("attention_bias", layer, stage, block.b_O[None], 1 / trace.frozen_scale(block.after_attn)[:, None])


def of_mlp(trace: Trace, layer: int) -> Iterator[Source]:
    """The features that write to an MLP's output and what they miss of it; without a transcoder the MLP as a whole."""
    transcoder, stage = trace.transcoders.get(layer), 2 * layer + 2
    if transcoder is None:
        yield Each("mlp", layer, stage, trace.cache[hook_out(layer)].__getitem__)
        return
    after = trace.after_mlp(layer)
    x, out, over = trace.cache[hook_in(layer)], trace.cache[transcoder.config.hook_out], 1 / trace.frozen_scale(after)
    features = [
        Features("feature", at, stage, trace.features[at], rows, after, over)
        for at, rows in writers(trace.transcoders, layer).items()
    ]
    bias = _through(after, transcoder.b_dec)

    def skip(positions: Positions) -> Tensor:
        return skip_path(trace, layer, x, positions)

    def error(positions: Positions) -> Tensor:
        missed = (_through(after, out[positions]) - bias) * over[positions, None]
        for part in features:
            if len(positions) == len(over):
                where, _, rows = part.written
            else:
                where, index = part.z[positions].nonzero(as_tuple=True)
                rows = part.vectors(index) * (part.z[positions[where], index] * over[positions[where]])[:, None]
            missed = missed.index_add(0, where, rows, alpha=-1)
        return missed if transcoder.W_skip is None else missed - skip(positions)

    yield from features
    if transcoder.W_skip is not None:
        yield Each("skip", layer, stage, skip)
    yield Each("error", layer, stage, error)
    yield Biases("transcoder_bias", layer, stage, bias[None], over[:, None])


def skip_path(
    trace: Trace, layer: int, x: Float[Tensor, "pos d_model"], positions: Positions | slice = slice(None)
) -> Float[Tensor, "some d_model"]:
    """What a skip transcoder's affine part writes for an input (all positions of it) at some positions."""
    after, W_skip = trace.after_mlp(layer), trace.transcoders[layer].W_skip
    assert W_skip is not None
    written = _through(after, x[positions] @ W_skip)
    return written / trace.frozen_scale(after)[positions, None]


def _through(after: Norm | None, vectors: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
    """Vectors as a norm after them writes them, before its frozen scale divides them."""
    return vectors if after is None else after.centre(vectors) * after.gain
