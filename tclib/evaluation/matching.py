"""Which feature is which: decoder geometry, and features of two trainings matched by decoder cosine."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.transcoder import Transcoder

TWIN = 0.9  # two decoder rows closer than this point the same way


@torch.no_grad()
def nearest(
    a: Float[Tensor, "row_a d"], b: Float[Tensor, "row_b d"], chunk: int = 1024
) -> tuple[Float[Tensor, " row_a"], Int[Tensor, " row_a"]]:
    """For each row of ``a`` the largest cosine with a row of ``b``, and which row that is."""
    b = torch.nn.functional.normalize(b, dim=1)
    found = [(torch.nn.functional.normalize(part, dim=1) @ b.T).max(dim=1) for part in a.split(chunk)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


@torch.no_grad()
def geometry(transcoders: Mapping[int, Transcoder], firing: Mapping[int, Tensor]) -> pd.DataFrame:
    """Decoder geometry of the features that fire, one row per layer.

    Returns:
        ``layer``, ``live`` (features that fired), ``norm`` (median length of a decoder row), ``neighbour`` (median
        cosine with the nearest other row), ``neighbour_random`` (the same for random directions, the control),
        ``twins`` (fraction with a neighbour above 0.9), ``dimensions`` (participation ratio of the rows' covariance:
        how many directions they spread over), ``encoder`` (median cosine of encoder column and decoder row, where
        both have one width).
    """
    records = []
    for layer, transcoder in transcoders.items():
        live = firing[layer] > 0
        rows = transcoder.W_dec[live].flatten(1)
        cosine = _neighbours(rows)
        spectrum = torch.linalg.svdvals(rows - rows.mean(0)).pow(2)
        record = {
            "layer": layer,
            "live": int(live.sum()),
            "norm": rows.norm(dim=1).median().item(),
            "neighbour": cosine.median().item(),
            "neighbour_random": _neighbours(torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)))
            .median()
            .item(),
            "twins": (cosine > TWIN).double().mean().item(),
            "dimensions": (spectrum.sum() ** 2 / spectrum.pow(2).sum()).item(),
        }
        if transcoder.config.d_in == transcoder.config.d_out:
            columns = transcoder.W_enc[:, live].T
            record["encoder"] = torch.cosine_similarity(columns, transcoder.rows()[live], dim=1).median().item()
        records.append(record)
    return pd.DataFrame(records)


def match(a: Transcoder, b: Transcoder, live_a: Tensor | None = None, live_b: Tensor | None = None) -> pd.DataFrame:
    """Each live feature of ``a`` beside the live feature of ``b`` with the nearest decoder row.

    Returns:
        ``feature``, ``match``, ``cosine``, ``mutual`` (the match's own nearest is this feature).

    Raises:
        ValueError: the two write to spaces of different width, or nothing is live.
    """
    width_a, width_b = (t.config.d_out * t.reach for t in (a, b))
    if width_a != width_b:
        raise ValueError(f"features that write {width_a} and {width_b} numbers cannot be matched")
    ids_a, ids_b = _ids(a, live_a), _ids(b, live_b)
    if not len(ids_a) or not len(ids_b):
        raise ValueError("no feature is live, so there is nothing to match")
    rows_a, rows_b = a.W_dec[ids_a].flatten(1), b.W_dec[ids_b].flatten(1)
    cosine, index = nearest(rows_a, rows_b)
    _, back = nearest(rows_b, rows_a)
    mutual = back[index] == torch.arange(len(ids_a), device=back.device)
    columns = {"feature": ids_a, "match": ids_b[index], "cosine": cosine, "mutual": mutual}
    return pd.DataFrame({name: value.cpu().numpy() for name, value in columns.items()})


def _ids(transcoder: Transcoder, live: Tensor | None) -> Int[Tensor, " live"]:
    every = torch.arange(transcoder.config.d_features, device=transcoder.W_dec.device)
    return every if live is None else every[live.to(every.device)]


def _neighbours(rows: Float[Tensor, "row d"], chunk: int = 1024) -> Float[Tensor, " row"]:
    """Largest cosine of each row with another one."""
    unit = torch.nn.functional.normalize(rows, dim=1)
    found = []
    for start in range(0, len(unit), chunk):
        cosine = unit[start : start + chunk] @ unit.T
        cosine.diagonal(start).fill_(-1)
        found.append(cosine.max(dim=1).values)
    return torch.cat(found)
