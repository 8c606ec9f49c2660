"""A model and the transcoders that stand beside its MLPs: what a prompt is traced through.

Nothing is replaced by joining them. Attribution reads the model's own pass with each transcoder's features and error
beside it; `tclib.interventions` replaces MLPs where that is asked for. The name is that of Ameisen et al. (2025).
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from transformer_lens.model_bridge import TransformerBridge

from tclib.activations import folded, hook_in, hook_out, norm_after, our_name
from tclib.inputs import feature_of, whole
from tclib.transcoder import Transcoder, is_cross_layer


@dataclass(frozen=True, eq=False, repr=False)
class ReplacementModel:
    """``model`` with ``transcoders`` of some or all of its layers, which are seen to fit when they are joined.

    An SAE of either side of an MLP is taken too, for what compares dictionaries; what needs transcoders says so.

    Raises:
        ValueError: no model of TransformerLens, or no transcoders by layer; a layer that the model does not have; other
            widths, hooks, precision or device than the model's; or a cross-layer transcoder with layers missing.
    """

    model: TransformerBridge
    transcoders: Mapping[int, Transcoder]

    def __post_init__(self) -> None:
        if not isinstance(self.model, TransformerBridge):
            raise ValueError(f"the model is of type {type(self.model).__name__}: give what tc.load_model gives")
        if not isinstance(self.transcoders, Mapping):
            kind = type(self.transcoders).__name__
            raise ValueError(f"the transcoders are of type {kind}: give them by layer, as tc.load_transcoders does")
        object.__setattr__(self, "transcoders", dict(self.transcoders))
        for layer, transcoder in self.transcoders.items():
            check_belongs(self.model, layer, transcoder, saes=True)
            _check_numbers(self.model, layer, transcoder)
            for theirs in (transcoder.config.hook_in, transcoder.config.hook_out):
                if theirs != our_name(theirs) and norm_after(self.model, layer, theirs) is None:
                    said = f"{theirs} of the transcoder of layer {layer} is taken as {our_name(theirs)}: the same place"
                    warnings.warn(said, stacklevel=3)
        is_cross_layer(self.transcoders)  # refuses one of which layers are missing

    def __repr__(self) -> str:
        return f"<{self.model.cfg.model_name} with transcoders of layers {sorted(self.transcoders)}>"

    def feature(self, layer: int, feature: int) -> int:
        """The feature, if the transcoder of this layer has it; raises otherwise."""
        return feature_of(self.transcoders, layer, feature)

    def only(self, layers: Collection[int]) -> ReplacementModel:
        """The same model with the transcoders of some layers; raises if one of them has none."""
        if missing := sorted(set(layers) - set(self.transcoders)):
            raise ValueError(f"layer {missing[0]} has no transcoder: layers {sorted(self.transcoders)} have one")
        return ReplacementModel(self.model, {layer: self.transcoders[layer] for layer in layers})

    def need_transcoders(self) -> None:
        """Raise ValueError if one of the dictionaries is an SAE, where only transcoders will do."""
        for layer, transcoder in self.transcoders.items():
            check_belongs(self.model, layer, transcoder)


def joined(replacement: ReplacementModel) -> ReplacementModel:
    """What a function was given, if it is a model that has been joined with its transcoders.

    Raises:
        ValueError: it is something else, a model alone for example; or one of the two was moved to another device or
            precision since.
    """
    if not isinstance(replacement, ReplacementModel):
        kind = type(replacement).__name__
        raise ValueError(f"this needs a model and its transcoders, not {kind}: tc.ReplacementModel(model, transcoders)")
    for layer, transcoder in replacement.transcoders.items():
        _check_numbers(replacement.model, layer, transcoder)
    return replacement


def check_belongs(model: TransformerBridge, layer: int, transcoder: Transcoder, saes: bool = False) -> None:
    """Refuse a transcoder of other widths, layers or hooks than this model's MLPs.

    Hooks that are the same place by another name are taken (see `our_name`).

    Args:
        saes: an SAE of either side of the MLP will do as well.

    Raises:
        ValueError: it does not belong there; widths or hooks are named.
    """
    config = transcoder.config
    whole("layer", layer, model.cfg.n_layers, "the model")
    if {config.d_in, config.d_out} != {model.cfg.d_model}:
        raise ValueError(
            f"the transcoder of layer {layer} reads width {config.d_in} and writes width {config.d_out}; this model "
            f"has width {model.cfg.d_model}: they do not belong together"
        )
    found, ours = (config.hook_in, config.hook_out), (hook_in(layer), hook_out(layer))
    reads, writes = (
        hook if hook.endswith("mlp.hook_in") and not folded(model, layer) else our_name(hook) for hook in found
    )
    if (reads, writes) != ours and not (saes and reads == writes and reads in ours):
        where = " and behind LayerNorm's gain and bias, which this model has" * (found[0].endswith(".mlp.hook_in"))
        raise ValueError(
            f"the dictionary of layer {layer} reads {found[0]}{where}, and writes {found[1]}; a transcoder of this "
            f"layer reads {ours[0]} and writes {ours[1]}"
        )


def _check_numbers(model: TransformerBridge, layer: int, transcoder: Transcoder) -> None:
    """Refuse a transcoder of another precision, or on another device, than the model's."""
    theirs, ours = transcoder.W_enc.dtype, next(model.parameters()).dtype
    if theirs != ours:
        raise ValueError(
            f"the transcoder of layer {layer} is in {theirs}, but the model computes in {ours}: load it with "
            f"load_transcoders(..., dtype={ours})"
        )
    where, device = transcoder.W_enc.device.type, torch.device(str(model.cfg.device)).type
    if where != device:
        raise ValueError(f"the transcoder of layer {layer} is on {where}, but the model is on {device}: move one")
