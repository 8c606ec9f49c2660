"""Why transcoders: the same MLP output taken apart into features, neurons, or SAE features pushed through the MLP.

Each function splits ``MLP(x) . direction`` at one position into terms that sum to it. A transcoder's and the neurons'
terms factorise, contribution = input-dependent x input-invariant; an SAE of the MLP's *input* has to go through the
MLP's Jacobian, so that both of its factors depend on the input (paper, section 4.1).
"""

from __future__ import annotations

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tclib.activations import hook_in, hook_out
from tclib.sources import of_mlp
from tclib.tracing import Trace
from tclib.transcoder import Transcoder


@torch.no_grad()
def by_features(trace: Trace, layer: int, position: int, direction: Float[Tensor, " d_model"]) -> pd.DataFrame:
    """One row per active transcoder feature, and what the features miss: ``error``, ``skip`` and ``bias``.

    Returns:
        ``unit`` (feature index or a name), ``input_dependent``, ``input_invariant`` and their product
        ``contribution``; the rows that are no features have a contribution alone.

    Raises:
        ValueError: no transcoder or a cross-layer one, or no such position.
    """
    here = torch.tensor([trace.position(position)], device=direction.device)
    if trace.transcoders[trace.layer(layer, with_transcoder=True)].config.n_writes is not None:
        raise ValueError("features of several layers write to an MLP of a cross-layer transcoder: use attribute")
    features, *others = of_mlp(trace, layer)
    active = features.items(here)
    written = [(s.kind.removeprefix("transcoder_"), s, s.items(here)) for s in others]
    rest = {
        name: s.amounts(here, items)[0] @ s.vectors(items) for name, s, items in sorted(written, key=lambda w: w[0])
    }
    dependent, invariant = features.amounts(here, active)[0], features.along(active, direction[:, None])[:, 0]
    return _table(active, dependent, invariant, rest, direction)


@torch.no_grad()
def by_neurons(trace: Trace, layer: int, position: int, direction: Float[Tensor, " d_model"]) -> pd.DataFrame:
    """One row per neuron, all of them active: ``gelu(x W_in + b_in) * (W_out . direction)``; and ``bias``, b_out.

    The neurons of a gated MLP are the units before its last matrix: ``silu(x W_gate) * x W_in``.
    """
    model, x = trace.model, trace.cache[hook_in(trace.layer(layer))][trace.position(position)]
    mlp, direction = model.blocks[layer].mlp, _before_norm(trace, layer, position, direction)
    post = []
    with model.hooks(fwd_hooks=[(f"blocks.{layer}.mlp.hook_post", lambda value, hook: post.append(value))]):
        mlp(_gained(trace, layer, x)[None, None])
    bias = {"bias": torch.zeros_like(direction) if mlp.b_out is None else mlp.b_out}
    return _table(torch.arange(len(mlp.W_out)), post[0][0, 0], mlp.W_out @ direction, bias, direction)


@torch.no_grad()
def by_sae(
    trace: Trace, sae: Transcoder, layer: int, position: int, direction: Float[Tensor, " d_model"]
) -> pd.DataFrame:
    """One row per active feature of an SAE on the MLP's input, through the MLP's Jacobian J at this input.

    ``MLP(x) = J x + (MLP(x) - J x)`` and ``x = sum_i z_i f_dec,i + bias + error``, so feature i contributes
    ``z_i * (f_dec,i . J^T direction)``: the column ``jacobian_factor`` stands where a transcoder has its constant.

    Raises:
        ValueError: the dictionary is not an SAE of this MLP's input.
    """
    if (sae.config.hook_in, sae.config.hook_out) != (hook_in(trace.layer(layer)),) * 2:
        raise ValueError(f"this needs an SAE of {hook_in(layer)}; the one given reads {sae.config.hook_in}")
    position = trace.position(position)
    x, out = trace.cache[hook_in(layer)][position], trace.cache[hook_out(layer)][position]
    pulled = jacobian_pullback(trace, layer, x, _before_norm(trace, layer, position, direction))
    z = sae.encode(x)
    active = z.nonzero().squeeze(-1)
    rest = {"bias": sae.b_dec, "error": x - sae.decode(z, x)}
    table = _table(active, z[active], sae.W_dec[active] @ pulled, rest, pulled)
    table = table.rename(columns={"input_invariant": "jacobian_factor"})
    table.loc[len(table), ["unit", "contribution"]] = ["remainder", (out @ direction - x @ pulled).item()]
    return table


def jacobian_pullback(
    trace: Trace, layer: int, x: Float[Tensor, " d_model"], direction: Float[Tensor, " d_model"]
) -> Float[Tensor, " d_model"]:
    """``J(x)^T direction`` of the MLP of a layer at its (normalised) input x, by autograd."""
    layer = trace.layer(layer)
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_(True)
        out = trace.model.blocks[layer].mlp(_gained(trace, layer, x)[None, None])[0, 0]
        return torch.autograd.grad(out @ direction, x)[0]


def terms_holding(contributions: pd.Series, share: float = 0.9) -> int:
    """How many of the largest terms hold this share of sum |contribution|."""
    sizes = contributions.abs().sort_values(ascending=False).cumsum()
    return int((sizes < share * sizes.iloc[-1]).sum()) + 1


def _gained(trace: Trace, layer: int, x: Tensor) -> Tensor:
    norm = trace.norm("mlp_in", layer)
    return x if norm is None else x * norm.gain + norm.bias


def _before_norm(trace: Trace, layer: int, position: int, direction: Tensor) -> Tensor:
    """A direction in the stream as one in the MLP's output, where a norm comes between."""
    after = trace.block(layer).after_mlp
    return direction if after is None else after.centre(direction * after.gain) / trace.frozen_scale(after)[position]


def _table(units: Tensor, dependent: Tensor, invariant: Tensor, rest: dict[str, Tensor], direction: Tensor):
    table = pd.DataFrame(
        {"unit": units.tolist(), "input_dependent": dependent.tolist(), "input_invariant": invariant.tolist()},
        dtype=object,
    )
    table["contribution"] = (dependent * invariant).tolist()
    extra = [{"unit": name, "contribution": (vector @ direction).item()} for name, vector in rest.items()]
    table = pd.concat([table, pd.DataFrame(extra)], ignore_index=True)
    numbers = table.columns.drop("unit")
    return table.astype({column: float for column in numbers})
