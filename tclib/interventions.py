"""Interventions on MLPs, their features and attention heads.

Each function returns hooks ``(name, function)`` that `run` (or TransformerLens' ``model.hooks``) puts in place for
one forward pass and always takes away again. Lists add up with ``+``; what is frozen comes before what is edited.
A dictionary of another place, and a layer, head, feature or position that is not there, raise ValueError, at the latest
when the hooks run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.activations import hook_in, hook_out, our_name
from tclib.inputs import check_tokens, counted, from_end, whole
from tclib.transcoder import Transcoder, imitation, is_cross_layer

Hook = tuple[str, Callable]
Positions = slice | int | Sequence[int]
EVERYWHERE = slice(None)
Frozen = Literal["patterns", "scales", "values", "mlps"]
_FROZEN = {
    "patterns": ".attn.hook_pattern", "scales": ".hook_scale", "values": ".attn.hook_v", "mlps": ".hook_mlp_out"
}  # fmt: skip


@torch.no_grad()
def run(
    model: TransformerBridge, tokens: Int[Tensor, "row pos"], hooks: Sequence[Hook]
) -> Float[Tensor, "row pos vocab"]:
    """Logits under the interventions; afterwards the model is as it was, also after an error.

    Raises:
        ValueError: tokens that do not fit (see `tclib.inputs.check_tokens`), or hooks as for `edited`.
    """
    tokens = check_tokens(model, tokens)
    with edited(model, hooks):
        return model(tokens)


@contextmanager
def edited(model: TransformerBridge, hooks: Sequence[Hook]) -> Iterator[None]:
    """The model under the interventions, for as many passes as wanted; afterwards it is as it was.

    Raises:
        ValueError: a hook that the model does not have, as those of layers beyond its last.
    """
    for name, _ in hooks:
        if isinstance(name, str) and name not in model.hook_dict:
            raise ValueError(f"this model has no {name}: it has layers 0 to {model.cfg.n_layers - 1}")
    if not hooks:
        yield
        return
    with model.hooks(fwd_hooks=list(hooks)), warnings.catch_warnings():
        # TransformerLens warns, rightly, that a frozen LayerNorm scale is applied again: that is the point here.
        warnings.filterwarnings("ignore", message=".*hook_scale/hook_normalized")
        yield


def freeze(values: Mapping[str, Tensor], what: Sequence[Frozen], layers: Collection[int] | None = None) -> list[Hook]:
    """What an intervention must not change: attention patterns, LayerNorm scales, attention values, MLP outputs.

    They stay at ``values``, a cache of the untouched run of the same prompts (``model.run_with_cache(tokens)[1]``) or
    of one prompt (``trace.cache``) for any number of rows of it. What is not frozen is free to answer.

    Args:
        layers: freeze only these, as in constrained patching (Ameisen et al. 2025); by default all, and the final norm.

    Raises:
        ValueError: something else to freeze, or a cache without it.
    """
    unknown = set(what) - _FROZEN.keys()
    if unknown:
        raise ValueError(f"{sorted(unknown)} cannot be frozen: choose from {', '.join(_FROZEN)}")
    hooks = []
    wanted = None if layers is None else tuple(f"blocks.{counted('layer', layer)}." for layer in layers)
    for suffix in (_FROZEN[name] for name in what):
        found = [(name, value) for name, value in values.items() if name.endswith(suffix)]
        if not found:
            raise ValueError(f"the cache has no {suffix[1:]}: run the model once on these prompts and keep it")
        for name, value in found:
            if wanted is not None and not name.startswith(wanted):
                continue
            own = name.replace("hook_mlp_out", "mlp.hook_out")  # before a norm that follows, where edits may be made
            hooks.append((own, _keep(values[own])) if own in values else (name, _keep(value)))
    return hooks


def replace_mlp(layer: int, transcoder: Transcoder) -> list[Hook]:
    """The MLP's output becomes TC(x) (paper, section 3.2), or SAE(MLP(x)) if the dictionary reads the output.

    Raises:
        ValueError: a dictionary of another layer, an SAE of the input, or a cross-layer transcoder.
    """
    reads, writes = (our_name(hook) for hook in (transcoder.config.hook_in, transcoder.config.hook_out))
    if reads == writes == hook_out(layer):
        return [(hook_out(layer), lambda y, hook: transcoder(y))]
    if reads == writes == hook_in(layer):
        raise ValueError("an SAE of the MLP's input reconstructs that input, not the MLP's output: use reencode_input")
    _check_layer(layer, transcoder, "so it cannot replace the MLP")
    if transcoder.config.n_writes is not None:
        raise ValueError("the layers of a cross-layer transcoder replace MLPs together: use replace_mlps")
    return _through(transcoder, lambda x, y: transcoder(x))


def replace_mlps(
    transcoders: Mapping[int, Transcoder],
    layers: Sequence[int],
    change: Callable[[int, Float[Tensor, "row pos d_features"]], Tensor] | None = None,
) -> list[Hook]:
    """The outputs of several MLPs become what a set of transcoders makes of the model's own inputs, as they are then.

    Of a cross-layer transcoder, earlier layers' features write there too, whether or not their own MLP is replaced.

    Args:
        change: gives the activations to use for those of a layer; by default they are used as they are.

    Raises:
        ValueError: a layer without a transcoder, or a cross-layer transcoder with layers missing.
    """
    is_cross_layer(transcoders)
    for layer in layers:
        if layer not in transcoders:
            raise ValueError(f"layer {layer} has no transcoder: there are some for layers {sorted(transcoders)}")
        _check_layer(layer, transcoders[layer], "so it cannot replace the MLP")
    seen: dict[int, Tensor] = {}
    z: dict[int, Tensor] = {}

    def remember(x: Tensor, hook, at: int) -> None:
        seen[at], z[at] = x, transcoders[at].encode(x)
        if change is not None:
            z[at] = change(at, z[at])

    def edit(y: Tensor, hook, at: int) -> Tensor:
        return imitation(transcoders, at, z, seen[at])

    read = [at for at, t in transcoders.items() if any(at <= layer < at + t.reach for layer in layers)]
    hooks = [(transcoders[at].config.hook_in, partial(remember, at=at)) for at in read]
    return hooks + [(transcoders[layer].config.hook_out, partial(edit, at=layer)) for layer in layers]


def reencode_input(layer: int, sae: Transcoder) -> list[Hook]:
    """The MLP's input becomes SAE(x), an SAE on ``ln2.hook_normalized``; the MLP itself still computes."""
    if our_name(sae.config.hook_in) != hook_in(layer):
        raise ValueError(f"this SAE reads {sae.config.hook_in}, not {hook_in(layer)}, the input of that layer's MLP")
    return [(sae.config.hook_in, lambda x, hook: sae(x))]


def ablate_mlp(
    layer: int, value: Float[Tensor, "*row d_model"] | float = 0.0, positions: Positions = EVERYWHERE
) -> list[Hook]:
    """The MLP's output at ``positions`` becomes ``value``: 0, a mean ``[d_model]`` or one vector per row."""

    def edit(y: Float[Tensor, "row pos d_model"], hook) -> Tensor:
        y = y.clone()
        y[:, _places(positions, y)] = value
        return y

    return [(hook_out(layer), edit)]


def ablate_head(
    layer: int, head: int, value: Float[Tensor, "*row d_head"] | float = 0.0, positions: Positions = EVERYWHERE
) -> list[Hook]:
    """What head ``head`` mixes (``hook_z``, before W_O) at ``positions`` becomes ``value``."""

    def edit(z: Float[Tensor, "row pos head d_head"], hook) -> Tensor:
        whole("head", head, z.shape[2], f"layer {layer}")
        z = z.clone()
        z[:, _places(positions, z), head] = value
        return z

    return [(f"blocks.{counted('layer', layer)}.attn.hook_z", edit)]


def keep_features(
    layer: int,
    transcoder: Transcoder,
    features: Sequence[int] | Int[Tensor, " kept"],
    rest: Float[Tensor, "*row d_features"] | float = 0.0,
    positions: Positions = EVERYWHERE,
) -> list[Hook]:
    """The MLP is replaced by its transcoder, of which only ``features`` are live; the others are frozen at ``rest``.

    At other positions the MLP is left alone. (For cross-layer transcoders see `replace_mlps`.)
    """
    _check_layer(layer, transcoder)
    kept = _feature_mask(transcoder, features)

    def edit(x: Tensor, y: Tensor) -> Tensor:
        at = _places(positions, x)
        z = transcoder.encode(x[:, at])
        frozen = torch.as_tensor(rest, dtype=z.dtype, device=z.device)
        y = y.clone()
        y[:, at] = transcoder.decode(torch.where(kept.to(z.device), z, frozen), x[:, at])
        return y

    return _through(transcoder, edit)


def set_features(
    layer: int,
    transcoder: Transcoder,
    features: Sequence[int] | Int[Tensor, " changed"],
    value: Float[Tensor, "*place d_features"] | float = 0.0,
    positions: Positions = EVERYWHERE,
) -> list[Hook]:
    """Features take ``value`` (0 removes them); the rest of the MLP, its transcoder's error included, stays.

    Of a cross-layer transcoder, in all their writes; `freeze` what must not answer those.
    """
    changed = _feature_mask(transcoder, features)
    _check_layer(layer, transcoder)
    changes: dict[str, Tensor] = {}

    def remember(x: Tensor, hook) -> None:
        z = transcoder.encode(x[:, _places(positions, x)])
        new = torch.as_tensor(value, dtype=z.dtype, device=z.device)
        changes["z"] = torch.where(changed.to(z.device), new, z) - z

    def edit(y: Tensor, hook, later: int) -> Tensor:
        y = y.clone()
        y[:, _places(positions, y)] += changes["z"] @ transcoder.rows(later)
        return y

    reads, writes = transcoder.config.hook_in, transcoder.config.hook_out
    outputs = [writes.replace(f"blocks.{layer}.", f"blocks.{layer + later}.") for later in range(transcoder.reach)]
    return [(reads, remember), *((name, partial(edit, later=later)) for later, name in enumerate(outputs))]


def _keep(value: Tensor) -> Callable:
    return lambda now, hook: value.expand_as(now)


def _through(transcoder: Transcoder, function: Callable[[Tensor, Tensor], Tensor]) -> list[Hook]:
    """Two hooks: one remembers what the transcoder reads, the other puts function(that, output) in place of the
    MLP's output."""
    seen: dict[str, Tensor] = {}

    def remember(x: Tensor, hook) -> None:
        seen["x"] = x

    def edit(y: Tensor, hook) -> Tensor:
        return function(seen.pop("x"), y)

    return [(transcoder.config.hook_in, remember), (transcoder.config.hook_out, edit)]


def _places(positions: Positions, values: Float[Tensor, "row pos *rest"]) -> Positions:
    """The positions, if the prompts have them; negative ones count from the end."""
    if isinstance(positions, slice):
        return positions
    count = values.shape[1]
    if isinstance(positions, int) or (isinstance(positions, Tensor) and not positions.ndim):
        return from_end("position", positions, count, "the prompts")
    return [from_end("position", at, count, "the prompts") for at in positions]


def _check_layer(layer: int, transcoder: Transcoder, why: str = "so it does not belong to the MLP") -> None:
    reads, writes = transcoder.config.hook_in, transcoder.config.hook_out
    if (our_name(reads), our_name(writes)) != (hook_in(layer), hook_out(layer)):
        raise ValueError(f"this transcoder reads {reads} and writes {writes}, {why} of layer {layer}")


def _feature_mask(transcoder: Transcoder, features: Sequence[int] | Tensor) -> Tensor:
    n = transcoder.config.d_features
    given = features.flatten().tolist() if isinstance(features, Tensor) else list(features)
    index = torch.tensor([whole("feature", feature, n, "the transcoder") for feature in given], dtype=torch.long)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[index] = True
    return mask
