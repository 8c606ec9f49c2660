"""One-step attribution: a number of one prompt as an exact, signed sum over everything that wrote to its input.

Frozen are the attention patterns and the LayerNorm scales of this prompt; what remains is linear, so the
contributions add up. Of a transcoder feature i (paper, equation 5):

    contribution  =  z_i / scale  *  f_dec_i . f_enc
                     input-dependent  input-invariant
"""

from __future__ import annotations

import pandas as pd
import torch

from tclib.linearity import check
from tclib.sources import sources
from tclib.targets import Target
from tclib.tracing import Trace

COLUMNS = [
    "kind",  # of the source, see `attribute`
    "layer",
    "head",
    "position",  # where the source stood
    "token",
    "feature",
    "written",  # in which layer's MLP output, of a feature; another than ``layer`` in a cross-layer transcoder alone
    "input_dependent",  # z / scale for features, pattern / scale for heads
    "input_invariant",  # f_dec . reader for features
    "contribution",
]


class UnbalancedError(RuntimeError):
    """The contributions do not add up to the target: a bug or a model of another kind, never a result."""


@torch.no_grad()
def attribute(trace: Trace, target: Target) -> pd.DataFrame:
    """Every source of a target with its signed contribution; they sum to the target.

    One row per source: active transcoder ``feature`` (of a cross-layer transcoder, one for each layer ``written``);
    transcoder ``error``, ``skip`` path and ``transcoder_bias`` of a layer; ``head`` and source position (BOS included),
    its ``value_bias``, and ``attention_bias`` of a layer; ``embedding`` and ``position`` embedding; ``target_bias``,
    the target's own (b_enc or b_U), and ``norm_bias`` of the LayerNorm it reads through. Value and LayerNorm biases are
    folded away, and have no rows, in a processed model.
    A layer without a transcoder is one row of kind ``mlp``: all of its MLP is error.

    Returns:
        A table with the columns `COLUMNS`, largest |contribution| first. ``table.attrs`` holds ``target`` (its name),
        ``value``, ``scale`` and ``without_transcoder`` (layers).

    Raises:
        UnbalancedError: |sum - value| > 1e-5 * sum |contribution| (1e-10 for a model in float64).
        NotFrozenError: the model does not answer as its weights say; see `tclib.linearity.check`, run first.
    """
    check(trace)
    direction, scale = target.pulled_back(trace), target.scale(trace)
    here = torch.tensor([target.position], device=direction.device)
    columns: dict[str, list] = {name: [] for name in COLUMNS}
    for source in sources(trace, trace.stage(target.place, target.layer)):
        items = source.items(here)
        amounts, along = source.amounts(here, items)[0], source.along(items, direction[:, None])[:, 0]
        given = {"kind": source.kind, "layer": source.layer, "position": target.position} | source.columns(items)
        given["contribution"] = (amounts * along).tolist()
        if source.kind in ("feature", "head"):
            given["input_dependent"] = (amounts / scale).tolist()
        if source.kind == "feature":
            given["input_invariant"] = (along * scale).tolist()
        _add(columns, len(items), given)
    biases = {"target_bias": target.bias}
    if trace.gain(target.place, target.layer)[1].any():
        biases["norm_bias"] = target.norm_bias(trace)
    for kind, contribution in biases.items():
        _add(columns, 1, {"kind": kind, "position": target.position, "contribution": contribution})
    table = pd.DataFrame(columns).astype({c: "Int64" for c in ("layer", "head", "feature", "written")})
    table = table.astype({c: float for c in ("input_dependent", "input_invariant", "contribution")})
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
            "is this a model of a supported family without other edits?"
        )


def _add(columns: dict[str, list], count: int, given: dict) -> None:
    """Append rows; a single value is repeated in all of them."""
    for name, column in columns.items():
        value = given.get(name)
        column += value if isinstance(value, list) else [value] * count
