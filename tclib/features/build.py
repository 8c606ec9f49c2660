"""Build an index in one pass over the text, all layers at once; shards merge into the same bytes.

The text is cut into batches of `BATCH_ROWS` rows, batches are grouped into parts of about `PART_TOKENS` tokens, and
each part becomes a small index of its own. Merging parts and merging shards is one function. What a batch gives does
not depend on the part or shard it belongs to, so neither do the bytes (on one kind of processor).
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.activations import norm_after
from tclib.blocks import Block
from tclib.evaluation.metrics import check
from tclib.features.active import ActiveFinder
from tclib.features.index import DTYPES, FLAT, FORMAT, ArrayFile, Index, blocks, fingerprint, finish, new_folder
from tclib.inputs import bos_id, words
from tclib.interventions import edited
from tclib.replacement_model import ReplacementModel, joined
from tclib.text import text_hash

BATCH_ROWS = 16
PART_TOKENS = 16_384
MERGED_AT_ONCE = 1_000_000  # activations


def build_index(
    replacement: ReplacementModel,
    tokens: Int[Tensor, "row pos"],
    folder: str | Path,
    shard: tuple[int, int] = (0, 1),
) -> Index:
    """Index every feature of every layer given, in one pass.

    The work is kept in ``folder`` + ".part" until it is done; the same call goes on where an interrupted one stopped,
    and gives back a finished index of the same weights and text.

    Args:
        shard: ``(i, n)`` indexes the i-th of n pieces of the text; `merge` joins the pieces.

    Raises:
        ValueError: no text, no transcoder, a shard without rows, a full disk, or a folder begun with
            other weights or another text (both are named).
    """
    tokens, model, transcoders = check_input(replacement, tokens), replacement.model, replacement.transcoders
    folder = Path(folder)
    start, stop = _shard_rows(len(tokens), shard)
    about = _about(replacement, tokens, start, stop)
    if folder.exists():
        if not (folder / "index.json").exists():
            raise ValueError(f"{folder} exists and holds no index: choose a new folder")
        index = Index(folder)
        _refuse_another(index.about, about, folder)
        return index
    work = folder.with_name(folder.name + ".part")
    work.mkdir(parents=True, exist_ok=True)
    finders = {layer: ActiveFinder(transcoder) for layer, transcoder in sorted(transcoders.items())}
    step = BATCH_ROWS * max(1, PART_TOKENS // (BATCH_ROWS * tokens.shape[1]))
    parts = []
    for first in range(start, stop, step):
        rows = range(first, min(first + step, stop))
        parts.append(work / f"rows_{rows.start:09d}")
        expected = about | {"rows": [rows.start, rows.stop]}
        if parts[-1].exists():
            _refuse_another(Index(parts[-1]).about, expected, parts[-1])
        else:
            _write_part(model, finders, tokens[rows.start : rows.stop], expected, parts[-1])
    index = merge(parts, folder)
    shutil.rmtree(work)
    return index


def merge(folders: Sequence[str | Path], out: str | Path) -> Index:
    """Join indexes of adjacent rows into one, byte for byte that of a single run over them.

    Raises:
        ValueError: none given, rows missing or twice, or indexes of other weights or texts (both are named).
    """
    if not folders:
        raise ValueError("there is nothing to merge: give the folders of at least one index")
    parts = sorted((Index(folder) for folder in folders), key=lambda part: part.about["rows"])
    first = parts[0]
    for before, part in zip(parts, parts[1:], strict=False):
        _refuse_another(first.about, part.about | {"rows": first.about["rows"]}, first.folder)
        if before.about["rows"][1] != part.about["rows"][0]:
            raise ValueError(
                f"rows {before.about['rows'][1]} to {part.about['rows'][0]} are missing or twice between "
                f"{before.folder.name} and {part.folder.name}: merge adjacent shards"
            )
    about = first.about | {"rows": [first.about["rows"][0], parts[-1].about["rows"][1]]}
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists: merge into a new folder")
    with new_folder(out) as folder:
        np.save(folder / "tokens.npy", np.concatenate([part.tokens for part in parts]))
        for layer in first.layers:
            _merge_layer(parts, layer, folder)
        finish(folder, about)
    return Index(out)


def _merge_layer(parts: Sequence[Index], layer: int, folder: Path) -> None:
    offsets = np.sum([part.offsets[layer] for part in parts], axis=0)
    np.save(folder / f"layer_{layer}.offsets.npy", offsets)
    files = {name: ArrayFile(folder / f"layer_{layer}.{name}.npy", DTYPES[name], offsets[-1]) for name in FLAT}
    scales = {"scale": [part.scale[layer] for part in parts]}
    if layer in parts[0].gain:
        np.save(folder / f"layer_{layer}.gain.npy", parts[0].gain[layer])
        scales["after"] = [part.after[layer] for part in parts]
    for name, pieces in scales.items():
        files[name] = ArrayFile(folder / f"layer_{layer}.{name}.npy", np.dtype("<f4"), sum(map(len, pieces)))
    try:
        for name, pieces in scales.items():
            for piece in pieces:
                files[name].write(piece)
        for begin, end in blocks(offsets, MERGED_AT_ONCE):
            for name, piece in _joined(parts, layer, begin, end).items():
                files[name].write(piece)
    finally:
        for file in files.values():
            file.close()


def _joined(parts: Sequence[Index], layer: int, begin: int, end: int) -> dict[str, np.ndarray]:
    """Entries of the features ``begin`` to ``end``: feature by feature, and within one part by part."""
    bounds = [part.offsets[layer][begin : end + 1] for part in parts]
    counts = np.stack([np.diff(bound) for bound in bounds])  # [part, feature]
    ends = np.cumsum(counts.T.ravel()).reshape(end - begin, len(parts)).T
    target = np.concatenate(
        [
            np.repeat(last - bound[1:], count) + np.arange(bound[0], bound[-1])
            for bound, last, count in zip(bounds, ends, counts, strict=True)
        ]
    )
    joined = {}
    for name in FLAT:
        pieces = [part._flat[layer, name][b[0] : b[-1]] for part, b in zip(parts, bounds, strict=True)]
        joined[name] = np.empty(len(target), DTYPES[name])
        joined[name][target] = np.concatenate(pieces)
    return joined


def _write_part(model, finders: Mapping[int, ActiveFinder], rows: Tensor, about: dict, folder: Path) -> None:
    collected = {layer: defaultdict(list) for layer in finders}
    for start in range(0, len(rows), BATCH_ROWS):
        found = active_pairs(model, finders, rows[start : start + BATCH_ROWS], about["rows"][0] + start)
        for layer, arrays in found.items():
            for name, array in arrays.items():
                collected[layer][name].append(array)
    with new_folder(folder) as part:
        np.save(part / "tokens.npy", rows.cpu().numpy().astype("<i4"))
        for layer, finder in finders.items():
            arrays = {name: np.concatenate(pieces) for name, pieces in collected.pop(layer).items()}
            features, n = arrays.pop("features"), finder.transcoder.config.d_features
            # Small integers are sorted by radix, in linear time; stable, so positions stay ascending.
            order = np.argsort(features.astype(np.uint16) if n <= 2**16 else features, kind="stable")
            counts = np.bincount(features, minlength=n)
            np.save(part / f"layer_{layer}.offsets.npy", np.concatenate([[0], counts.cumsum()]).astype("<i8"))
            for name in ("scale", "after"):
                if name in arrays:
                    np.save(part / f"layer_{layer}.{name}.npy", arrays.pop(name))
            if (after := norm_after(model, layer, finder.transcoder.config.hook_out)) is not None:
                np.save(part / f"layer_{layer}.gain.npy", after.gain.float().cpu().numpy())
            for name, array in arrays.items():
                np.save(part / f"layer_{layer}.{name}.npy", array[order].astype(DTYPES[name]))
        finish(part, about)


@torch.no_grad()
def active_pairs(
    model: TransformerBridge, finders: Mapping[int, ActiveFinder], rows: Int[Tensor, "row pos"], first_row: int
) -> dict[int, dict[str, np.ndarray]]:
    """By layer: ``features``, ``positions`` and ``values`` of a batch's active pairs, the ``scale`` of the norm before
    the MLP, and, if the transcoder writes through a norm, that norm's scale as ``after``."""
    rows = rows.to(model.cfg.device)
    norms = {("scale", layer): Block.of(model, layer).before_mlp for layer in finders}
    norms |= {("after", at): norm_after(model, at, f.transcoder.config.hook_out) for at, f in finders.items()}
    scales = {place: f"{norm.hook}.hook_scale" for place, norm in norms.items() if norm is not None}
    reads = {layer: finder.transcoder.config.hook_in for layer, finder in finders.items()}
    cache = _run(model, rows, {*reads.values(), *scales.values()}, max(finders) + 1)
    keep = words(model, rows).flatten()
    places = keep.nonzero().squeeze(1).cpu().numpy() + first_row * rows.shape[1]
    found = {}
    for layer, finder in finders.items():
        pairs = finder(cache[reads[layer]].flatten(0, 1)[keep])
        found[layer] = {
            "features": pairs.features,
            "positions": places[pairs.tokens].astype(np.int32),
            "values": pairs.values,
            "scale": np.ones(rows.numel(), np.float32),
        }
        for (name, at), hook in scales.items():
            if at == layer:
                found[layer][name] = cache[hook].flatten().float().cpu().numpy()
    return found


class _Enough(Exception):
    pass


def _run(model: TransformerBridge, rows: Tensor, names: set[str], stop: int) -> dict[str, Tensor]:
    """Run the model until the last of these activations is cached: what the last MLP writes is not needed."""
    cache = {}

    def keep(name: str):  # hook.name may be another name of the same place
        def kept(x, hook):
            cache[name] = x
            if len(cache) == len(names):
                raise _Enough

        return kept

    try:
        with edited(model, [(name, keep(name)) for name in names]):
            model(rows, stop_at_layer=stop)
    except _Enough:
        pass
    return cache


def check_input(replacement: ReplacementModel, tokens: Int[Tensor, "row pos"]) -> Int[Tensor, "row pos"]:
    """The text as int64.

    Raises:
        ValueError: no text, more than positions can count, or no transcoder.
    """
    if not joined(replacement).transcoders:
        raise ValueError("there is no transcoder to index: give at least one layer")
    tokens = check(replacement, tokens)
    if tokens.numel() >= 2**31:
        raise ValueError(f"{tokens.numel()} tokens are more than positions of 32 bits can count: index pieces of it")
    return tokens


def _shard_rows(n_rows: int, shard: tuple[int, int]) -> tuple[int, int]:
    """Rows of a shard: whole batches, so that every batch is the same as in a single run."""
    i, n = shard
    batches = -(-n_rows // BATCH_ROWS)
    if not 0 <= i < n:
        raise ValueError(f"shard {shard}: the first number counts from 0 and is below the second")
    if n > batches:
        raise ValueError(f"{n} shards of {n_rows} rows: at most {batches} are possible, one per {BATCH_ROWS} rows")
    start, stop = (BATCH_ROWS * (batches * k // n) for k in (i, i + 1))
    return start, min(stop, n_rows)


def _about(replacement: ReplacementModel, tokens: Tensor, start: int, stop: int) -> dict:
    model, transcoders = replacement.model, replacement.transcoders
    layers = {
        str(layer): {"weights": fingerprint(t), "features": t.config.d_features}
        for layer, t in sorted(transcoders.items())
    }
    about = {
        "format": FORMAT,
        "model": fingerprint(model),
        "text": text_hash(tokens),
        "rows": [start, stop],
        "width": tokens.shape[1],
        "bos": bos_id(model),
        "batch_rows": BATCH_ROWS,
        "layers": layers,
    }
    blocks = {layer: Block.of(model, layer) for layer in transcoders}
    if not all(block.before_mlp is not None and block.before_mlp.centres for block in blocks.values()):
        about["centres"] = False  # nothing centres what is read, so `tclib.features.connect` must not either
    after = {layer: norm_after(model, layer, t.config.hook_out) for layer, t in transcoders.items()}
    if any(after.values()):  # by layer, whether the norm that its transcoder writes through centres
        about["norm_after"] = {str(layer): norm.centres for layer, norm in sorted(after.items()) if norm is not None}
    return json.loads(json.dumps(about))


def _refuse_another(old: dict, new: dict, folder: Path) -> None:
    for key in new:
        if old.get(key) != new[key]:
            raise ValueError(
                f"{folder} was made from {key} {old.get(key)}, not {new[key]}: use another folder, or remove it"
            )
