"""Strongest connections of a feature, by weights alone and weighted by the text of an index, without another pass.

With V = f_dec . f_enc (centred if the norm centres), z the later and z_i the earlier activation, scale that of the norm
before the later layer's MLP, over all tokens but BOS (as `tclib.connections.data_weighted`). Where the earlier
transcoder writes through a norm (Gemma 2 and 3, OLMo 2), its gain is part of V and its scale of ``scale``:

    input_x_gradient = V E[ 1(z > 0) z_i / scale ]
    target_weighted  = V E[ z z_i / scale ] / E[ z ]
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from tclib.features.feature_activations import FeatureActivations
from tclib.features.index import Index
from tclib.features.search import sums
from tclib.inputs import feature_of
from tclib.transcoder import Transcoder

COLUMNS = ["layer", "feature", "input_invariant", "input_x_gradient", "target_weighted"]


@torch.no_grad()
def incoming(fired: FeatureActivations, transcoders: Mapping[int, Transcoder]) -> pd.DataFrame:
    """Every feature of every earlier layer as a source of one feature, on the direct path.

    Returns:
        ``layer``, ``feature``, ``input_invariant``, ``input_x_gradient``, ``target_weighted``; the last two are NaN if
        the feature never fired.
    """
    index, layer = fired.index, fired.layer
    feature = feature_of(transcoders, layer, fired.feature)
    f_enc = _centred(index, transcoders[layer].W_enc[:, feature].cpu())
    tables = [_empty()]
    for earlier in sorted(at for at in transcoders if at < layer):
        V = (transcoders[earlier].written(layer - earlier).cpu() @ _written(index, earlier, f_enc)).numpy()
        table = {"layer": earlier, "feature": np.arange(len(V)), "input_invariant": V}
        if fired.count:
            fires, strength = _at(fired, 1.0), _at(fired, fired.values)
            scale = index.scale[layer] * index.after.get(earlier, np.float32(1))
            table["input_x_gradient"] = V * sums(index, earlier, fires / scale, activations=True) / index.n_tokens
            total = fired.values.sum(dtype=np.float64)
            table["target_weighted"] = V * sums(index, earlier, strength / scale, activations=True) / total
        tables.append(pd.DataFrame(table))
    return pd.concat(tables, ignore_index=True)[COLUMNS]


@torch.no_grad()
def outgoing(fired: FeatureActivations, transcoders: Mapping[int, Transcoder]) -> pd.DataFrame:
    """Connections from one feature to every feature of every later layer, on the direct path; columns as `incoming`."""
    index, layer = fired.index, fired.layer
    feature = feature_of(transcoders, layer, fired.feature)
    tables = [_empty()]
    for later in sorted(at for at in transcoders if at > layer):
        f_dec = transcoders[layer].written(later - layer)[feature].cpu()
        V = (_written(index, layer, _centred(index, transcoders[later].W_enc.T.cpu())) @ f_dec).numpy()
        table = {"layer": later, "feature": np.arange(len(V)), "input_invariant": V}
        if fired.count:
            written = _at(fired, fired.values) / index.scale[later] / index.after.get(layer, np.float32(1))
            table["input_x_gradient"] = V * sums(index, later, written) / index.n_tokens
            totals = sums(index, later, np.ones(len(written), np.float32), activations=True)
            together = sums(index, later, written, activations=True)
            table["target_weighted"] = V * np.divide(together, totals, out=np.zeros_like(together), where=totals > 0)
        tables.append(pd.DataFrame(table))
    return pd.concat(tables, ignore_index=True)[COLUMNS]


def strongest(table: pd.DataFrame, by: str, k: int = 8) -> pd.DataFrame:
    """The k connections of largest magnitude."""
    return table.dropna(subset=[by]).sort_values(by, key=abs, ascending=False, kind="stable", ignore_index=True).head(k)


def _centred(index: Index, readers: Float[Tensor, "*reader d_model"]) -> Float[Tensor, "*reader d_model"]:
    return readers - readers.mean(-1, keepdim=True) if index.about.get("centres", True) else readers


def _written(index: Index, layer: int, readers: Float[Tensor, "*reader d_model"]) -> Float[Tensor, "*reader d_model"]:
    """Readers of the stream as readers of a layer's decoder rows, which may pass a norm (without its scale)."""
    if layer not in index.gain:
        return readers
    gained = readers * torch.from_numpy(np.array(index.gain[layer]))
    return gained - gained.mean(-1, keepdim=True) if index.about["norm_after"][str(layer)] else gained


def _at(fired: FeatureActivations, values: np.ndarray | float) -> Float32[np.ndarray, " row*pos"]:
    dense = np.zeros(len(fired.index.flat_tokens), np.float32)
    dense[fired.positions] = values
    return dense


def _empty() -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(dtype=int if name in COLUMNS[:2] else float) for name in COLUMNS})
