"""Two dictionaries that nobody trained: the MLP's own neurons, and random directions with the best decoder."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.activations import hook_in, hook_out
from tclib.inputs import check_layers, whole
from tclib.interventions import Hook
from tclib.transcoder import Transcoder, TranscoderConfig


def neuron_hook(layer: int) -> str:
    """The MLP's neurons after the nonlinearity, ``[row, pos, d_mlp]``."""
    return f"blocks.{layer}.mlp.hook_post"


def top_neurons(model: TransformerBridge, layer: int, k: int, mean: Float[Tensor, " d_mlp"]) -> list[Hook]:
    """At each token the k neurons that write most beyond their mean are free, the others held at it: L0 = k.

    The strength of neuron i is ``|a_i - mean_i| * ||W_out[i]||``.

    Raises:
        ValueError: no such layer, or more neurons than it has.
    """
    check_layers(model, [layer])
    length = model.W_out[layer].norm(dim=1)
    k = whole("k", k, len(length) + 1, "the layer")

    def edit(a: Float[Tensor, "row pos d_mlp"], hook) -> Tensor:
        strength = (a - mean).abs() * length
        least = strength.topk(k, dim=-1).values[..., -1:]
        return torch.where(strength >= least, a, mean)

    return [(neuron_hook(layer), edit)]


def random_directions(
    layer: int,
    x: Float[Tensor, "token d_in"],
    y: Float[Tensor, "token d_out"],
    k: float,
    d_features: int,
    seed: int = 0,
) -> Transcoder:
    """A random encoder of which k features fire per token, with the ridge-regressed decoder of ``x`` to ``y``.

    The decoder is `ridge`'s, with activations and outputs centred.
    """
    generator = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(x.shape[1], d_features, generator=generator).to(x)
    W_enc /= W_enc.norm(dim=0)
    pre = (x - x.mean(0)) @ W_enc
    sample = pre.flatten()[:: 1 + pre.numel() // 1_000_000]
    threshold = sample.quantile(1 - k / d_features)
    z = torch.relu(pre - threshold)
    z_mean, y_mean = z.mean(0), y.mean(0)
    W_dec = ridge(z - z_mean, y - y_mean)
    config = TranscoderConfig(
        d_in=x.shape[1], d_out=y.shape[1], d_features=d_features, hook_in=hook_in(layer), hook_out=hook_out(layer)
    )
    transcoder = Transcoder(config)
    weights = {"W_enc": W_enc, "b_enc": -x.mean(0) @ W_enc - threshold}
    transcoder.load_state_dict(weights | {"W_dec": W_dec, "b_dec": y_mean - z_mean @ W_dec})
    return transcoder.eval().requires_grad_(False)


def ridge(Z: Float[Tensor, "token n"], Y: Float[Tensor, "token m"], rho: float = 0.01) -> Float[Tensor, "n m"]:
    """The linear map from Z to Y of least squared error: ``(Z'Z + rho m I)^-1 Z'Y``, m the mean of Z'Z's diagonal."""
    gram = Z.T @ Z
    return torch.linalg.solve(gram + rho * gram.diagonal().mean() * torch.eye(len(gram)).to(gram), Z.T @ Y)
