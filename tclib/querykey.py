"""What a head's query and keys are made of: everything that wrote to the residual stream they read, in d_head numbers.

The linear algebra under `tclib.attention`. LayerNorm scales are frozen; rotary embeddings are linear anyway.
"""

from __future__ import annotations

from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.activations import hook_in, hook_out
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
        self.W, b = _weights(trace, layer, head, side)
        gain, norm_bias = trace.gain("attn_in", layer)
        scaled = self.W * gain[:, None]
        self.M = scaled - scaled.mean(0)  # centring moved from what is read to what reads it
        self.over = 1 / trace.scale("attn_in", layer)[positions]
        self.rows, self.owner, self.projected, self.amounts = [], [], [], []
        one_place = len(positions) == 1
        self.here = int(positions[0]) if one_place else None
        W_O = trace.model.W_O  # this property copies: once
        for before in range(layer):
            self._heads(before, W_O[before])
            self._mlp(before)
        for kind, name in (("embedding", "hook_embed"), ("position", "hook_pos_embed")):
            if name in trace.cache:
                rows = [{"kind": kind, "position": p} for p in positions.tolist()]
                self._add(rows, trace.cache[name][positions] @ self.M, torch.diag(self.over))
        for kind, vector in ((f"{side}_bias", b), ("norm_bias", norm_bias @ self.W)):
            if vector.any():
                row = {"kind": kind, "layer": layer, "head": head, "position": self.here}
                self._add([row], vector[None], torch.ones_like(self.over)[None])
        table = pd.DataFrame(self.rows, columns=COLUMNS).astype(
            {c: "Int64" for c in ("layer", "head", "feature", "position")}
        )
        table["token"] = [None if p is pd.NA else trace.token_strings[p] for p in table["position"]]
        self.table = table
        self.projected, self.amounts = torch.cat(self.projected), torch.cat(self.amounts)
        self.owner = torch.tensor(self.owner, device=positions.device)

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
        self.owner += range(first, first + len(rows)) if len(rows) == len(projected) else [first] * len(projected)
        self.rows += rows
        self.projected.append(projected)
        self.amounts.append(amounts)

    def _heads(self, before: int, W_O: Float[Tensor, "head d_head d_model"]) -> None:
        model, cache = self.trace.model, self.trace.cache
        last = int(self.positions[-1]) + 1
        b_V = model.b_V[before]
        through = W_O @ self.M  # [head, d_head, d_head]
        values = cache[f"blocks.{before}.attn.hook_v"][:last].transpose(0, 1) - b_V[:, None]  # [head, source, d_head]
        pattern = cache[f"blocks.{before}.attn.hook_pattern"][:, self.positions, :last]  # [head, pos, source]
        rows = [
            {"kind": "head", "layer": before, "head": head, "position": source}
            for head in range(len(pattern))
            for source in range(last)
        ]
        amounts = (pattern * self.over[:, None]).transpose(1, 2)
        self._add(rows, (values @ through).flatten(0, 1), amounts.flatten(0, 1))
        if b_V.any():
            rows = [
                {"kind": "value_bias", "layer": before, "head": h, "position": self.here} for h in range(len(pattern))
            ]
            self._add(rows, (b_V[:, None] @ through)[:, 0], pattern.sum(-1) * self.over)
        row = {"kind": "attention_bias", "layer": before, "position": self.here}
        self._add([row], (model.b_O[before] @ self.M)[None], self.over[None])

    def _mlp(self, before: int) -> None:
        trace, own = self.trace, {"layer": before, "position": self.here}
        out, diagonal = trace.cache[hook_out(before)][self.positions], torch.diag(self.over)
        if before not in trace.transcoders:
            return self._add([{"kind": "mlp", **own}], out @ self.M, diagonal)
        transcoder, z = trace.transcoders[before], trace.features[before][self.positions]
        x = trace.cache[hook_in(before)][self.positions]
        active = (z != 0).any(0).nonzero().squeeze(-1)
        rows = [{"kind": "feature", "feature": index, **own} for index in active.tolist()]
        self._add(rows, transcoder.W_dec[active] @ self.M, (z[:, active] * self.over[:, None]).T)
        if transcoder.W_skip is not None:
            self._add([{"kind": "skip", **own}], x @ transcoder.W_skip @ self.M, diagonal)
        self._add([{"kind": "error", **own}], (out - transcoder.decode(z, x)) @ self.M, diagonal)
        self._add([{"kind": "transcoder_bias", **own}], (transcoder.b_dec @ self.M)[None], self.over[None])


class Rotation:
    """Rotary position embeddings at some positions (Su et al. 2021); without them, and on the dimensions they leave
    alone, nothing is rotated. ``R u = cos u + sin H u`` with H swapping the halves, the first one negated."""

    def __init__(self, trace: Trace, layer: int, positions: Int[Tensor, " pos"]):
        none = trace.like.new_zeros(len(trace.tokens), 0)
        self.cos, self.sin = (
            trace.cache.get(f"blocks.{layer}.attn.hook_{part}", none)[positions] for part in ("cos", "sin")
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


def read(trace: Trace, layer: int, head: int, side: Side, positions: Tensor) -> Float[Tensor, "pos d_head"]:
    """The head's queries or keys, rotated, from the residual stream."""
    W, b = _weights(trace, layer, head, side)
    gain, norm_bias = trace.gain("attn_in", layer)
    stream = trace.residual("attn_in", layer)[positions]
    read = (stream - stream.mean(-1, keepdim=True)) / trace.scale("attn_in", layer)[positions, None]
    vectors = (read * gain + norm_bias) @ W + b
    return Rotation(trace, layer, positions).summed(vectors, torch.eye(len(positions)).to(vectors))


def _weights(trace: Trace, layer: int, head: int, side: Side) -> tuple[Tensor, Tensor]:
    model, layer, head = trace.model, trace.layer(layer), trace.head(head)
    W, b = (model.W_Q, model.b_Q) if side == "query" else (model.W_K, model.b_K)
    return W[layer, head], b[layer, head]


def score_scale(trace: Trace, layer: int) -> float:
    cfg = trace.model.cfg
    return cfg.d_head**-0.5 / (layer + 1 if getattr(cfg, "scale_attn_by_inverse_layer_idx", False) else 1)
