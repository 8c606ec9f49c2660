"""Ground truth: how well single units stand for the labels that made the text.

A *unit* is a feature, a neuron or a direction; a *label* is true or false of each token. For each unit the label and
the threshold with the highest F1 are chosen on one split, and everything is scored on another. Selectivity is that of
Morcos et al. 2018; splitting and absorption follow Chanin et al. 2024, with units in place of probes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tclib.activations import mlp_activations
from tclib.replacement_model import ReplacementModel, joined
from tclib.text import LabelledText

Units = Float[np.ndarray, "token unit"]
Truth = Bool[np.ndarray, "token label"]

LEVELS = 256  # thresholds tried per unit: all its distinct activations, or this many quantiles of them
COVERED = 0.5  # a label is covered if one unit reaches this F1
PRECISE = 0.8  # a unit is devoted to a label if this share of its firing is on it ...
SEEN = 0.05  # ... and it fires on this share of the label's tokens


@dataclass(frozen=True)
class Scored:
    """One row per unit and one per label; all numbers but the choices are of the second split."""

    units: pd.DataFrame  # unit, label, threshold, auroc, f1, precision, recall, selectivity
    labels: pd.DataFrame  # label, tokens, unit, f1, auroc, covered, devoted, split, absorbed

    def summary(self) -> pd.Series:
        """Means over labels (``f1`` and ``auroc`` of the best unit, shares ``covered`` ...) and medians over units."""
        means = self.labels[["f1", "auroc", "covered", "split", "absorbed"]].astype(float).mean()
        medians = self.units[["f1", "auroc", "selectivity"]].median().add_prefix("unit_")
        return pd.concat([means, medians])


def truth(text: LabelledText, least: int = 20) -> pd.DataFrame:
    """Which labels hold at each token, BOS left out: its own, and as ``"next ..."`` that of the token after it.

    A late MLP prepares the next token, so both are what a feature may stand for. Parts of dotted names are labels
    too: ``"any year"`` holds at ``"span.end.year"`` and ``"life.end.year"``. Labels with fewer than ``least`` tokens,
    and the ``"plain"`` of text that no label explains, are left out.

    Returns:
        A boolean table, one row per token in reading order, one column per label.
    """
    labels = text.labels
    follow = np.concatenate([labels[:, 1:], np.full((len(labels), 1), "bos", dtype=object)], axis=1)
    keep = labels != "bos"
    table = pd.concat([_indicators(labels[keep]), _indicators(follow[keep]).add_prefix("next ")], axis=1)
    return table.loc[:, table.sum() >= least]


def score(choose: Units, choose_truth: pd.DataFrame, test: Units, test_truth: pd.DataFrame) -> Scored:
    """Score units against labels: choices on the first split, numbers on the second.

    Args:
        choose, test: activations; a unit that never varies gets no label.
        choose_truth, test_truth: tables of `truth`; labels that one of them lacks are left out.

    Raises:
        ValueError: lengths that differ, NaN, or no label in common.
    """
    names = [str(name) for name in choose_truth if name in test_truth]
    for split, (units, labels) in {"first": (choose, choose_truth), "second": (test, test_truth)}.items():
        if len(units) != len(labels):
            raise ValueError(f"the {split} split has {len(units)} tokens of activations but {len(labels)} of labels")
        if not np.isfinite(units).all():
            raise ValueError(f"activations of the {split} split hold NaN or infinity")
    if not names or choose.shape[1] != test.shape[1]:
        raise ValueError("the two splits share no label, or have different numbers of units")
    there = np.asfortranarray(test_truth[names])  # columns are read one by one
    f1, thresholds = best_f1(choose, choose_truth[names].to_numpy())
    chosen = f1.argmax(1)
    threshold = thresholds[np.arange(len(f1)), chosen]
    fires = np.asfortranarray(test >= threshold)
    units = _score_units(test, there, chosen, fires)
    units.insert(1, "label", np.array([*names, None], dtype=object)[np.where(f1.max(1) > 0, chosen, -1)])
    units.insert(2, "threshold", threshold)
    return Scored(units, _score_labels(names, there, f1, thresholds, test, units, fires))


def score_set(replacement: ReplacementModel, choose: LabelledText, test: LabelledText) -> Scored:
    """`score` for all features of a set, those of all layers side by side in the order of the layers."""
    splits, transcoders = [], joined(replacement).transcoders
    for text in (choose, test):
        z: dict[int, list[Tensor]] = {layer: [] for layer in transcoders}
        for batch in mlp_activations(replacement.model, text.tokens, list(transcoders)):
            for layer, transcoder in transcoders.items():
                z[layer].append(transcoder.encode(batch[layer].x).flatten(0, 1))
        units = torch.cat([torch.cat(parts) for parts in z.values()], 1).cpu().numpy()
        splits += [units[(text.labels != "bos").flatten()], truth(text)]
    return score(*splits)


def best_f1(units: Units, labels: Truth) -> tuple[Float[np.ndarray, "unit label"], Float[np.ndarray, "unit label"]]:
    """For each unit and label the highest F1 = 2 TP / (2 TP + FP + FN) of ``unit >= threshold``, and the threshold.

    Thresholds lie above the unit's smallest value, so that for a feature "not firing" is never a prediction.
    """
    where = np.nonzero(labels)
    total = labels.sum(0)
    f1 = np.zeros((units.shape[1], labels.shape[1]))
    at = np.full(f1.shape, np.inf)
    for unit, values in enumerate(units.T):
        edges = _edges(values)
        if not len(edges):
            continue
        level = np.searchsorted(edges, values, side="right")  # 0: below every threshold
        hits = np.bincount(level[where[0]] * len(total) + where[1], minlength=(len(edges) + 1) * len(total))
        hits = hits.reshape(len(edges) + 1, -1)[:0:-1].cumsum(0)[::-1]  # [edge, label] true positives
        fired = np.bincount(level, minlength=len(edges) + 1)[:0:-1].cumsum()[::-1]
        scores = 2 * hits / (fired[:, None] + total)
        best = scores.argmax(0)
        f1[unit] = scores[best, np.arange(len(total))]
        at[unit] = edges[best]
    return f1, at


def auroc(values: Float[np.ndarray, " token"], positive: Bool[np.ndarray, " token"]) -> float:
    """P(a token with the label scores above one without), ties counted half; NaN if there are none of either."""
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return float("nan")
    above = values > values.min()
    floor = len(values) - above.sum()  # most tokens of a sparse unit: they share one rank and need no sorting
    ranks = floor + pd.Series(values[above]).rank().to_numpy()[positive[above]]
    total = ranks.sum() + (n - len(ranks)) * (floor + 1) / 2
    return float((total - n * (n + 1) / 2) / (n * m))


def _indicators(labels: np.ndarray) -> pd.DataFrame:
    """One boolean column per label, and one per part that several dotted labels share."""
    table = pd.get_dummies(pd.Series(labels, dtype=object), dtype=bool).drop(columns=["plain", "bos"], errors="ignore")
    names = [str(name) for name in table]
    for part in sorted({part for name in names for part in name.split(".")}):
        members = [name for name in names if part in name.split(".")]
        if len(members) > 1:
            table[f"any {part}"] = table[members].any(axis=1)
    return table


def _edges(values: np.ndarray) -> np.ndarray:
    distinct = np.unique(values)[1:]  # the smallest value is no threshold
    if len(distinct) <= LEVELS:
        return distinct
    active = np.sort(values[values > values.min()])
    return np.unique(active[np.linspace(0, len(active) - 1, LEVELS).astype(int)])


def _score_units(units: Units, labels: Truth, chosen: Int[np.ndarray, " unit"], fires: Truth) -> pd.DataFrame:
    records = []
    for unit, label in enumerate(chosen):
        on, fired, values = labels[:, label], fires[:, unit], units[:, unit]
        hits = int((on & fired).sum())
        # Measured from the unit's floor, which is 0 for a feature and below 0 for a neuron.
        inside, outside = (values[side].mean() - values.min() if side.any() else 0.0 for side in (on, ~on))
        records.append(
            {
                "unit": unit,
                "auroc": auroc(values, on),
                "f1": 2 * hits / max(fired.sum() + on.sum(), 1),
                "precision": hits / max(fired.sum(), 1),
                "recall": hits / max(on.sum(), 1),
                "selectivity": (inside - outside) / max(inside + outside, 1e-12),
            }
        )
    return pd.DataFrame(records)


def _score_labels(
    names: list[str],
    labels: Truth,
    f1: np.ndarray,
    thresholds: np.ndarray,
    test: Units,
    units: pd.DataFrame,
    fires: Truth,
) -> pd.DataFrame:
    """For each label its best unit of the first split, and what other units take from it."""
    records = []
    label, recall = units["label"].to_numpy(), units["recall"].to_numpy()
    precise = (units["precision"].to_numpy() >= PRECISE) & (recall >= SEEN)
    for index, name in enumerate(names):
        on, main = labels[:, index], int(f1[:, index].argmax())
        fired = test[:, main] >= thresholds[main, index]
        hits = int((on & fired).sum())
        devoted = precise & (label == name)
        others = devoted.copy()
        others[main] = False
        # Silent where it should speak, while a unit that speaks of little else does.
        taken = on & ~fired & fires[:, others].any(1)
        main_f1 = 2 * hits / max(int(fired.sum() + on.sum()), 1)
        together = on & fires[:, devoted].any(1)
        largest = recall[devoted].max(initial=0.0)
        records.append(
            {
                "label": name,
                "tokens": int(on.sum()),
                "unit": main,
                "f1": main_f1,
                "auroc": auroc(test[:, main], on),
                "covered": main_f1 >= COVERED,
                "devoted": int(devoted.sum()),
                # Several precise units that only together see most of it.
                "split": devoted.sum() > 1 and together.sum() / max(on.sum(), 1) > largest + 0.2,
                "absorbed": taken.sum() / max(on.sum(), 1) if main_f1 >= COVERED else np.nan,
            }
        )
    return pd.DataFrame(records)
