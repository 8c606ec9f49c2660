"""Everything that one prompt makes the model and its transcoders compute, kept for attribution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.activations import hook_in, mlp_out
from tclib.blocks import Block, Norm
from tclib.inputs import check_tokens, from_end, whole, words
from tclib.interventions import edited
from tclib.model import to_tokens, token_strings
from tclib.replacement_model import ReplacementModel, joined
from tclib.transcoder import Transcoder, imitation

# Where a number is read: what attention reads (after ln1), a transcoder (after ln2), the unembedding (after ln_final).
Place = Literal["attn_in", "mlp_in", "final"]


@dataclass(frozen=True)
class Trace:
    """One prompt's forward pass.

    ``cache`` holds the residual stream, attention scores, patterns and values, and LayerNorm scales under
    TransformerLens' names, without the batch dimension. ``features[layer]`` are the transcoder's activations.
    """

    replacement: ReplacementModel
    tokens: Int[Tensor, " pos"]
    token_strings: list[str]
    cache: dict[str, Tensor]
    features: dict[int, Float[Tensor, "pos d_features"]]
    tested: set = field(default_factory=set, init=False, repr=False, compare=False)  # see `tclib.linearity.check`
    _blocks: dict[int, Block] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def model(self) -> TransformerBridge:
        """The model that was run."""
        return self.replacement.model

    @property
    def transcoders(self) -> Mapping[int, Transcoder]:
        """The transcoders beside its MLPs, by layer."""
        return self.replacement.transcoders

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
        return self.replacement.feature(self.layer(layer), feature)

    @cached_property
    def logits(self) -> Float[Tensor, "pos vocab"]:
        """The next-token logits, made when first asked for: at GPT2-small's size a third of the forward pass."""
        gain, bias = self.gain("final", 0)
        with torch.no_grad():
            logits = self.model.unembed((self.cache["ln_final.hook_normalized"] * gain + bias)[None])[0]
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()

    @property
    def cap(self) -> float | None:
        """What the model caps its logits at, by tanh (Gemma 2). Attribution explains logits before that."""
        cap = self.model.cfg.output_logits_soft_cap
        return cap if cap > 0 else None

    def block(self, layer: int) -> Block:
        """The model's block of a layer, read off the model once."""
        if layer not in self._blocks:
            self._blocks[layer] = Block.of(self.model, layer)
        return self._blocks[layer]

    @property
    def like(self) -> Float[Tensor, "pos d_model"]:
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

    def norm(self, place: Place, layer: int) -> Norm | None:
        """The norm that a place reads through; None where blocks read the stream itself (OLMo 2)."""
        self._check(place, layer)
        if place == "final":
            return self._final
        return self.block(layer).before_attn if place == "attn_in" else self.block(layer).before_mlp

    @cached_property
    def _final(self) -> Norm | None:
        return Norm.of(self.model.ln_final, "ln_final")

    def frozen_scale(self, norm: Norm | None) -> Float[Tensor, " pos"]:
        """What a norm divided by at each position of this prompt. Attribution takes it as a constant."""
        return torch.ones_like(self.like[:, 0]) if norm is None else self.cache[f"{norm.hook}.hook_scale"][:, 0]

    def scale(self, place: Place, layer: int) -> Float[Tensor, " pos"]:
        """What that norm divides by: its input's standard deviation, or root mean square where it does not centre."""
        return self.frozen_scale(self.norm(place, layer))

    def gain(self, place: Place, layer: int) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
        """The norm's gain and bias as the reader of this place sees them: 1 and 0 in a processed model.

        A transcoder reads before gain and bias in every model (paper, section 3.1), so at "mlp_in" too they are 1, 0.
        """
        norm = self.norm(place, layer)
        if place == "mlp_in" or norm is None:
            return torch.ones_like(self.like[0]), torch.zeros_like(self.like[0])
        return norm.gain, norm.bias

    def centre(self, place: Place, layer: int, vectors: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """Vectors as the norm of a place centres them; RMSNorm leaves them as they are."""
        norm = self.norm(place, layer)
        return vectors if norm is None else norm.centre(vectors)

    def normalised(
        self, place: Place, layer: int, stream: Float[Tensor, "pos d_model"]
    ) -> Float[Tensor, "pos d_model"]:
        """What the norm of a place makes of another stream, with its scale frozen; without gain and bias."""
        return self.centre(place, layer, stream) / self.scale(place, layer)[:, None]

    def pull_norm(
        self, place: Place, layer: int, readers: Float[Tensor, "*n d_model"], positions: int | Int[Tensor, "*n"]
    ) -> Float[Tensor, "*n d_model"]:
        """Readers of a norm's output as directions in the residual stream: gain, centring, frozen scale."""
        centred = self.centre(place, layer, readers * self.gain(place, layer)[0])
        return centred / self.scale(place, layer)[positions][..., None]

    def _check(self, place: str, layer: int) -> None:
        if place not in get_args(Place):
            raise ValueError(f"there is no place {place!r}: choose one of {', '.join(get_args(Place))}")
        if place != "final":
            self.layer(layer)

    def pattern(self, layer: int) -> Float[Tensor, "head target source"]:
        """Attention, over the frozen scale of the norm after it where there is one: times ``v W_O``, it is written."""
        pattern, after = self.cache[f"blocks.{layer}.attn.hook_pattern"], self.block(layer).after_attn
        return pattern if after is None else pattern / self.frozen_scale(after)[:, None]

    def values(self, layer: int) -> Float[Tensor, "source head d_head"]:
        """Attention's values without their bias, for every query head."""
        block = self.block(layer)
        return block.per_head(self.cache[f"blocks.{layer}.attn.hook_v"] - block.b_V, 1)

    def after_mlp(self, layer: int) -> Norm | None:
        """The norm between what a layer's transcoder imitates and the residual stream; mostly there is none."""
        transcoder, after = self.transcoders.get(layer), self.block(layer).after_mlp
        return after if transcoder is not None and transcoder.config.hook_out == mlp_out(layer) else None

    def stage(self, place: Place, layer: int) -> int:
        """The last stage that has written when a place reads: 0 embeddings, 2l + 1 attention of layer l, 2l + 2 MLP."""
        if place == "final":
            return 2 * self.model.cfg.n_layers
        return 2 * layer + (place == "mlp_in" and not self.parallel)

    def attention_before(self, place: Place, layer: int) -> range:
        """Layers whose attention has written to what this place reads (those of the MLPs are ``range(layer)``)."""
        return range((self.stage(place, layer) + 1) // 2)

    def active(self, position: int = -1) -> pd.DataFrame:
        """The features that are active at a position, strongest first: layer, feature, activation."""
        at = self.position(position)
        found = []
        for layer, z in self.features.items():
            index = z[at].nonzero()[:, 0]
            found += zip([layer] * len(index), index.tolist(), z[at, index].tolist(), strict=True)
        table = pd.DataFrame(found, columns=["layer", "feature", "activation"])
        return table.sort_values("activation", ascending=False, ignore_index=True)


@torch.no_grad()
def trace(replacement: ReplacementModel, prompt: str | Int[Tensor, " pos"], check_fit: bool = True) -> Trace:
    """Run a prompt (text, or tokens that start with BOS) once and keep what attribution needs.

    Args:
        check_fit: refuse transcoders that are further from their MLP's output than zero is. Controls, untrained ones
            for example, need False.

    Raises:
        ValueError: an empty or too long prompt, or tokens that do not fit (see `tclib.inputs.check_tokens`); an SAE, or
            a transcoder whose outputs do not fit the model.
    """
    joined(replacement).need_transcoders()
    model, transcoders = replacement.model, replacement.transcoders
    tokens = to_tokens(model, prompt) if isinstance(prompt, str) else prompt
    tokens = check_tokens(model, tokens, "the prompt", rows=False).to(model.cfg.device)
    # See `Trace.logits`. And transformers' RMSNorm rounds to float32 in any model, unless its scale is edited.
    hooks = [("unembed.hook_in", lambda value, hook: value[:, :0])]
    if model.ln_final.uses_rms_norm:
        scales = [name for name in model.hook_dict if name.endswith("hook_scale")]
        hooks += [(name, lambda value, hook: value.clone()) for name in scales]
    needed = _needed(model.cfg.n_layers) | {t.config.hook_out for t in transcoders.values()}
    with edited(model, hooks):
        _, cache = model.run_with_cache(tokens[None], names_filter=needed.__contains__)
    kept = {name: value[0] for name, value in cache.items()}
    features = {layer: t.encode(kept[hook_in(layer)]) for layer, t in transcoders.items()}
    traced = Trace(replacement, tokens, token_strings(model, tokens), kept, features)
    if check_fit and words(model, tokens).any():
        _check_fit(traced)
    return traced


def _check_fit(trace: Trace) -> None:
    """BOS is left out, as in training. Compared with zero: a prompt's mean is a noisy baseline."""
    kept = words(trace.model, trace.tokens)
    z = {layer: z[kept] for layer, z in trace.features.items()}
    for layer, transcoder in trace.transcoders.items():
        y, x = trace.cache[transcoder.config.hook_out][kept], trace.cache[hook_in(layer)][kept]
        error = (y - imitation(trace.transcoders, layer, z, x)).square().sum() / y.square().sum()
        if not error < 1:
            raise ValueError(
                f"the transcoder of layer {layer} is further from this model's MLP than zero is (unexplained fraction "
                f"{error:.2f}): does it belong to another model or layer? trace(..., check_fit=False) goes on anyway"
            )


def _needed(n_layers: int) -> set[str]:
    norms = ("ln1", "ln2", "ln1_post", "ln2_post", "attn.q_norm", "attn.k_norm")
    per_layer = (*(f"{norm}.hook_scale" for norm in norms), "attn.hook_pattern", "attn.hook_v", "ln2.hook_normalized")
    per_layer += ("hook_mlp_out", "hook_resid_pre", "hook_resid_mid", "hook_resid_post")
    per_layer += ("attn.hook_attn_scores", "attn.hook_cos", "attn.hook_sin")  # the last two: rotary models
    ends = {"hook_embed", "hook_pos_embed", "ln_final.hook_scale", "ln_final.hook_normalized"}
    return ends | {f"blocks.{layer}.{name}" for layer in range(n_layers) for name in per_layer}
