"""Everything that one prompt makes the model and its transcoders compute, kept for attribution."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.activations import hook_in, hook_out
from tclib.model import to_tokens, token_strings
from tclib.transcoder import Transcoder


@dataclass(frozen=True)
class Trace:
    """One prompt's forward pass.

    ``cache`` holds the residual stream, attention patterns, values and LayerNorm scales under TransformerLens' names,
    without the batch dimension. ``features[layer]`` are the transcoder's activations.
    """

    model: TransformerBridge
    transcoders: dict[int, Transcoder]
    tokens: Int[Tensor, " pos"]
    token_strings: list[str]
    logits: Float[Tensor, "pos vocab"]
    cache: dict[str, Tensor]
    features: dict[int, Float[Tensor, "pos d_features"]]

    def position(self, position: int) -> int:
        """The position counted from the front; raises if the prompt has no such token."""
        length = len(self.tokens)
        if not -length <= position < length:
            raise ValueError(f"position {position} is outside the prompt, which has {length} tokens with BOS")
        return position % length

    def layer(self, layer: int, with_transcoder: bool = False) -> int:
        """The layer, if the model (and, if asked, a transcoder) has it; raises otherwise."""
        if not 0 <= layer < self.model.cfg.n_layers:
            raise ValueError(f"layer {layer} is outside the model, which has layers 0 to {self.model.cfg.n_layers - 1}")
        if with_transcoder and layer not in self.transcoders:
            raise ValueError(f"layer {layer} has no transcoder: layers {sorted(self.transcoders)} have one")
        return layer

    def active(self, position: int = -1, top: int | None = None) -> pd.DataFrame:
        """The features that are active at a position, strongest first: layer, feature, activation."""
        position = self.position(position)
        records = []
        for layer, z in self.features.items():
            index = z[position].nonzero().squeeze(-1)
            records += [
                {"layer": layer, "feature": i, "activation": a}
                for i, a in zip(index.tolist(), z[position, index].tolist(), strict=True)
            ]
        table = pd.DataFrame(records, columns=["layer", "feature", "activation"])
        return table.sort_values("activation", ascending=False, ignore_index=True).head(top or len(table))


@torch.no_grad()
def trace(model: TransformerBridge, transcoders: dict[int, Transcoder], prompt: str | Int[Tensor, " pos"]) -> Trace:
    """Run a prompt (text, or tokens that start with BOS) once and keep what attribution needs.

    Raises:
        ValueError: an empty or too long prompt, or a transcoder whose sizes do not fit the model.
    """
    tokens = to_tokens(model, prompt) if isinstance(prompt, str) else prompt.to(model.cfg.device)
    for layer, transcoder in transcoders.items():
        if transcoder.config.d_in != model.cfg.d_model or not 0 <= layer < model.cfg.n_layers:
            raise ValueError(
                f"the transcoder of layer {layer} reads width {transcoder.config.d_in}; this model has width "
                f"{model.cfg.d_model} and layers 0 to {model.cfg.n_layers - 1}: they do not belong together"
            )
        if (transcoder.config.hook_in, transcoder.config.hook_out) != (hook_in(layer), hook_out(layer)):
            raise ValueError(f"layer {layer} holds a dictionary of {transcoder.config.hook_in}, not a transcoder")
    logits, cache = model.run_with_cache(tokens[None], names_filter=_needed(model.cfg.n_layers).__contains__)
    kept = {name: value[0] for name, value in cache.items()}
    features = {layer: t.encode(kept[hook_in(layer)]) for layer, t in transcoders.items()}
    return Trace(model, transcoders, tokens, token_strings(model, tokens), logits[0], kept, features)


def _needed(n_layers: int) -> set[str]:
    per_layer = ("ln1.hook_scale", "attn.hook_pattern", "attn.hook_v", "ln2.hook_scale", "ln2.hook_normalized")
    per_layer += ("hook_mlp_out", "hook_resid_pre", "hook_resid_mid", "hook_resid_post")
    return {"hook_embed", "hook_pos_embed", "ln_final.hook_scale"} | {
        f"blocks.{layer}.{name}" for layer in range(n_layers) for name in per_layer
    }
