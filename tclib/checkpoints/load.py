"""`load_transcoders`: from the bundle, a folder, a file or the hub, whoever wrote them."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

from tclib.blocks import Block
from tclib.checkpoints import readers
from tclib.checkpoints.detect import FORMATS, Format, detect, needed
from tclib.checkpoints.fit import check_fit
from tclib.checkpoints.lazy import Layers, one_per_layer
from tclib.io import hub, safe_files
from tclib.io.memory import check_memory
from tclib.io.paths import data_path
from tclib.model import layer_norms, model_folder, model_shapes, pick_device

WORK_TOKENS = 8192
BUNDLED = {"bundled": "transcoders", "smollm2": "smollm2/plain", "smollm2-skip": "smollm2/skip"}  # folders of data/
PYTHON = 450_000_000  # bytes
DEEPEST = 4  # folders below the one given: Gemma Scope's layer_3/width_16k/average_l0_40/params.npz


def load_transcoders(
    where: str | Path = "bundled",
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    model: TransformerBridge | None = None,
) -> Layers:
    """Transcoders by layer. What a file could do is checked now; it is read, and its sizes are, at a layer's first use.

    Args:
        where: ``"bundled"``; ``"smollm2"``, of layers 20 to 27, and ``"smollm2-skip"``, of two of them with a skip
            path; ``"gpt2"``, the paper's published ones; a folder or a file; or a hub id,
            ``"pchlenski/gpt2-transcoders"``, with a folder in it behind another slash and ``@`` with a branch, tag or
            commit at the end.
        device: the best one present by default, as for `tclib.load_model`.
        dtype: of the weights. On a CPU, in the dtype that the file has, they are not copied into memory. To be used
            with a model they must have its dtype (float32); others are for looking at weights and saving them.
        model: the model they belong to. With it, `check_fit` warns about layers that do not fit. sparsify's files
            need it, as do others that name ``mlp.hook_in``: they read after the norm's gain and bias, which are then
            folded into the encoder.

    Raises:
        ValueError: no transcoders, no floating-point dtype, files of two formats, a damaged or dangerous file, not in
            the cache while off-line, or too little memory.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"weights cannot be {dtype}: choose torch.float32, bfloat16, float16 or float64")
    kind, files = _find(where)
    stored = one_per_layer([kind.open(path) for path in files])
    place = device if isinstance(device, torch.device) else pick_device(device)
    norms = {}
    if any(layer.after_norm for layer in stored.values()):
        if model is None:
            raise ValueError(
                f"{where} reads after LayerNorm's gain and bias: load_transcoders(where, model=...) folds them in"
            )
        norms = layer_norms(model, list(stored))
    if copied := sum(layer.copied_bytes(place, dtype) for layer in stored.values()):
        check_memory({"transcoders": copied}, place)
    known = [layer for layer in stored if model is not None and layer < model.cfg.n_layers]
    to_stream = [layer for layer in known if model is not None and Block.of(model, layer).after_mlp is None]
    layers = Layers(stored, place, dtype, norms, to_stream)
    if model is not None:
        check_fit(model, layers)
    return layers


def memory_plan(
    model: str, transcoders: str | Path = "bundled", device: str | None = None, work: int = WORK_TOKENS
) -> pd.DataFrame:
    """What a model and its transcoders need, in GB by part, from the headers of their files; downloads them if need be.

    ``while it loads`` is a second copy of the weights; ``work`` an estimate of the largest tables, over so many tokens:
    once over the vocabulary and 13 times over a layer's features, fitted to notebook 04 at full scale. ``Python`` is
    what a kernel takes with its libraries alone.
    Transcoders that stay in their files take no memory of their own.

    Raises:
        ValueError: as for `tclib.load_model` and `load_transcoders`, or they need more than is available.
    """
    weights = model_shapes(model_folder(model))
    vocabulary = max(shape[0] for shape in weights.values() if len(shape) == 2)
    kind, files = _find(transcoders)
    stored = one_per_layer([kind.open(path) for path in files])
    place = pick_device(device)
    size = 4 * sum(math.prod(shape) for shape in weights.values())
    widest = max(layer.open()[0].d_features for layer in stored.values())
    needs = {
        "Python": PYTHON,
        "model": size,
        "while it loads": size,
        "transcoders": sum(layer.copied_bytes(place, torch.float32) for layer in stored.values()),
        "work": 4 * work * (13 * widest + vocabulary),
    }
    return check_memory(needs, place)


def _find(where: str | Path) -> tuple[Format, list[Path]]:
    path = data_path(BUNDLED[str(where)]) if where in BUNDLED else Path(where)
    if path.is_dir():
        depth = len(path.parts)
        inside = [p for p in path.rglob("*") if len(p.parts) - depth <= DEEPEST and p.is_file()]
        names = [p.relative_to(path).as_posix() for p in inside]
        kind, names = detect(names, str(path), lambda name: safe_files.pickle_says(path / name, readers.PAPERS_LAYER))
        return kind, [path / name for name in names]
    if path.is_file():
        beside = [other for kind in FORMATS if (other := kind.needs) and path.with_name(other).is_file()]
        return detect([path.name, *beside], str(path))[0], [path]
    source = hub.parse(hub.TRANSCODERS.get(str(where), str(where)))
    if source is None:
        raise ValueError(f"there is no folder, file or hub repository {str(where)!r} with transcoders")
    found: list[tuple[Format, list[str]]] = []

    def choose(names: list[str]) -> list[str]:
        inside = [name for name in names if name.startswith(f"{source.folder}/" * bool(source.folder))]
        found[:] = [detect(inside, str(where))]
        return needed(*found[0], inside)

    folder, _ = hub.fetch(source, choose)
    kind, names = found[0]
    return kind, [folder / name for name in names]
