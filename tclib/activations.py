"""What goes into an MLP and what comes out, for all layers, from one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge


def hook_in(layer: int) -> str:
    """The transcoder's input: the normalised residual stream, before any LayerNorm gain."""
    return f"blocks.{layer}.ln2.hook_normalized"


def hook_out(layer: int) -> str:
    """The transcoder's target: what the MLP writes to the residual stream."""
    return f"blocks.{layer}.hook_mlp_out"


@dataclass(frozen=True)
class MLPActivations:
    """Inputs and outputs of one MLP on one batch."""

    x: Float[Tensor, "batch pos d_model"]
    y: Float[Tensor, "batch pos d_model"]


@torch.no_grad()
def mlp_activations(
    model: TransformerBridge,
    tokens: Int[Tensor, "row pos"],
    layers: Sequence[int],
    batch_size: int = 32,
) -> Iterator[dict[int, MLPActivations]]:
    """Batches of rows; for each the inputs and outputs of the MLPs of ``layers``.

    One forward pass serves all layers and stops after the last one asked for.

    Raises:
        ValueError: no text, or a layer that the model does not have.
    """
    check_layers(model, layers)
    if tokens.numel() == 0:
        raise ValueError("there is no text: give at least one row of tokens")
    names = [name for layer in layers for name in (hook_in(layer), hook_out(layer))]
    for rows in tokens.split(batch_size):
        _, cache = model.run_with_cache(
            rows.to(model.cfg.device), names_filter=lambda n: n in names, stop_at_layer=max(layers) + 1
        )
        yield {layer: MLPActivations(cache[hook_in(layer)], cache[hook_out(layer)]) for layer in layers}


def check_layers(model: TransformerBridge, layers: Sequence[int]) -> None:
    """Raise one sentence for a layer that the model does not have, or for no layer at all."""
    wrong = [layer for layer in layers if not 0 <= layer < model.cfg.n_layers]
    if wrong or not layers:
        raise ValueError(f"layers {list(layers)} do not fit: this model has layers 0 to {model.cfg.n_layers - 1}")
