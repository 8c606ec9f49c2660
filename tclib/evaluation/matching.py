"""Which feature is which: features of two training runs matched by decoder cosine."""

from __future__ import annotations

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tclib.transcoder import Transcoder


@torch.no_grad()
def nearest(
    a: Float[Tensor, "row_a d"], b: Float[Tensor, "row_b d"], chunk: int = 1024
) -> tuple[Float[Tensor, " row_a"], Int[Tensor, " row_a"]]:
    """For each row of ``a`` the largest cosine with a row of ``b``, and which row that is."""
    b = torch.nn.functional.normalize(b, dim=1)
    found = [(torch.nn.functional.normalize(part, dim=1) @ b.T).max(dim=1) for part in a.split(chunk)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def match(
    a: Transcoder,
    b: Transcoder,
    live_a: Bool[Tensor, " d_features"] | None = None,
    live_b: Bool[Tensor, " d_features"] | None = None,
) -> pd.DataFrame:
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
