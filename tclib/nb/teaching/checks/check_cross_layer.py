"""Checks of notebook 12: cross-layer transcoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tclib import interventions
from tclib.activations import hook_in
from tclib.nb.teaching.verdict import call, judge
from tclib.tracing import Trace

Vectors = Sequence[Tensor]


def imitated(answer: Callable[[Vectors, Vectors, Vectors, int], Float[Tensor, " d_out"]]) -> None:
    """Exercise 12.1, what a cross-layer transcoder puts in place of one MLP, from ``z, W_dec, b_dec, layer``.

    Expected: a loop over single numbers.
    """
    draw, layers, layer, features, width = torch.Generator().manual_seed(0), 4, 2, 5, 3
    z = [torch.rand(features, generator=draw, dtype=torch.float64) for _ in range(layers)]
    W_dec = [torch.randn(features, layers - k, width, generator=draw, dtype=torch.float64) for k in range(layers)]
    b_dec = [torch.randn(width, generator=draw, dtype=torch.float64) for _ in range(layers)]
    expected = [
        sum(float(z[k][i] * W_dec[k][i, layer - k, d]) for k in range(layer + 1) for i in range(features))
        + float(b_dec[layer][d])
        for d in range(width)
    ]
    right = torch.tensor(expected, dtype=torch.float64)
    own = z[layer] @ W_dec[layer][:, 0]
    mistakes = {
        "the features of earlier layers write there too": own + b_dec[layer],
        "b_dec is missing": right - b_dec[layer],
        "the writes of layer k begin at layer k: the one for this MLP is number layer - k": sum(
            z[k] @ W_dec[k][:, 0] for k in range(layer + 1)
        )
        + b_dec[layer],
        "an MLP has one output bias, its own": right + sum(b_dec[:layer], torch.zeros(width)),
        "its own features are missing": right - own,
    }
    tried = f"the imitation of MLP {layer} by {layers} layers of {features} features"
    judge(tried, call(answer, tried, z, W_dec, b_dec, layer), right, mistakes, "a sum over the layers up to this one")


def equal_width(answer: Callable[[int, int], float]) -> None:
    """Exercise 12.2, the features of each per-layer transcoder that make as many weights as a cross-layer one has.

    Expected: the numbers of all its matrices, counted one after the other.
    """
    d_features, layers, d_model = 600, 5, 7
    matrices = [torch.empty(d_model, d_features, device="meta") for _ in range(layers)]
    matrices += [torch.empty(d_features, d_model, device="meta") for k in range(layers) for _ in range(k, layers)]
    whole = sum(matrix.numel() for matrix in matrices)
    right = whole / (2 * layers * d_model)
    mistakes = {
        "features of later layers do not write to earlier MLPs: there are n (n + 1) / 2 decoders, and n encoders": (
            d_features * (layers + 1) / 2
        ),
        "that is the width of all layers together": layers * right,
        "a per-layer transcoder has an encoder and a decoder": 2 * right,
        "a cross-layer transcoder of the same width has more weights": d_features,
    }
    tried = f"{d_features} features in each of {layers} layers"
    judge(
        tried, call(answer, tried, d_features, layers), right, mistakes, "count the encoders and the decoders of both"
    )


def cross_removal(answer: Callable[[], float] | float, trace: Trace, source: pd.Series, layer: int, index: int) -> None:
    """Exercise 12.3, the change of a later feature's pre-activation when an earlier one at its position is taken out.

    ``source`` is a row of an attribution table of that pre-activation. Expected: the model is run without the feature,
    in all its writes, with patterns, scales, values and MLPs frozen.
    """
    at, feature, position = (int(source[name]) for name in ("layer", "feature", "position"))
    part, reader = trace.transcoders[at], trace.transcoders[layer].W_enc[:, index]
    removed = interventions.set_features(at, part, [feature], 0.0, position)

    def read(hooks: list) -> float:
        with interventions.edited(trace.model, hooks):
            _, cache = trace.model.run_with_cache(trace.tokens[None], names_filter=hook_in(layer))
        return float(cache[hook_in(layer)][0, position] @ reader)

    before = read([])
    measured = read(interventions.freeze(trace.cache, ["patterns", "scales", "values", "mlps"]) + removed) - before
    z = trace.features[at][position, feature]
    pulled = trace.pull_norm("mlp_in", layer, reader, position)
    mistakes = {
        "it has several writes, and all that come before the reader count": -z * (part.rows(0)[feature] @ pulled),
        "writes to the reader's own MLP and to later ones come too late": -z * (part.written()[feature] @ pulled),
        "the sign: what a feature adds is lost when it goes": -measured,
        "that is what happens when the later MLPs are free to answer": read(removed) - before,
        "that is the feature's activation, not what it does": z,
    }
    tried = f"the model run without layer {at}'s feature {feature}, in all its writes"
    judge(tried, call(answer, tried), measured, mistakes, "sum the feature's rows in the table", tolerance=5e-3)
