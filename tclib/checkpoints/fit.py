"""Do these transcoders belong to this model? One number per layer tells, before the two are joined."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.activations import mlp_activations
from tclib.inputs import check_tokens, words
from tclib.model import layer_norms
from tclib.replacement_model import check_belongs
from tclib.transcoder import Transcoder, imitation, is_cross_layer

BAD = 0.8  # the published transcoders leave far less unexplained; a wrong layer or transpose leaves about 1 or more
TOKENS = 400
OTHER = "it belongs to another model, or its matrices are mixed up; its numbers say nothing about this model"


@torch.no_grad()
def check_fit(
    model: TransformerBridge, transcoders: Mapping[int, Transcoder], tokens: Int[Tensor, "row pos"] | None = None
) -> pd.DataFrame:
    """Fraction of variance unexplained of each transcoder on a few hundred tokens: ``fvu``, by ``layer``.

    BOS is left out, as in training. Warns about layers at or above 0.8 with the likely cause: a wrong layer, a model
    that is processed otherwise, LayerNorm's gain, an input bias, a transpose. Each is tried.

    Args:
        tokens: chronicle text by default, which any English tokenizer can write.

    Raises:
        ValueError: a transcoder that reads or writes other hooks or widths than this model's MLPs; tokens that do not
            fit (see `tclib.inputs.check_tokens`).
    """
    for layer, transcoder in transcoders.items():
        check_belongs(model, layer, transcoder)
    if tokens is None:
        from tclib.text import ROW, load_text  # brings the generator of chronicles, which nobody needs to open a file

        tokens = load_text(model, "chronicle", -(-TOKENS // min(ROW, model.cfg.n_ctx)))
    tokens = check_tokens(model, tokens)
    all_layers = list(range(model.cfg.n_layers))
    kept = words(model, tokens.to(model.cfg.device)).split(8)
    writes = {layer: transcoder.config.hook_out for layer, transcoder in transcoders.items()}
    batches = list(zip(kept, mlp_activations(model, tokens, all_layers, 8, writes), strict=True))
    x, y = (
        {layer: torch.cat([getattr(seen[layer], part)[rows] for rows, seen in batches]) for layer in all_layers}
        for part in "xy"
    )
    cross = is_cross_layer(transcoders)
    inputs = {layer: x[layer].to(t.W_enc) for layer, t in transcoders.items()}
    z = {layer: t.encode(inputs[layer]) for layer, t in transcoders.items()}
    fvu = {
        layer: unexplained(y[layer], imitation(transcoders, layer, z, inputs[layer]).to(y[layer]))
        for layer in transcoders
    }
    for layer, value in fvu.items():
        if not value < BAD:
            few = [{other: t[:100] for other, t in part.items()} for part in (x, y)]  # enough to tell causes apart
            cause = OTHER if cross else _cause(model, layer, transcoders[layer], *few)
            warnings.warn(
                f"the transcoder of layer {layer} leaves {value:.2f} of this model's MLP output unexplained: {cause}",
                stacklevel=2,
            )
    return pd.DataFrame({"fvu": fvu}).rename_axis("layer")


def unexplained(y: Tensor, out: Tensor) -> float:
    """Sum of squared errors / sum of squared deviations from the mean output."""
    return float((y - out).square().sum() / (y - y.mean(0)).square().sum())


def _apply(transcoder: Transcoder, x: Tensor) -> Tensor:
    return transcoder(x.to(transcoder.W_enc)).to(x)


def _cause(model: TransformerBridge, layer: int, t: Transcoder, x: dict[int, Tensor], y: dict[int, Tensor]) -> str:
    """The likely mistake: the one whose correction brings the fit back."""
    out = _apply(t, x[layer])
    fits = {f"it fits layer {other}: is it in the wrong place?": (y[other], _apply(t, x[other])) for other in y}
    del fits[f"it fits layer {layer}: is it in the wrong place?"]
    fits["without their means over d_model, which later LayerNorms remove, it fits: is one side unprocessed?"] = (
        y[layer] - y[layer].mean(-1, keepdim=True), out - out.mean(-1, keepdim=True),
    )  # fmt: skip
    if t.config.d_in == t.config.d_out:
        fits["with its output bias subtracted from its input it fits: is b_dec an input bias there?"] = (
            y[layer], _apply(t, x[layer] - t.b_dec.to(x[layer])),
        )  # fmt: skip
    if t.W_skip is not None and t.W_skip.shape[0] == t.W_skip.shape[1]:
        fits["with W_skip transposed it fits"] = y[layer], out + x[layer] @ (t.W_skip.T - t.W_skip).to(x[layer])
    try:
        gain, bias = (part.to(x[layer]) for part in layer_norms(model, [layer])[layer])
        fits["it fits behind LayerNorm's gain and bias: it reads the MLP's own input"] = (
            y[layer], _apply(t, x[layer] * gain + bias),
        )  # fmt: skip
    except ValueError:  # a model without a folder
        pass
    values = {cause: unexplained(*pair) for cause, pair in fits.items()}
    best = min(values, key=values.__getitem__)
    if values[best] < BAD:
        return f"{best} ({values[best]:.2f})"
    return OTHER
