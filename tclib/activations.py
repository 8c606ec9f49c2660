"""What goes into an MLP and what comes out, for all layers, from one forward pass."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.model_bridge import TransformerBridge

from tclib.blocks import Block, Norm
from tclib.inputs import check_layers, check_tokens, counted, words


def hook_in(layer: int) -> str:
    """The transcoder's input: the normalised residual stream, before any LayerNorm gain."""
    return f"blocks.{counted('layer', layer)}.ln2.hook_normalized"


def hook_out(layer: int) -> str:
    """The transcoder's target: what the MLP writes to the residual stream."""
    return f"blocks.{counted('layer', layer)}.hook_mlp_out"


def mlp_out(layer: int) -> str:
    """The MLP's own output: where a norm follows (Gemma 2 and 3, OLMo 2), not yet what is written to the stream."""
    return f"blocks.{counted('layer', layer)}.mlp.hook_out"


def norm_after(model: TransformerBridge, layer: int, writes: str) -> Norm | None:
    """The norm between a hook of an MLP's output and the residual stream; None if what the hook gives is written."""
    return Block.of(model, layer).after_mlp if writes == mlp_out(layer) else None


@dataclass(frozen=True)
class MLPActivations:
    """Inputs and outputs of one MLP on one batch."""

    x: Float[Tensor, "batch pos d_model"]
    y: Float[Tensor, "batch pos d_model"]


def mlp_activations(
    model: TransformerBridge,
    tokens: Int[Tensor, "row pos"],
    layers: Sequence[int],
    batch_size: int = 32,
    writes: Mapping[int, str] | None = None,
) -> Iterator[dict[int, MLPActivations]]:
    """Batches of rows; for each the inputs and outputs of the MLPs of ``layers``.

    One forward pass serves all layers and stops after the last one asked for.

    Args:
        writes: by layer, another hook than `hook_out` to take the outputs from.

    Raises:
        ValueError: tokens that do not fit (see `tclib.inputs.check_tokens`), or a layer that the model does not have.
    """
    check_layers(model, layers)
    return forward(model, check_tokens(model, tokens), layers, batch_size, writes)


@torch.no_grad()
def passes(
    model: TransformerBridge,
    tokens: Int[Tensor, "row pos"],
    names: Collection[str],
    batch_size: int,
    stop_at_layer: int,
) -> Iterator[tuple[Bool[Tensor, "batch pos"], ActivationCache]]:
    """Batches of a text that was checked already; for each which tokens are words, and what these hooks see."""
    for rows in tokens.split(batch_size):
        rows = rows.to(model.cfg.device)
        _, cache = model.run_with_cache(rows, names_filter=names.__contains__, stop_at_layer=stop_at_layer)
        yield words(model, rows), cache


def forward(
    model: TransformerBridge,
    tokens: Int[Tensor, "row pos"],
    layers: Sequence[int],
    batch_size: int,
    writes: Mapping[int, str] | None = None,
) -> Iterator[dict[int, MLPActivations]]:
    """`mlp_activations` for a part of a text and for layers that were checked already."""
    outputs = {layer: (writes or {}).get(layer, hook_out(layer)) for layer in layers}
    names = {name for layer in layers for name in (hook_in(layer), outputs[layer])}
    for _, cache in passes(model, tokens, names, batch_size, max(layers) + 1):
        yield {layer: MLPActivations(cache[hook_in(layer)], cache[outputs[layer]]) for layer in layers}


def our_name(hook: str) -> str:
    """Another name of an MLP's input or output as `hook_in` or `hook_out`; any other hook as it is.

    ``blocks.0.mlp.hook_out`` is what the MLP writes, unless a norm follows it (see `norm_after`).
    ``blocks.0.mlp.hook_in`` stands behind LayerNorm's gain and bias: it is the normalised stream where these are folded
    away, as in a processed model (see `folded`).
    """
    found = re.fullmatch(r"blocks\.(\d+)\.mlp\.hook_(in|out)", hook)
    if not found:
        return hook
    return (hook_in if found[2] == "in" else hook_out)(int(found[1]))


def folded(model: TransformerBridge, layer: int) -> bool:
    """Whether the LayerNorm before this MLP has neither gain nor bias of its own."""
    norm = Block.of(model, layer).before_mlp
    return norm is None or bool((norm.gain == 1).all() and (norm.bias == 0).all())
