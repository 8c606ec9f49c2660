"""Memory-mapped activations on disk: the model runs once, and any number of trainings read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.inputs import check_layers, check_tokens
from tclib.io.paths import read_text, write_whole
from tclib.text import text_hash
from tclib.training.stream import Acts, ModelSource, both, forward_rows


class ActivationCache:
    """What `cache_activations` wrote; `train` takes it in place of tokens.

    Raises:
        ValueError: the folder holds no complete cache.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            about = json.loads(read_text(self.folder / "cache.json"))
        except FileNotFoundError:
            raise ValueError(f"no complete activation cache in {self.folder}: make it with cache_activations") from None
        self.layers, self.text = about["layers"], about["text"]
        self.arrays = {
            layer: tuple(np.load(self.folder / f"{name}_{layer}.npy", mmap_mode="r") for name in "xy")
            for layer in self.layers
        }
        self.n_rows, self.row_length = self.arrays[self.layers[0]][0].shape[:2]

    def read(self, rows: Int[np.ndarray, " row"]) -> Acts:
        order = np.sort(rows)  # one way through the disk
        back = np.searchsorted(order, rows)
        return {
            layer: both(lambda array: torch.from_numpy(array[order][back]).flatten(0, 1), pair)
            for layer, pair in self.arrays.items()
        }


def cache_activations(
    model: TransformerBridge, tokens: Int[Tensor, "row pos"], layers: Sequence[int], folder: str | Path
) -> ActivationCache:
    """Write inputs and outputs of the MLPs of ``layers`` on ``tokens``; a complete cache of the same text is reused.

    Takes ``8 * layers * d_model`` bytes per token in float32.

    Raises:
        ValueError: a layer that the model does not have, or a folder with the cache of another text.
    """
    check_layers(model, layers)
    tokens = check_tokens(model, tokens)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = text_hash(tokens)
    if (folder / "cache.json").exists():
        cache = ActivationCache(folder)
        if (cache.text, cache.layers) != (text, list(layers)):
            raise ValueError(f"{folder} holds the activations of another text or of layers {cache.layers}")
        return cache
    source = ModelSource(model, tokens, layers)
    arrays = {}
    at_once = forward_rows(model)
    for start in range(0, len(tokens), at_once):
        rows = np.arange(start, min(start + at_once, len(tokens)))
        for layer, pair in source.read(rows).items():
            for name, part in zip("xy", pair, strict=True):
                part = part.cpu().numpy().reshape(len(rows), tokens.shape[1], -1)
                if (name, layer) not in arrays:
                    arrays[name, layer] = np.lib.format.open_memmap(
                        folder / f"{name}_{layer}.npy", "w+", part.dtype, (len(tokens), *part.shape[1:])
                    )
                arrays[name, layer][rows] = part
    for array in arrays.values():
        array.flush()
    write_whole(folder / "cache.json", json.dumps({"layers": list(layers), "text": text}).encode())
    return ActivationCache(folder)
