"""Interventions on MLPs, their features and attention heads.

Each function returns hooks ``(name, function)`` that `run` (or TransformerLens' ``model.hooks``) puts in place for
one forward pass and always takes away again. Lists add up with ``+``; what is held comes before what is edited.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.activations import hook_in, hook_out
from tclib.transcoder import Transcoder

Hook = tuple[str, Callable]
Positions = slice | int | Sequence[int]
EVERYWHERE = slice(None)
Held = Literal["patterns", "scales", "values", "mlps"]
_HELD = {
    "patterns": ".attn.hook_pattern", "scales": ".hook_scale", "values": ".attn.hook_v", "mlps": ".hook_mlp_out"
}  # fmt: skip


@torch.no_grad()
def run(
    model: TransformerBridge, tokens: Int[Tensor, "row pos"], hooks: Sequence[Hook]
) -> Float[Tensor, "row pos vocab"]:
    """Logits under the interventions; afterwards the model is as it was, also after an error."""
    with edited(model, hooks):
        return model(tokens)


@contextmanager
def edited(model: TransformerBridge, hooks: Sequence[Hook]) -> Iterator[None]:
    """The model under the interventions, for as many passes as wanted; afterwards it is as it was."""
    if not hooks:
        yield
        return
    with model.hooks(fwd_hooks=list(hooks)), warnings.catch_warnings():
        # TransformerLens warns, rightly, that a held LayerNorm scale is applied again: that is the point here.
        warnings.filterwarnings("ignore", message=".*hook_scale/hook_normalized")
        yield


def hold(values: Mapping[str, Tensor], what: Sequence[Held]) -> list[Hook]:
    """What an intervention must not change: attention patterns, LayerNorm scales, attention values, MLP outputs.

    They stay at ``values``, a cache of the untouched run of the same prompts (``model.run_with_cache(tokens)[1]``) or
    of one prompt (``trace.cache``) for any number of rows of it. What is not held is free to answer.

    Raises:
        ValueError: something else to hold, or a cache without it.
    """
    unknown = set(what) - _HELD.keys()
    if unknown:
        raise ValueError(f"{sorted(unknown)} cannot be held: choose from {', '.join(_HELD)}")
    hooks = []
    for suffix in (_HELD[name] for name in what):
        found = [(name, value) for name, value in values.items() if name.endswith(suffix)]
        if not found:
            raise ValueError(f"the cache has no {suffix[1:]}: run the model once on these prompts and keep it")
        hooks += [(name, _keep(value)) for name, value in found]
    return hooks


def replace_mlp(layer: int, transcoder: Transcoder) -> list[Hook]:
    """The MLP's output becomes TC(x) (paper, section 3.2), or SAE(MLP(x)) if the dictionary reads the output."""
    reads = transcoder.config.hook_in
    if reads == hook_out(layer):
        return [(hook_out(layer), lambda y, hook: transcoder(y))]
    if reads != hook_in(layer):
        raise ValueError(f"this transcoder reads {reads}, so it cannot replace the MLP of layer {layer}")
    if transcoder.config.hook_out != hook_out(layer):
        raise ValueError("an SAE of the MLP's input reconstructs that input, not the MLP's output: use reencode_input")
    return _through(layer, lambda x, y: transcoder(x))


def reencode_input(layer: int, sae: Transcoder) -> list[Hook]:
    """The MLP's input becomes SAE(x), an SAE on ``ln2.hook_normalized``; the MLP itself still computes."""

    def edit(x: Tensor, hook) -> Tensor:
        return sae(x)

    return [(hook_in(layer), edit)]


def ablate_mlp(layer: int, value: Tensor | float = 0.0, positions: Positions = EVERYWHERE) -> list[Hook]:
    """The MLP's output at ``positions`` becomes ``value``: 0, a mean ``[d_model]`` or one vector per row."""

    def edit(y: Float[Tensor, "row pos d_model"], hook) -> Tensor:
        y = y.clone()
        y[:, positions] = value
        return y

    return [(hook_out(layer), edit)]


def ablate_head(layer: int, head: int, value: Tensor | float = 0.0, positions: Positions = EVERYWHERE) -> list[Hook]:
    """What head ``head`` mixes (``hook_z``, before W_O) at ``positions`` becomes ``value``."""

    def edit(z: Float[Tensor, "row pos head d_head"], hook) -> Tensor:
        z = z.clone()
        z[:, positions, head] = value
        return z

    return [(f"blocks.{layer}.attn.hook_z", edit)]


def keep_features(
    layer: int,
    transcoder: Transcoder,
    features: Sequence[int] | Int[Tensor, " kept"],
    rest: Float[Tensor, "*row d_features"] | float = 0.0,
    positions: Positions = EVERYWHERE,
) -> list[Hook]:
    """The MLP is replaced by its transcoder, of which only ``features`` are live; the others are held at ``rest``.

    At other positions the MLP is left alone.
    """
    kept = _feature_mask(transcoder, features)

    def edit(x: Tensor, y: Tensor) -> Tensor:
        z = transcoder.encode(x[:, positions])
        held = torch.as_tensor(rest, dtype=z.dtype, device=z.device)
        y = y.clone()
        y[:, positions] = transcoder.decode(torch.where(kept.to(z.device), z, held), x[:, positions])
        return y

    return _through(layer, edit)


def set_features(
    layer: int,
    transcoder: Transcoder,
    features: Sequence[int] | Int[Tensor, " changed"],
    value: Tensor | float = 0.0,
    positions: Positions = EVERYWHERE,
) -> list[Hook]:
    """Features take ``value`` (0 removes them); the rest of the MLP, its transcoder's error included, stays."""
    changed = _feature_mask(transcoder, features)

    def edit(x: Tensor, y: Tensor) -> Tensor:
        z = transcoder.encode(x[:, positions])
        new = torch.where(changed.to(z.device), torch.as_tensor(value, dtype=z.dtype, device=z.device), z)
        y = y.clone()
        y[:, positions] += (new - z) @ transcoder.W_dec
        return y

    return _through(layer, edit)


def scale_features(
    layer: int,
    transcoder: Transcoder,
    features: Sequence[int] | Int[Tensor, " changed"],
    factor: Tensor | float,
    positions: Positions = EVERYWHERE,
) -> list[Hook]:
    """Features fire ``factor`` times as strongly; the rest of the MLP, its transcoder's error included, stays."""
    changed = _feature_mask(transcoder, features)

    def edit(x: Tensor, y: Tensor) -> Tensor:
        z = transcoder.encode(x[:, positions]) * changed.to(x.device)
        y = y.clone()
        y[:, positions] += (z * factor - z) @ transcoder.W_dec
        return y

    return _through(layer, edit)


def _keep(value: Tensor) -> Callable:
    return lambda now, hook: value.expand_as(now)


def _through(layer: int, function: Callable[[Tensor, Tensor], Tensor]) -> list[Hook]:
    """Two hooks: one remembers the MLP's input, the other puts function(input, output) in place of its output."""
    seen: dict[str, Tensor] = {}

    def remember(x: Tensor, hook) -> None:
        seen["x"] = x

    def edit(y: Tensor, hook) -> Tensor:
        return function(seen.pop("x"), y)

    return [(hook_in(layer), remember), (hook_out(layer), edit)]


def _feature_mask(transcoder: Transcoder, features: Sequence[int] | Tensor) -> Tensor:
    index = torch.as_tensor(features, dtype=torch.long)
    n = transcoder.config.d_features
    if index.numel() and not (0 <= int(index.min()) and int(index.max()) < n):
        raise ValueError(f"features must lie between 0 and {n - 1}, but {index.tolist()} were given")
    mask = torch.zeros(n, dtype=torch.bool)
    mask[index] = True
    return mask
