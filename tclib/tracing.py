"""Everything that one prompt makes the model and its transcoders compute, kept for attribution."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.activations import hook_in, hook_out
from tclib.model import to_tokens, token_strings
from tclib.transcoder import Transcoder

# Where a number is read: what attention reads (after ln1), a transcoder (after ln2), the unembedding (after ln_final).
Place = Literal["attn_in", "mlp_in", "final"]
_NORMS = {"attn_in": "blocks.{}.ln1", "mlp_in": "blocks.{}.ln2", "final": "ln_final"}


@dataclass(frozen=True)
class Trace:
    """One prompt's forward pass.

    ``cache`` holds the residual stream, attention scores, patterns and values, and LayerNorm scales under
    TransformerLens' names, without the batch dimension. ``features[layer]`` are the transcoder's activations.
    """

    model: TransformerBridge
    transcoders: dict[int, Transcoder]
    tokens: Int[Tensor, " pos"]
    token_strings: list[str]
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

    @cached_property
    def logits(self) -> Float[Tensor, "pos vocab"]:
        """The next-token logits, made when first asked for: at GPT2-small's size a third of the forward pass."""
        gain, bias = self.gain("final", 0)
        with torch.no_grad():
            return self.model.unembed((self.cache["ln_final.hook_normalized"] * gain + bias)[None])[0]

    @property
    def like(self) -> Tensor:
        """A tensor of this trace, for its dtype and device."""
        return self.cache["hook_embed"]

    @property
    def parallel(self) -> bool:
        """Attention and MLP of a layer read the same residual stream (GPT-NeoX); in GPT-2 the MLP reads later."""
        return bool(self.model.cfg.parallel_attn_mlp)

    def residual(self, place: Place, layer: int) -> Float[Tensor, "pos d_model"]:
        """The residual stream that the LayerNorm of a place reads (``layer`` does not matter at "final")."""
        if place == "final":
            return self.cache[f"blocks.{self.model.cfg.n_layers - 1}.hook_resid_post"]
        mid = place == "mlp_in" and not self.parallel
        return self.cache[f"blocks.{layer}.hook_resid_{'mid' if mid else 'pre'}"]

    def scale(self, place: Place, layer: int) -> Float[Tensor, " pos"]:
        """What that LayerNorm divides by, its input's standard deviation. Attribution holds it constant."""
        return self.cache[_NORMS[place].format(layer) + ".hook_scale"][:, 0]

    def gain(self, place: Place, layer: int) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
        """LayerNorm's gain and bias as the reader of this place sees them: 1 and 0 in a processed model.

        A transcoder reads before gain and bias in every model (paper, section 3.1), so at "mlp_in" too they are 1, 0.
        """
        norm = self.model.ln_final if place == "final" else self.model.blocks[layer].ln1
        if place == "mlp_in":
            return torch.ones_like(norm.weight), torch.zeros_like(norm.bias)
        return norm.weight.detach(), norm.bias.detach()

    def pull_norm(
        self, place: Place, layer: int, readers: Float[Tensor, "*n d_model"], positions: int | Int[Tensor, "*n"]
    ) -> Float[Tensor, "*n d_model"]:
        """Readers of a LayerNorm's output as directions in the residual stream: gain, centring, frozen scale."""
        readers = readers * self.gain(place, layer)[0]
        centred = readers - readers.mean(-1, keepdim=True)
        return centred / self.scale(place, layer)[positions][..., None]

    def attention_before(self, place: Place, layer: int) -> range:
        """Layers whose attention has written to what this place reads (those of the MLPs are ``range(layer)``)."""
        return range(layer + (place == "mlp_in" and not self.parallel))

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
def trace(
    model: TransformerBridge,
    transcoders: dict[int, Transcoder],
    prompt: str | Int[Tensor, " pos"],
    check_fit: bool = True,
) -> Trace:
    """Run a prompt (text, or tokens that start with BOS) once and keep what attribution needs.

    Args:
        check_fit: refuse transcoders that are further from their MLP's output than zero is. Controls, untrained ones
            for example, need False.

    Raises:
        ValueError: an empty or too long prompt; a transcoder whose sizes, hooks or outputs do not fit the model.
    """
    tokens = to_tokens(model, prompt) if isinstance(prompt, str) else prompt.to(model.cfg.device)
    if tokens.ndim != 1 or not 0 < len(tokens) <= model.cfg.n_ctx:
        raise ValueError(
            f"the prompt has shape {tuple(tokens.shape)}: give one row of 1 to {model.cfg.n_ctx} tokens, BOS included"
        )
    for layer, transcoder in transcoders.items():
        check_belongs(model, layer, transcoder)
    with model.hooks(fwd_hooks=[("unembed.hook_in", lambda value, hook: value[:, :0])]):  # see `Trace.logits`
        _, cache = model.run_with_cache(tokens[None], names_filter=_needed(model.cfg.n_layers).__contains__)
    kept = {name: value[0] for name, value in cache.items()}
    features = {layer: t.encode(kept[hook_in(layer)]) for layer, t in transcoders.items()}
    traced = Trace(model, transcoders, tokens, token_strings(model, tokens), kept, features)
    if check_fit and len(tokens) > 1:
        _check_fit(traced)
    return traced


def check_belongs(model: TransformerBridge, layer: int, transcoder: Transcoder) -> None:
    """Refuse a transcoder of other widths, layers or hooks than this model's MLPs."""
    config = transcoder.config
    if config.d_in != model.cfg.d_model or not 0 <= layer < model.cfg.n_layers:
        raise ValueError(
            f"the transcoder of layer {layer} reads width {config.d_in}; this model has width "
            f"{model.cfg.d_model} and layers 0 to {model.cfg.n_layers - 1}: they do not belong together"
        )
    if (config.hook_in, config.hook_out) != (hook_in(layer), hook_out(layer)):
        raise ValueError(f"layer {layer} holds a dictionary of {config.hook_in}, not a transcoder")


def _check_fit(trace: Trace) -> None:
    """BOS is left out, as in training. Compared with zero: a prompt's mean is a noisy baseline."""
    for layer, transcoder in trace.transcoders.items():
        y, x = trace.cache[hook_out(layer)][1:], trace.cache[hook_in(layer)][1:]
        error = (y - transcoder.decode(trace.features[layer][1:], x)).square().sum() / y.square().sum()
        if not error < 1:
            raise ValueError(
                f"the transcoder of layer {layer} is further from this model's MLP than zero is (unexplained fraction "
                f"{error:.2f}): does it belong to another model or layer? trace(..., check_fit=False) goes on anyway"
            )


def _needed(n_layers: int) -> set[str]:
    per_layer = ("ln1.hook_scale", "attn.hook_pattern", "attn.hook_v", "ln2.hook_scale", "ln2.hook_normalized")
    per_layer += ("hook_mlp_out", "hook_resid_pre", "hook_resid_mid", "hook_resid_post")
    per_layer += ("attn.hook_attn_scores", "attn.hook_cos", "attn.hook_sin")  # the last two: rotary models
    ends = {"hook_embed", "hook_pos_embed", "ln_final.hook_scale", "ln_final.hook_normalized"}
    return ends | {f"blocks.{layer}.{name}" for layer in range(n_layers) for name in per_layer}
