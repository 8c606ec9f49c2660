"""Everything that one prompt makes the model and its transcoders compute, kept for attribution."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.activations import folded, hook_in, hook_out, our_name
from tclib.inputs import check_tokens, feature_of, from_end, whole, words
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
        return from_end("position", position, len(self.tokens), "the prompt")

    def layer(self, layer: int, with_transcoder: bool = False) -> int:
        """The layer, if the model (and, if asked, a transcoder) has it; raises otherwise."""
        layer = whole("layer", layer, self.model.cfg.n_layers, "the model")
        if with_transcoder and layer not in self.transcoders:
            raise ValueError(f"layer {layer} has no transcoder: layers {sorted(self.transcoders)} have one")
        return layer

    def head(self, head: int) -> int:
        """The head, if the model's layers have it; raises otherwise."""
        return whole("head", head, self.model.cfg.n_heads, "the layer")

    def feature(self, layer: int, feature: int) -> int:
        """The feature, if the transcoder of this layer has it; raises otherwise."""
        return feature_of(self.transcoders, self.layer(layer), feature)

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
        self._check(place, layer)
        if place == "final":
            return self.cache[f"blocks.{self.model.cfg.n_layers - 1}.hook_resid_post"]
        mid = place == "mlp_in" and not self.parallel
        return self.cache[f"blocks.{layer}.hook_resid_{'mid' if mid else 'pre'}"]

    def scale(self, place: Place, layer: int) -> Float[Tensor, " pos"]:
        """What that LayerNorm divides by, its input's standard deviation. Attribution holds it constant."""
        self._check(place, layer)
        return self.cache[_NORMS[place].format(layer) + ".hook_scale"][:, 0]

    def gain(self, place: Place, layer: int) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
        """LayerNorm's gain and bias as the reader of this place sees them: 1 and 0 in a processed model.

        A transcoder reads before gain and bias in every model (paper, section 3.1), so at "mlp_in" too they are 1, 0.
        """
        self._check(place, layer)
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

    def _check(self, place: str, layer: int) -> None:
        if place not in _NORMS:
            raise ValueError(f"there is no place {place!r}: choose one of {', '.join(_NORMS)}")
        if place != "final":
            self.layer(layer)

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
        ValueError: an empty or too long prompt, or tokens that do not fit (see `tclib.inputs.check_tokens`); a
            transcoder whose sizes, hooks, precision or outputs do not fit the model.
    """
    tokens = to_tokens(model, prompt) if isinstance(prompt, str) else prompt
    tokens = check_tokens(model, tokens, "the prompt", rows=False).to(model.cfg.device)
    for layer, transcoder in transcoders.items():
        check_belongs(model, layer, transcoder)
        check_dtype(model, layer, transcoder)
    with model.hooks(fwd_hooks=[("unembed.hook_in", lambda value, hook: value[:, :0])]):  # see `Trace.logits`
        _, cache = model.run_with_cache(tokens[None], names_filter=_needed(model.cfg.n_layers).__contains__)
    kept = {name: value[0] for name, value in cache.items()}
    features = {layer: t.encode(kept[hook_in(layer)]) for layer, t in transcoders.items()}
    traced = Trace(model, transcoders, tokens, token_strings(model, tokens), kept, features)
    if check_fit and words(model, tokens).any():
        _check_fit(traced)
    return traced


def check_belongs(model: TransformerBridge, layer: int, transcoder: Transcoder, saes: bool = False) -> None:
    """Refuse a transcoder of other widths, layers or hooks than this model's MLPs.

    Hooks that are the same place by another name are taken, with a warning that says so (see `our_name`).

    Args:
        saes: an SAE of either side of the MLP will do as well.
    """
    config = transcoder.config
    whole("layer", layer, model.cfg.n_layers, "the model")
    if {config.d_in, config.d_out} != {model.cfg.d_model}:
        raise ValueError(
            f"the transcoder of layer {layer} reads width {config.d_in} and writes width {config.d_out}; this model "
            f"has width {model.cfg.d_model}: they do not belong together"
        )
    found, ours = (config.hook_in, config.hook_out), (hook_in(layer), hook_out(layer))
    taken = tuple(
        hook if hook.endswith("mlp.hook_in") and not folded(model, layer) else our_name(hook) for hook in found
    )
    if taken != ours and not (saes and taken in zip(ours, ours, strict=True)):
        where = " and behind LayerNorm's gain and bias, which this model has" * (found[0].endswith(".mlp.hook_in"))
        raise ValueError(
            f"the dictionary of layer {layer} reads {found[0]}{where}, and writes {found[1]}; a transcoder of this "
            f"layer reads {ours[0]} and writes {ours[1]}"
        )
    for theirs, name in zip(found, taken, strict=True):
        if theirs != name:
            said = f"{theirs} of the transcoder of layer {layer} is taken as {name}: the same place"
            warnings.warn(said, stacklevel=3)


def check_dtype(model: TransformerBridge, layer: int, transcoder: Transcoder) -> None:
    """Refuse a transcoder of another precision than the model's."""
    theirs, ours = transcoder.W_enc.dtype, next(model.parameters()).dtype
    if theirs != ours:
        raise ValueError(
            f"the transcoder of layer {layer} is in {theirs}, but the model computes in {ours}: load it with "
            f"load_transcoders(..., dtype={ours})"
        )


def _check_fit(trace: Trace) -> None:
    """BOS is left out, as in training. Compared with zero: a prompt's mean is a noisy baseline."""
    kept = words(trace.model, trace.tokens)
    for layer, transcoder in trace.transcoders.items():
        y, x = trace.cache[hook_out(layer)][kept], trace.cache[hook_in(layer)][kept]
        error = (y - transcoder.decode(trace.features[layer][kept], x)).square().sum() / y.square().sum()
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
