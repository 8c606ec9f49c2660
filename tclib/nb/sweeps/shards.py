"""The one-pass index in pieces, on the same cluster that runs the sweeps."""

from __future__ import annotations

import shutil
from pathlib import Path
from threading import Lock
from typing import Any

from tclib.nb.sweeps.cluster import connected

_LOADING = Lock()  # transformers switches the default device of the whole process while it builds a model


def build_index_sharded(
    folder: str | Path,
    shards: int,
    model: str = "bundled",
    transcoders: str = "bundled",
    text: str = "chronicle",
    rows: int = 256,
    seed: int = 0,
    cluster: Any = None,
) -> Any:
    """`tclib.features.build_index` in pieces: byte for byte the index that one process makes.

    Each worker loads model, transcoders and text by name, so nothing large is sent. Finished pieces stay in
    ``folder`` + ".shards" until all are merged: interrupted, the same call goes on with those that are missing.

    Args:
        folder: of the index; on a cluster of several machines, one that all of them see under this path.
        shards: how many pieces; more pieces than workers keep all of them busy to the end.
        model, transcoders: names or folders, as `tclib.load_model` and `tclib.load_transcoders` take them.
        text, rows, seed: as `tclib.load_text` takes them.
        cluster: as in `sweep`.

    Returns:
        The `tclib.features.Index`.

    Raises:
        ValueError: as `build_index` and `merge`: more shards than batches, or pieces of another text or other weights.
    """
    from tclib.features import Index, merge

    if shards < 1:
        raise ValueError(f"{shards} shards: the text is cut into one piece or more")
    folder = Path(folder).absolute()
    parent = folder.with_name(folder.name + ".shards")
    pieces = {parent / f"{i}_of_{shards}": (i, shards) for i in range(shards)}
    if folder.exists():
        pieces = {folder: (0, 1)}  # whether it is the one asked for is checked where the text is
    source = {"model": model, "transcoders": transcoders, "text": text, "rows": rows, "seed": seed}
    with connected(cluster, len(pieces)) as client:
        futures = [client.submit(index_shard, str(p), shard, **source, pure=False) for p, shard in pieces.items()]
        try:
            client.gather(futures)
        finally:
            client.cancel(futures)
    if folder in pieces:
        return Index(folder)
    index = merge(list(pieces), folder)
    shutil.rmtree(parent)
    return index


def index_shard(folder: str, shard: tuple[int, int], model: str, transcoders: str, text: str, rows: int, seed: int):
    """One piece, on a worker. A piece that is finished already is left as it is."""
    import tclib as tc
    from tclib.features import build_index

    with _LOADING:
        lm = tc.load_model(model, device="cpu")
    tokens = tc.load_text(lm, text, rows, seed)
    build_index(lm, tc.load_transcoders(transcoders, device="cpu"), tokens, folder, shard)
