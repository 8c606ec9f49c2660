"""Transcoders that stay in their files until they are used."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tclib.activations import hook_out, mlp_out
from tclib.io.safe_files import BadFile
from tclib.transcoder import Transcoder, TranscoderConfig, expected_shapes

LayerNorm = tuple[Tensor, Tensor]  # gain and bias


@dataclass(frozen=True)
class Stored:
    """One layer's checkpoint, looked at but not read.

    ``open()`` gives its configuration and the tensors of `Transcoder`, checked against each other, as views of the file
    where its layout allows, and ``b_in`` where the file's transcoder subtracts a bias from its input. With
    ``after_norm`` its input is LayerNorm's full output, gain and bias included.
    """

    layer: int
    path: Path
    numbers: int  # how many weights
    open: Callable[[], tuple[TranscoderConfig, dict[str, Tensor]]]
    after_norm: bool = False
    n_writes: int = 1  # MLPs that its features write to
    beside: Path | None = None  # a second file with weights

    def copied_bytes(self, device: torch.device, dtype: torch.dtype) -> int:
        """Memory that `transcoder` will take beyond the file's own pages, the biases aside."""
        stored = sum(path.stat().st_size for path in (self.path, self.beside) if path is not None)
        wanted = self.numbers * dtype.itemsize
        folded = self.after_norm or self.path.suffix == ".npz"
        as_stored = device.type == "cpu" and abs(stored - wanted) < 0.02 * stored
        return wanted if folded or not as_stored else 0

    @torch.no_grad()
    def transcoder(self, device: torch.device, dtype: torch.dtype, norm: LayerNorm | None = None) -> Transcoder:
        """The transcoder, reading what `tclib.activations.hook_in` names: the input without gain and bias.

        Nothing is copied that has the device, dtype and layout already. Input biases are folded into b_enc:
        (x - b_in) W_enc = x W_enc - b_in W_enc; and LayerNorm's x = g * n + b into W_enc, W_skip and the biases.
        """
        config, tensors = self.open()
        b_in = tensors.pop("b_in", None)
        W_enc, W_skip = tensors["W_enc"], tensors.get("W_skip")
        if b_in is not None:
            tensors["b_enc"] = tensors["b_enc"] - (b_in @ W_enc).to(tensors["b_enc"])
        if self.after_norm and norm is not None:
            gain, bias = (part.to(W_enc) for part in norm)
            tensors["b_enc"] = tensors["b_enc"] + bias @ W_enc
            tensors["W_enc"] = gain[:, None] * W_enc
            if W_skip is not None:
                tensors["b_dec"] = tensors["b_dec"] + bias @ W_skip
                tensors["W_skip"] = gain[:, None] * W_skip
        return Transcoder.of(config, tensors, device, dtype)


def numbers(config: TranscoderConfig) -> int:
    """How many weights a transcoder of this configuration has."""
    return sum(math.prod(shape) for shape in expected_shapes(config).values())


class Layers(Mapping[int, Transcoder]):
    """``{layer: Transcoder}``; each transcoder is made when it is first asked for, and kept.

    Until then a layer takes no memory; afterwards, on a CPU in the file's own dtype, only what is folded. In the layers
    ``to_stream`` no norm follows the MLP: what it gives is what is written to the stream.
    """

    def __init__(
        self,
        stored: Mapping[int, Stored],
        device: torch.device,
        dtype: torch.dtype,
        norms: Mapping[int, LayerNorm],
        to_stream: Collection[int] = (),
    ) -> None:
        self.stored = {layer: stored[layer] for layer in sorted(stored)}
        self.device, self.dtype, self._norms, self._to_stream = device, dtype, norms, to_stream
        self._made: dict[int, Transcoder] = {}

    def __getitem__(self, layer: int) -> Transcoder:
        if layer not in self._made:
            made = self.stored[layer].transcoder(self.device, self.dtype, self._norms.get(layer))
            if made.config.hook_out == mlp_out(layer) and layer in self._to_stream:
                made.config = made.config.model_copy(update={"hook_out": hook_out(layer)})
            self._made[layer] = made
        return self._made[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def __repr__(self) -> str:
        files = [stored.path for stored in self.stored.values()]
        return f"transcoders of layers {', '.join(map(str, self))} in {files[0].parent}"


def one_per_layer(found: list[Stored]) -> dict[int, Stored]:
    """Index checkpoints by layer; refuse two of one layer, and a cross-layer transcoder of which layers are missing."""
    layers: dict[int, Stored] = {}
    for stored in found:
        if stored.layer in layers:
            raise BadFile(
                f"layer {stored.layer} is there twice, {layers[stored.layer].path} and {stored.path}: "
                "give the folder or the file of one"
            )
        layers[stored.layer] = stored
    written = {later: at for at, stored in layers.items() for later in range(at, at + stored.n_writes)}
    if missing := {later: at for later, at in written.items() if later not in layers}:
        layer, at = min(missing.items())
        raise BadFile(
            f"the features of layer {at} in {layers[at].path.parent} write to layer {layer}, whose files are missing: "
            "a cross-layer transcoder is read with all its layers"
        )
    return layers
