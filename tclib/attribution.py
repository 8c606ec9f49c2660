"""One-step attribution: a number of one prompt as an exact, signed sum over everything that wrote to its input.

Frozen are the attention patterns and the LayerNorm scales of this prompt; what remains is linear, so the
contributions add up. Of a transcoder feature i (paper, equation 5):

    contribution  =  z_i / scale  *  f_dec_i . f_enc
                     input-dependent  input-invariant
"""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from tclib.activations import hook_in, hook_out
from tclib.frozen import self_test
from tclib.targets import Target
from tclib.tracing import Trace

COLUMNS = [
    "kind",  # of the source, see `attribute`
    "layer",
    "head",
    "position",  # where the source stood
    "token",
    "feature",
    "input_dependent",  # z / scale for features, pattern / scale for heads
    "input_invariant",  # f_dec . reader for features
    "contribution",
]


class UnbalancedError(RuntimeError):
    """The contributions do not add up to the target: a bug or a model of another kind, never a result."""


@torch.no_grad()
def attribute(trace: Trace, target: Target) -> pd.DataFrame:
    """Every source of a target with its signed contribution; they sum to the target.

    One row per source: active transcoder ``feature``; transcoder ``error``, ``skip`` path and ``transcoder_bias`` of a
    layer; ``head`` and source position (BOS included), its ``value_bias``, and ``attention_bias`` of a layer;
    ``embedding`` and ``position`` embedding; ``target_bias``, the target's own (b_enc or b_U), and ``norm_bias`` of
    the LayerNorm it reads through. Value and LayerNorm biases are folded away, and have no rows, in a processed model.
    A layer without a transcoder is one row of kind ``mlp``: all of its MLP is error.

    Returns:
        A table with the columns `COLUMNS`, largest |contribution| first. ``table.attrs`` holds ``target`` (its name),
        ``value``, ``scale`` and ``without_transcoder`` (layers).

    Raises:
        UnbalancedError: |sum - value| > 1e-5 * sum |contribution| (1e-10 for a model in float64).
        NotFrozenError: the model does not answer as its weights say; see `tclib.frozen.self_test`, run first.
    """
    self_test(trace)
    direction, scale = target.pulled_back(trace), target.scale(trace)
    here = target.position
    rows = [
        _row("embedding", here, trace.cache["hook_embed"][here] @ direction),
        _row("target_bias", here, target.bias),
    ]
    if "hook_pos_embed" in trace.cache:
        rows.append(_row("position", here, trace.cache["hook_pos_embed"][here] @ direction))
    if trace.gain(target.place, target.layer)[1].any():
        rows.append(_row("norm_bias", here, target.norm_bias(trace)))
    for layer in trace.attention_before(target.place, target.layer):
        rows += _attention(trace, layer, here, direction, scale)
    for layer in range(target.layer):
        rows += _mlp(trace, layer, here, direction, scale)
    table = pd.DataFrame(rows, columns=COLUMNS).astype({c: "Int64" for c in ("layer", "head", "feature")})
    table["token"] = [trace.token_strings[p] for p in table["position"]]
    table = table.sort_values("contribution", key=abs, ascending=False, ignore_index=True)
    without = [layer for layer in range(target.layer) if layer not in trace.transcoders]
    table.attrs |= {
        "target": target.name, "value": target.value(trace), "scale": scale, "without_transcoder": without
    }  # fmt: skip
    check_balance(table, 1e-5 if direction.dtype == torch.float32 else 1e-10)
    return table


def check_balance(table: pd.DataFrame, tolerance: float = 1e-5) -> None:
    """Raise `UnbalancedError` unless the contributions sum to ``table.attrs["value"]`` within rounding."""
    total, size = table["contribution"].sum(), table["contribution"].abs().sum()
    gap = abs(total - table.attrs["value"])
    if not gap <= tolerance * size:
        raise UnbalancedError(
            f"the contributions to {table.attrs['target']} sum to {total:.6f}, not {table.attrs['value']:.6f}: "
            "is this a GPT-2 or GPT-NeoX model without other edits?"
        )


def _row(kind: str, position: int, contribution: Tensor | float, **columns) -> dict:
    return {"kind": kind, "position": position, "contribution": float(contribution), **columns}


def _attention(trace: Trace, layer: int, here: int, direction: Tensor, scale: float) -> list[dict]:
    model, cache = trace.model, trace.cache
    pattern = cache[f"blocks.{layer}.attn.hook_pattern"][:, here, : here + 1]  # [head, source]
    values = cache[f"blocks.{layer}.attn.hook_v"][: here + 1]  # [source, head, d_head]
    readers = model.W_O[layer] @ direction  # [head, d_head]
    b_V = model.b_V[layer]  # [head, d_head]
    through = pattern * torch.einsum("shd,hd->hs", values - b_V, readers)
    rows = [_row("attention_bias", here, model.b_O[layer] @ direction, layer=layer)]
    if b_V.any():
        by_head = (pattern.sum(-1) * (b_V * readers).sum(-1)).tolist()
        rows += [_row("value_bias", here, bias, layer=layer, head=head) for head, bias in enumerate(by_head)]
    weights = (pattern / scale).tolist()
    for head, by_source in enumerate(through.tolist()):
        for source, contribution in enumerate(by_source):
            weight = weights[head][source]
            rows.append(_row("head", source, contribution, layer=layer, head=head, input_dependent=weight))
    return rows


def _mlp(trace: Trace, layer: int, here: int, direction: Tensor, scale: float) -> list[dict]:
    out = trace.cache[hook_out(layer)][here]
    if layer not in trace.transcoders:
        return [_row("mlp", here, out @ direction, layer=layer)]
    transcoder, z = trace.transcoders[layer], trace.features[layer][here]
    x = trace.cache[hook_in(layer)][here]
    active = z.nonzero().squeeze(-1)
    dependent, invariant = z[active] / scale, transcoder.W_dec[active] @ direction * scale
    rows = [
        _row("feature", here, d * i, layer=layer, feature=index, input_dependent=d, input_invariant=i)
        for index, d, i in zip(active.tolist(), dependent.tolist(), invariant.tolist(), strict=True)
    ]
    if transcoder.W_skip is not None:
        rows.append(_row("skip", here, x @ transcoder.W_skip @ direction, layer=layer))
    rows.append(_row("error", here, (out - transcoder.decode(z, x)) @ direction, layer=layer))
    rows.append(_row("transcoder_bias", here, transcoder.b_dec @ direction, layer=layer))
    return rows
