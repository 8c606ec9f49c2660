"""Does a circuit predict what an edit does? Features of one prompt changed one at a time: predicted beside measured.

Prediction is linear, from weights: (new - old activation) times what reaches the target. Measurement runs the model
with (new - old) * f_dec added to the MLP's output, so that the transcoder's error stays. With patterns, scales and
MLP outputs frozen the two are the same number; what is left free is what attribution froze.

A feature of a cross-layer transcoder is changed in all its writes. Later MLPs that are free answer the change as well,
which counts some of it twice, since those writes stand for their answer; freezing them ("constrained patching", Ameisen
et al. 2025) leaves the writes alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tclib import interventions
from tclib.activations import hook_out
from tclib.circuits.direct_effects import Readers, Sources
from tclib.sources import Features, of_mlp
from tclib.targets import Target
from tclib.tracing import Trace

ROWS = 64  # edits in one pass of the model


def compare(
    trace: Trace,
    edits: pd.DataFrame,
    targets: Sequence[Target],
    frozen: Sequence[interventions.Frozen] = (),
    layers: Collection[int] | None = None,
) -> pd.DataFrame:
    """Predicted and measured change of every target by every edit, one edit at a time.

    Args:
        edits: ``layer``, ``position``, ``feature`` and, unless features are to be removed, ``new``: what to set.
        frozen: what must not answer the edit, see `tclib.interventions.freeze`. With patterns, scales and MLPs frozen,
            predicted equals measured: along all attention paths, or on the direct path alone if values are frozen too.
        layers: where; by default everywhere.

    Returns:
        One row per edit and target it can reach: ``layer``, ``position``, ``feature``, ``target``, ``predicted``,
        ``measured``, in units of the target.

    Raises:
        ValueError: no such layer, position or feature; an edit of a silent feature (no table has a row for it); MLPs
            frozen but values free with skip transcoders, whose skip paths are part of the prediction.
    """
    skips = any(t.W_skip is not None for t in trace.transcoders.values())
    if skips and "mlps" in frozen and "values" not in frozen:
        raise ValueError(
            "the prediction runs through skip paths, which frozen MLPs cut: freeze values too, or free the MLPs"
        )
    edits = _checked(trace, edits)
    measured = measure(trace, edits, targets, frozen, layers)
    predicted = predict(trace, edits, targets, direct="values" in frozen)
    keys = ["layer", "position", "feature"]
    rows = [
        edit | {"target": t.name, "predicted": predicted[i, k].item(), "measured": measured[i, k].item()}
        for i, edit in enumerate(edits[keys].to_dict("records"))
        for k, t in enumerate(targets)
        if edit["layer"] < t.layer
        and (edit["position"] == t.position or (edit["position"] < t.position and "values" not in frozen))
    ]
    return pd.DataFrame(rows, columns=[*keys, "target", "predicted", "measured"])


@torch.no_grad()
def predict(
    trace: Trace, edits: pd.DataFrame, targets: Sequence[Target], direct: bool = False
) -> Float[Tensor, "edit target"]:
    """The linear change from weights: along all attention paths (paper, section 4.1), or the direct one alone.

    Raises:
        ValueError: edits that the trace does not have, or of a silent feature.
    """
    edits, old, change = _changes(trace, edits)
    if (old == 0).any():
        silent = edits[(old == 0).cpu().numpy()].iloc[0]
        raise ValueError(
            f"feature {silent.layer}/{silent.feature} is silent at {silent.position}: no table predicts it"
        )
    if direct:
        readers, out = [t.pulled_back(trace) for t in targets], change.new_zeros(len(edits), len(targets))
        for row, e in enumerate(edits.itertuples()):
            for column, t in enumerate(targets):
                if e.position == t.position:
                    change_here = change[row] * _written(trace, e, trace.stage(t.place, t.layer))
                    out[row, column] = change_here @ readers[column]
        return out
    sources = Sources(trace)
    effects = sources.effects(Readers.of_targets(trace, targets))  # [target, source]
    keys = ["layer", "position", "feature"]
    columns = pd.Series(
        range(len(sources.features)), index=pd.MultiIndex.from_frame(sources.features[keys].astype(int))
    )
    index = columns.loc[pd.MultiIndex.from_frame(edits[keys])].tolist()
    return effects[:, index].T * (change / old)[:, None]


def _written(trace: Trace, edit, last: int) -> Float[Tensor, " d_model"]:
    """What a feature of activation 1 has written to the stream at its position up to a stage."""
    vector, index = torch.zeros_like(trace.like[0]), torch.tensor([edit.feature], device=trace.like.device)
    for layer in range(edit.layer, edit.layer + trace.transcoders[edit.layer].reach):
        for source in of_mlp(trace, layer):
            if isinstance(source, Features) and source.layer == edit.layer and source.stage <= last:
                vector = vector + source.vectors(index)[0] * source.over[edit.position]
    return vector


@torch.no_grad()
def measure(
    trace: Trace,
    edits: pd.DataFrame,
    targets: Sequence[Target],
    frozen: Sequence[interventions.Frozen] = (),
    layers: Collection[int] | None = None,
) -> Float[Tensor, "edit target"]:
    """How much each target changes in the model; the model is as it was afterwards, also after an error.

    Raises:
        ValueError: edits that the trace does not have.
    """
    edits, _, change = _changes(trace, edits)
    before = change.new_tensor([t.value(trace) for t in targets])
    needed = {name for name in trace.cache if "hook_resid" in name or name.endswith(("hook_scale", "hook_embed"))}
    out = change.new_zeros(len(edits), len(targets))
    for start in range(0, len(edits), ROWS):
        part = edits.iloc[start : start + ROWS]
        hooks = interventions.freeze(trace.cache, frozen, layers) + _edit(trace, part, change[start : start + ROWS])
        with interventions.edited(trace.model, hooks):
            _, cache = trace.model.run_with_cache(trace.tokens.expand(len(part), -1), names_filter=needed.__contains__)
        for row in range(len(part)):
            changed = replace(trace, cache={name: cache[name][row] for name in needed})
            out[start + row] = before.new_tensor([t.value(changed) for t in targets]) - before
    return out


def _edit(trace: Trace, edits: pd.DataFrame, change: Tensor) -> list[interventions.Hook]:
    """Row i of the batch gets edit i."""
    hooks = []
    for layer in edits["layer"].unique().tolist():
        rows = torch.tensor((edits["layer"] == layer).to_numpy().nonzero()[0], device=change.device)
        here = edits[edits["layer"] == layer]
        index = torch.tensor(here["feature"].tolist(), device=change.device)
        positions = torch.tensor(here["position"].tolist(), device=change.device)
        for later in range(trace.transcoders[layer].reach):
            added = change.new_zeros(len(edits), *trace.cache[hook_out(layer)].shape)
            added[rows, positions] = change[rows, None] * trace.transcoders[layer].rows(later)[index]
            writes = trace.transcoders[layer + later].config.hook_out
            hooks.append((writes, lambda y, hook, added=added: y + added))
    return hooks


def _checked(trace: Trace, edits: pd.DataFrame) -> pd.DataFrame:
    """Whole numbers, positions counted from the front; one sentence for what the trace does not have."""
    missing = {"layer", "position", "feature"} - set(edits.columns)
    if missing:
        raise ValueError(f"the edits have no column {', '.join(sorted(missing))}")
    edits = edits.reset_index(drop=True)
    edits["position"] = [trace.position(p) for p in edits["position"]]
    edits["feature"] = [trace.feature(*pair) for pair in zip(edits["layer"], edits["feature"], strict=True)]
    return edits.astype({"layer": int, "position": int, "feature": int})


def _changes(trace: Trace, edits: pd.DataFrame) -> tuple[pd.DataFrame, Tensor, Tensor]:
    """The edits, checked; each feature's activation; and by how much its edit changes that."""
    edits = _checked(trace, edits)
    places = zip(edits["layer"], edits["position"], edits["feature"], strict=True)
    old = trace.like.new_tensor([trace.features[layer][position, feature] for layer, position, feature in places])
    new = old.new_tensor(edits["new"].tolist()) if "new" in edits else torch.zeros_like(old)
    return edits, old, new - old
