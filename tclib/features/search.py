"""Search features by label, positions, similarity or co-activation. Pure functions that return tables.

All but `by_similarity` and `labels_of` look through every activation of a layer, `best_labels` once for each label:
milliseconds per million.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Shaped

from tclib.features.feature_activations import FeatureActivations
from tclib.features.index import Index, blocks
from tclib.inputs import whole
from tclib.transcoder import Transcoder


def statistics(index: Index, layer: int) -> pd.DataFrame:
    """All features of a layer, one row each, dead ones too.

    Returns:
        ``feature``, ``count`` (tokens it fired on), ``frequency`` (share of tokens), ``mean`` (activation where it
        fires), ``max``; the last two are NaN where it never fired.
    """
    counts = np.diff(index.layer_offsets(layer))
    values = index.flat(layer)[1]
    live = counts > 0
    starts = index.layer_offsets(layer)[:-1][live]
    table = pd.DataFrame({"feature": np.arange(len(counts)), "count": counts, "frequency": counts / index.n_tokens})
    table["mean"] = _per_feature(values, index.layer_offsets(layer)) / np.where(live, counts, np.nan)
    table.loc[live, "max"] = np.maximum.reduceat(values, starts).astype(float) if live.any() else []
    return table


def by_label(index: Index, layer: int, label: Bool[np.ndarray, " token"], k: int = 20) -> pd.DataFrame:
    """Which features stand for a label: a column of the text's `ground_truth.truth`; as `by_positions`.

    Raises:
        ValueError: the column belongs to another text.
    """
    return by_positions(index, layer, spread(index, np.asarray(label)), k)


def by_positions(index: Index, layer: int, on: Bool[np.ndarray, " row*pos"], k: int = 20) -> pd.DataFrame:
    """Features whose firing agrees best with a set of positions, BOS included and False.

    Returns:
        ``feature``, ``count``, ``hits`` (firings inside the set), ``precision`` (hits / count), ``recall``
        (hits / size of the set), ``f1``; best F1 first.
    """
    counts = np.diff(index.layer_offsets(layer))
    hits = sums(index, layer, on.astype(np.float32)).round().astype(int)
    size = int(on[index.kept].sum())
    table = pd.DataFrame({"feature": np.arange(len(counts)), "count": counts, "hits": hits})
    table["precision"] = hits / np.maximum(counts, 1)
    table["recall"] = hits / max(size, 1)
    table["f1"] = 2 * hits / np.maximum(counts + size, 1)
    return table.sort_values("f1", ascending=False, kind="stable", ignore_index=True).head(k)


def labels_of(fired: FeatureActivations, truth: pd.DataFrame, k: int = 5) -> pd.DataFrame:
    """Which labels a feature stands for, taking "it fires" as the prediction.

    Args:
        truth: of the same text, by `tclib.evaluation.ground_truth.truth`.

    Returns:
        ``label``, ``precision``, ``recall``, ``f1``; best F1 first.

    Raises:
        ValueError: a table of another text.
        NeverFired: the feature has no activation.
    """
    _same_text(fired.index, len(truth))
    hits = truth.to_numpy()[fired.index.rank[fired.positions]].sum(0)
    sizes = truth.to_numpy().sum(0)
    table = pd.DataFrame({"label": list(truth), "precision": hits / fired.count, "recall": hits / sizes})
    table["f1"] = 2 * hits / (fired.count + sizes)
    return table.sort_values("f1", ascending=False, kind="stable", ignore_index=True).head(k)


def best_labels(index: Index, layer: int, truth: pd.DataFrame) -> pd.DataFrame:
    """`labels_of` for all features at once, the best only: ``feature``, ``label`` (None if it has none), ``f1``."""
    _same_text(index, len(truth))
    counts = np.diff(index.layer_offsets(layer))
    best, name = np.zeros(len(counts)), np.full(len(counts), None, dtype=object)
    for label in truth:
        on = truth[label].to_numpy()
        f1 = 2 * sums(index, layer, spread(index, on).astype(np.float32)) / np.maximum(counts + on.sum(), 1)
        better = f1 > best
        best[better], name[better] = f1[better], label
    return pd.DataFrame({"feature": np.arange(len(counts)), "label": name, "f1": best})


@torch.no_grad()
def by_similarity(transcoder: Transcoder, feature: int, k: int = 20) -> pd.DataFrame:
    """Features of the same transcoder that write in a similar direction.

    Returns:
        ``feature``, ``cosine``; the feature itself is left out.

    Raises:
        ValueError: no such feature.
    """
    feature = whole("feature", feature, transcoder.config.d_features, "the transcoder")
    rows = transcoder.W_dec.flatten(1)
    cosine = torch.cosine_similarity(rows, rows[feature][None], dim=1)
    cosine[feature] = -2
    values, chosen = cosine.topk(min(k, len(rows) - 1))
    return pd.DataFrame({"feature": chosen.cpu().numpy(), "cosine": values.cpu().numpy()})


def co_firing(fired: FeatureActivations, with_layer: int | None = None, k: int = 20) -> pd.DataFrame:
    """Which features of a layer (the same by default) fire on the same tokens.

    Returns:
        ``feature``, ``both`` (tokens), ``of_this`` (share of this feature's firings), ``of_other``, ``jaccard``,
        ``lift`` (both / what independence would give); largest Jaccard index first.
    """
    index, other = fired.index, fired.layer if with_layer is None else with_layer
    on = np.zeros(len(index.flat_tokens), np.float32)
    on[fired.positions] = 1
    counts, this = np.diff(index.layer_offsets(other)), fired.count
    both = sums(index, other, on).round().astype(int)
    table = pd.DataFrame({"feature": np.arange(len(counts)), "both": both})
    table["of_this"] = both / this
    table["of_other"] = both / np.maximum(counts, 1)
    table["jaccard"] = both / np.maximum(this + counts - both, 1)
    table["lift"] = both * index.n_tokens / np.maximum(this * counts, 1)
    if other == fired.layer:
        table = table[table["feature"] != fired.feature]
    return table.sort_values("jaccard", ascending=False, kind="stable", ignore_index=True).head(k)


def sums(
    index: Index, layer: int, weights: Float[np.ndarray, " row*pos"], activations: bool = False
) -> Float[np.ndarray, " feature"]:
    """For every feature the sum of the weights of the positions where it fires, times its activation if asked."""
    (positions, values), offsets = index.flat(layer), index.layer_offsets(layer)
    totals = np.zeros(len(offsets) - 1)
    for begin, end in blocks(offsets):
        here = slice(offsets[begin], offsets[end])
        picked = weights[positions[here]]
        picked = picked * values[here] if activations else picked
        totals[begin:end] = _per_feature(picked, offsets[begin : end + 1] - offsets[begin])
    return totals


def spread(index: Index, of_tokens: Shaped[np.ndarray, " token"]) -> Shaped[np.ndarray, " row*pos"]:
    """One value per token but BOS, in reading order, as one per position; False or 0 where BOS stands.

    Raises:
        ValueError: another number of tokens than the index has.
    """
    _same_text(index, len(of_tokens))
    out = np.zeros(len(index.kept), of_tokens.dtype)
    out[index.kept] = of_tokens
    return out


def _same_text(index: Index, length: int) -> None:
    if length != index.n_tokens:
        raise ValueError(f"{length} values for an index of {index.n_tokens} tokens (BOS left out): use the same text")


def _per_feature(per_entry: np.ndarray, offsets: np.ndarray) -> Float[np.ndarray, " feature"]:
    live = np.diff(offsets) > 0
    totals = np.zeros(len(live))
    if live.any():
        totals[live] = np.add.reduceat(per_entry, offsets[:-1][live], dtype=np.float64)
    return totals
