"""What attribution can explain: a number that is linear in the residual stream once LayerNorm scales are frozen.

A target reads the normalised residual stream at one place with one vector:
``value = reader . normalised(resid) + bias``. At ``place`` "attn_in" that is ln1's output of a layer, at "mlp_in"
ln2's, at "final" ln_final's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tclib.model import to_token
from tclib.tracing import Trace

Place = Literal["attn_in", "mlp_in", "final"]


@dataclass(frozen=True)
class Target:
    """One number of one prompt, ready to be taken apart by `tclib.attribution.attribute`."""

    name: str
    place: Place
    layer: int  # n_layers for "final"
    position: int
    reader: Float[Tensor, " d_model"]
    bias: float

    def scale(self, trace: Trace) -> float:
        """The LayerNorm scale (standard deviation) that this input was divided by; treated as a constant."""
        return trace.cache[self._norm("hook_scale")][self.position].item()

    def pulled_back(self, trace: Trace) -> Float[Tensor, " d_model"]:
        """The reader as a direction in the residual stream: centred, as LayerNorm centres, and divided by its scale."""
        return (self.reader - self.reader.mean()) / self.scale(trace)

    def value(self, trace: Trace) -> float:
        """The number itself, read off the residual stream."""
        name = {"attn_in": "hook_resid_pre", "mlp_in": "hook_resid_mid", "final": "hook_resid_post"}[self.place]
        layer = min(self.layer, trace.model.cfg.n_layers - 1)
        resid = trace.cache[f"blocks.{layer}.{name}"][self.position]
        return (resid @ self.pulled_back(trace)).item() + self.bias

    def _norm(self, name: str) -> str:
        if self.place == "final":
            return f"ln_final.{name}"
        return f"blocks.{self.layer}.{'ln1' if self.place == 'attn_in' else 'ln2'}.{name}"


def feature(trace: Trace, layer: int, index: int, position: int = -1) -> Target:
    """The pre-activation of a transcoder feature at a position (it may be negative: then the feature is silent).

    Raises:
        ValueError: no such layer, transcoder, feature or position.
    """
    transcoder = trace.transcoders[trace.layer(layer, with_transcoder=True)]
    if not 0 <= index < transcoder.config.d_features:
        raise ValueError(f"feature {index} is outside the transcoder, which has {transcoder.config.d_features}")
    position = trace.position(position)
    reader, bias = transcoder.W_enc[:, index], transcoder.b_enc[index].item()
    return Target(f"feature {layer}/{index} at {position}", "mlp_in", layer, position, reader, bias)


def logit(trace: Trace, token: str | int, position: int = -1) -> Target:
    """The logit of a token. The unembedding of a processed model is centred: this is the logit minus the mean logit."""
    index = to_token(trace.model, token) if isinstance(token, str) else token
    reader, bias = trace.model.W_U[:, index], trace.model.b_U[index].item()
    return _final(trace, f"logit {token!r}", position, reader, bias)


def logit_difference(trace: Trace, token: str | int, other: str | int, position: int = -1) -> Target:
    """The logit of ``token`` minus that of ``other``; what both share, the mean logit too, cancels."""
    a, b = logit(trace, token, position), logit(trace, other, position)
    return _final(trace, f"logit {token!r} - {other!r}", position, a.reader - b.reader, a.bias - b.bias)


def direction(trace: Trace, reader: Float[Tensor, " d_model"], place: Place, layer: int, position: int = -1) -> Target:
    """Any vector that reads the normalised residual stream at any place."""
    if reader.shape != (trace.model.cfg.d_model,):
        raise ValueError(f"the direction has shape {tuple(reader.shape)}, not ({trace.model.cfg.d_model},)")
    if place == "final":
        return _final(trace, "direction at the end", position, reader, 0.0)
    position = trace.position(position)
    return Target(f"direction at {place} {layer}", place, trace.layer(layer), position, reader, 0.0)


def head_source(trace: Trace, target: Target, layer: int, head: int, source: int) -> Target:
    """What one head brought to ``target`` from one source position, as a target of its own at that position.

    Paper, section 4.1: with the pattern A frozen, the reader at the source is ``A[t, s] W_V W_O reader``.
    Its value is the head's row in the target's table (without the head's value bias).
    """
    attends = layer < target.layer or (layer == target.layer and target.place == "mlp_in")
    if not (0 <= head < trace.model.cfg.n_heads and attends):
        raise ValueError(f"head {layer}.{head} does not come before {target.name}")
    source = trace.position(source)
    weight = trace.cache[f"blocks.{trace.layer(layer)}.attn.hook_pattern"][head, target.position, source]
    reader = weight * (trace.model.W_V[layer, head] @ (trace.model.W_O[layer, head] @ target.pulled_back(trace)))
    return Target(f"head {layer}.{head} from {source} to {target.name}", "attn_in", layer, source, reader, 0.0)


def _final(trace: Trace, name: str, position: int, reader: Tensor, bias: float) -> Target:
    return Target(name, "final", trace.model.cfg.n_layers, trace.position(position), torch.as_tensor(reader), bias)
