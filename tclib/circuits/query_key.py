"""What a head's query and keys are made of: everything that wrote to the residual stream they read, in d_head numbers.

The linear algebra under `tclib.circuits.attention`. LayerNorm scales are frozen; rotary embeddings are linear anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.blocks import Norm
from tclib.sources import Each, sources
from tclib.tracing import Trace

Side = Literal["query", "key"]
# One source of a query or key. Key features, errors and biases are summed over keys and have no position.
COLUMNS = ["kind", "layer", "head", "feature", "position", "token"]


class Collected:
    """Everything that wrote what a head's query or key reads at some positions: vectors of d_head and amounts.

    Entry e is ``amounts[e, j] * rotation_j(projected[e])`` at position j and belongs to row ``owner[e]`` of the table.
    """

    def __init__(self, trace: Trace, layer: int, head: int, side: Side, positions: Int[Tensor, " pos"]):
        self.trace, self.positions, self.rotation = trace, positions, Rotation(trace, layer, positions)
        reads = _Projection.of(trace, layer, head, side)
        gain, norm_bias = trace.gain("attn_in", layer)
        self.M = trace.centre("attn_in", layer, (reads.W * gain[:, None]).T).T  # centring moved to what reads
        over = 1 / reads.scale[positions]
        amounts_over = over / trace.scale("attn_in", layer)[positions]
        self.rows: list[dict] = []
        self._parts: list[tuple[list[int], Tensor, Tensor]] = []
        here = int(positions[0]) if len(positions) == 1 else None
        for source in sources(trace, 2 * layer):
            items = source.items(positions)
            one_row = isinstance(source, Each) and source.layer is not None
            columns = {"position": [here]} if one_row else source.columns(items)
            count = 1 if one_row else len(items)
            same = {"kind": source.kind, "layer": source.layer, "position": here}
            rows = [same | {name: column[i] for name, column in columns.items()} for i in range(count)]
            self._add(rows, source.along(items, self.M), source.amounts(positions, items).T * amounts_over)
        for kind, vector in ((f"{side}_bias", reads.b), ("norm_bias", norm_bias @ reads.W)):
            if vector.any():
                row = {"kind": kind, "layer": layer, "head": head, "position": here}
                self._add([row], vector[None], over[None])
        table = pd.DataFrame(self.rows, columns=COLUMNS).astype(
            {c: "Int64" for c in ("layer", "head", "feature", "position")}
        )
        table["token"] = [None if p is pd.NA else trace.token_strings[p] for p in table["position"]]
        self.table = table
        owners, projected, amounts = zip(*self._parts, strict=True)
        self.projected, self.amounts = torch.cat(projected), torch.cat(amounts)
        self.owner = torch.tensor([row for rows in owners for row in rows], device=positions.device)

    def vectors(self, weights: Float[Tensor, " pos"]) -> Float[Tensor, "source d_head"]:
        """The sources' parts of the query or key, summed over positions with these weights."""
        return self._by_row(self.rotation.summed(self.projected, self.amounts * weights))

    def scores(self, query: Float[Tensor, " d_head"]) -> Float[Tensor, "source pos"]:
        """What every source brings to a query's score with each position."""
        return self._by_row(self.amounts * (self.projected @ self.rotation.back(query).T))

    def _by_row(self, entries: Tensor) -> Tensor:
        return entries.new_zeros(len(self.rows), entries.shape[1]).index_add_(0, self.owner, entries)

    def _add(self, rows: list[dict], projected: Tensor, amounts: Tensor) -> None:
        """One row per entry, or one row for all of them."""
        first = len(self.rows)
        owner = [first + i if len(rows) == len(projected) else first for i in range(len(projected))]
        self.rows += rows
        self._parts.append((owner, projected, amounts))


class Rotation:
    """Rotary position embeddings at some positions (Su et al. 2021); without them, and on the dimensions they leave
    alone, nothing is rotated. ``R u = cos u + sin H u`` with H swapping the halves, the first one negated."""

    def __init__(self, trace: Trace, layer: int, positions: Int[Tensor, " pos"]):
        none = trace.like.new_zeros(len(trace.tokens), 0)
        self.cos, self.sin = (
            trace.cache.get(f"blocks.{layer}.attn.hook_{part}", none)[positions].to(none) for part in ("cos", "sin")
        )
        self.size = self.cos.shape[-1]

    def summed(self, vectors: Float[Tensor, "n d"], amounts: Float[Tensor, "n pos"]) -> Float[Tensor, "n d"]:
        """sum_j amounts_j R_j vector."""
        turned, rest = vectors[:, : self.size], vectors[:, self.size :]
        turned = turned * (amounts @ self.cos) + _swap(turned) * (amounts @ self.sin)
        return torch.cat([turned, rest * amounts.sum(-1, keepdim=True)], -1)

    def back(self, vector: Float[Tensor, " d"]) -> Float[Tensor, "pos d"]:
        """R_j transposed, times the vector, for every position."""
        turned, rest = vector[: self.size], vector[self.size :]
        return torch.cat([self.cos * turned - _swap(self.sin * turned), rest.expand(len(self.cos), -1)], -1)


def _swap(vectors: Tensor) -> Tensor:
    first, second = vectors.chunk(2, dim=-1) if vectors.shape[-1] else (vectors, vectors)
    return torch.cat([-second, first], -1)


@dataclass(frozen=True)
class _Projection:
    """What makes a head's query or keys of the normalised stream: ``(x W + b) / scale``, rotated afterwards.

    The scale is 1 except where a norm follows (Qwen 3, Gemma 3, OLMo 2): it is frozen, its gain is part of W and b.
    """

    W: Float[Tensor, "d_model d_head"]
    b: Float[Tensor, " d_head"]
    scale: Float[Tensor, " pos"]

    @classmethod
    def of(cls, trace: Trace, layer: int, head: int, side: Side) -> _Projection:
        layer, head = trace.layer(layer), trace.head(head)
        attn, group = trace.model.blocks[layer].attn, trace.block(layer).group
        W, b = (attn.W_Q, attn.b_Q) if side == "query" else (attn.W_K, attn.b_K)
        own = head if side == "query" else head // group
        W, b = W[own], torch.zeros_like(W[own, 0]) if b is None else b[own]
        norm = Norm.of(getattr(attn, f"{side[0]}_norm", None), f"blocks.{layer}.attn.{side[0]}_norm")
        if norm is None:
            return cls(W, b, torch.ones_like(trace.like[:, 0]))
        scale = trace.cache[f"{norm.hook}.hook_scale"][..., 0]  # of each head, or of all heads together (OLMo 2)
        gain = norm.gain if scale.ndim == 2 else norm.gain.view(-1, W.shape[-1])[own]
        return cls(W * gain, b * gain, scale[own] if scale.ndim == 2 else scale)


def read(
    trace: Trace, layer: int, head: int, side: Side, positions: Int[Tensor, " pos"]
) -> Float[Tensor, "pos d_head"]:
    """The head's queries or keys, rotated, from the residual stream."""
    reads = _Projection.of(trace, layer, head, side)
    gain, norm_bias = trace.gain("attn_in", layer)
    normalised = trace.normalised("attn_in", layer, trace.residual("attn_in", layer))[positions]
    vectors = ((normalised * gain + norm_bias) @ reads.W + reads.b) / reads.scale[positions, None]
    return Rotation(trace, layer, positions).summed(vectors, torch.eye(len(positions)).to(vectors))


def reader_of(
    trace: Trace, layer: int, head: int, side: Side, position: int, vector: Float[Tensor, " d_head"]
) -> tuple[Float[Tensor, " d_model"], float]:
    """A vector that reads a head's rotated query or key at a position, as a reader of attention's input and a bias."""
    reads = _Projection.of(trace, layer, head, side)
    here = torch.tensor([position], device=vector.device)
    back = Rotation(trace, layer, here).back(vector)[0] / reads.scale[position]
    return reads.W @ back, (reads.b @ back).item()


def score_scale(trace: Trace, layer: int) -> float:
    """What a head's products of query and key are multiplied with."""
    return trace.model.blocks[layer].attn.original_component.scaling


def seen_from(trace: Trace, layer: int, destination: int) -> Int[Tensor, " key"]:
    """The positions that attention at a destination reaches: all before it, or those in its sliding window."""
    scores = trace.cache[f"blocks.{layer}.attn.hook_attn_scores"][0, destination, : destination + 1]
    return (scores > torch.finfo(scores.dtype).min / 2).nonzero().squeeze(-1)


@dataclass(frozen=True)
class Cap:
    """What scores pass before softmax: nothing, except in Gemma 2, whose scores are capped by tanh."""

    at: float  # 0: no cap

    @classmethod
    def of(cls, trace: Trace) -> Cap:
        """The cap of a trace's model."""
        return cls(max(trace.model.cfg.attn_scores_soft_cap, 0.0))

    def softmax(self, scores: Float[Tensor, "*n key"]) -> Float[Tensor, "*n key"]:
        """The pattern that scores give."""
        return (self.at * (scores / self.at).tanh() if self.at else scores).softmax(-1)

    def slope(self, scores: Float[Tensor, "*n key"]) -> Float[Tensor, "*n key"]:
        """The derivative of what softmax gets by the scores."""
        return 1 - (scores / self.at).tanh().square() if self.at else torch.ones_like(scores)
