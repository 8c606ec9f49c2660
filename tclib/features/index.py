"""The index on disk: for every feature, where it fired and how strongly, sorted by feature; 6 bytes per activation.

It is a sparse matrix by columns, but mapped from the disk and in float16, which scipy.sparse lacks.

index.json               what it was made from: fingerprints of weights and text, rows, layers
tokens.npy               int32 [row, pos], the text
layer_0.offsets.npy      int64 [feature + 1]; feature f has the entries offsets[f] to offsets[f + 1] of ...
layer_0.positions.npy    int32: row * width + pos, counted from the first row of the whole text, ascending
layer_0.values.npy       float16: activations
layer_0.scale.npy        float32 [row * width]: what the norm before the MLP divided by
layer_0.after.npy        float32 [row * width]: the same of the norm that the transcoder writes through, if there is one
layer_0.gain.npy         float32 [d_model]: the gain of that norm
layer_0.often.npy        commonest tokens of features that fire often (`tclib.features.common_tokens`)

A folder appears whole or not at all. Where BOS stands nothing is kept: it is the same vector in every row and no word.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Int, Int32, Shaped
from torch import nn

from tclib.features.common_tokens import ROW, write_often
from tclib.inputs import whole
from tclib.io.paths import flush, read_text
from tclib.replacement_model import ReplacementModel, joined
from tclib.transcoder import Transcoder

FORMAT = 2
FLAT = ("positions", "values")  # one entry per activation
DTYPES = {"positions": np.dtype("<i4"), "values": np.dtype("<f2")}
_PERIOD = 65_521  # a prime, so that no matrix width divides it


class NeverFired(ValueError):
    """The feature has no activation in this index."""


class _AnotherFormat(Exception):
    pass


class Index:
    """An index opened for reading; its arrays stay on disk until they are read.

    Raises:
        ValueError: the folder holds no complete index, a damaged one, or one of another version.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.about = json.loads(read_text(self.folder / "index.json"))
            if self.about["format"] != FORMAT:
                raise _AnotherFormat
            self.layers = [int(layer) for layer in self.about["layers"]]
            self.tokens = self._load("tokens")
            self.offsets = {layer: np.array(self._load(f"layer_{layer}.offsets")) for layer in self.layers}
            self.scale = {layer: self._load(f"layer_{layer}.scale") for layer in self.layers}
            through = [int(layer) for layer in self.about.get("norm_after", ())]
            self.after, self.gain = (
                {layer: self._load(f"layer_{layer}.{name}") for layer in through} for name in ("after", "gain")
            )
            self._flat = {(layer, name): self._load(f"layer_{layer}.{name}") for layer in self.layers for name in FLAT}
            self._often = {layer: self._load(f"layer_{layer}.often") for layer in self.layers}
            if any(table.dtype != ROW for table in self._often.values()):
                raise ValueError("a table of tokens has other columns")
            for (layer, name), array in self._flat.items():
                if len(array) != self.offsets[layer][-1]:
                    raise ValueError(f"layer_{layer}.{name}.npy has {len(array)} entries")
        except FileNotFoundError as error:
            missing = Path(error.filename).name
            raise ValueError(f"no index in {self.folder}: {missing} is missing; make it with build_index") from None
        except _AnotherFormat:
            raise ValueError(
                f"the index in {self.folder} was made by another version (format {self.about['format']}, not "
                f"{FORMAT}): remove it and build it again"
            ) from None
        except (ValueError, KeyError, EOFError) as error:
            raise ValueError(f"the index in {self.folder} is damaged: {error}") from error

    def _load(self, name: str) -> np.ndarray:
        array = np.load(self.folder / f"{name}.npy", mmap_mode="r" if name.count(".") else None, allow_pickle=False)
        # A plain view: subclasses of arrays are slow to slice.
        return array.view(np.ndarray)

    @property
    def width(self) -> int:
        """Tokens per row, BOS included."""
        return self.about["width"]

    @property
    def first(self) -> int:
        """The position at which this index begins; 0 unless it is a shard."""
        return self.about["rows"][0] * self.width

    @cached_property
    def kept(self) -> Bool[np.ndarray, " row*pos"]:
        """Which tokens are counted: all but BOS."""
        return self.tokens.ravel() != self.about["bos"]

    @cached_property
    def n_tokens(self) -> int:
        """How many tokens are counted."""
        return int(self.kept.sum())

    @cached_property
    def rank(self) -> Int[np.ndarray, " row*pos"]:
        """Rank of each position among the tokens that are counted, from 0; undefined at BOS."""
        return self.kept.cumsum() - 1

    @cached_property
    def flat_tokens(self) -> Int32[np.ndarray, " row*pos"]:
        """All rows, one behind the other."""
        return self.tokens.ravel()

    @cached_property
    def token_counts(self) -> Int[np.ndarray, " vocab"]:
        """How often each token occurs."""
        return np.bincount(self.flat_tokens)

    def n_features(self, layer: int) -> int:
        """How many features the transcoder of a layer has."""
        return len(self.layer_offsets(layer)) - 1

    def feature(self, layer: int, feature: int) -> int:
        """The feature, if this layer has it; raises otherwise."""
        return whole("feature", feature, self.n_features(layer), f"layer {layer}")

    def layer_offsets(self, layer: int) -> Int[np.ndarray, " feature+1"]:
        """Where the entries of each feature begin.

        Raises:
            ValueError: a layer that is not in the index.
        """
        if isinstance(layer, bool) or layer not in self.offsets:
            raise ValueError(f"layer {layer} is not in this index, which has layers {self.layers}")
        return self.offsets[layer]

    def flat(self, layer: int) -> tuple[Int32[np.ndarray, " entry"], Float16[np.ndarray, " entry"]]:
        """Positions (from the first of this index) and activations of all features of a layer, feature by feature."""
        self.layer_offsets(layer)
        return self._from_first(self._flat[layer, "positions"]), self._flat[layer, "values"]

    def entries(self, layer: int, feature: int) -> tuple[Int32[np.ndarray, " entry"], Float16[np.ndarray, " entry"]]:
        """Where a feature fired (in reading order, from the first position of this index), and how strongly.

        Raises:
            ValueError: no such layer or feature.
            NeverFired: the feature has no entry.
        """
        offsets, feature = self.layer_offsets(layer), self.feature(layer, feature)
        start, stop = offsets[feature], offsets[feature + 1]
        if start == stop:
            raise NeverFired(
                f"feature {layer}/{feature} never fired on the {self.n_tokens} tokens of this index: "
                "index more text, or read its weights alone"
            )
        positions, values = (self._flat[layer, name][start:stop] for name in FLAT)
        return self._from_first(positions), values

    def often(self, layer: int, feature: int) -> Shaped[np.ndarray, " token"]:
        """The commonest tokens of a feature that fires often, as `tclib.features.common_tokens.ROW`; of others no row.

        Raises:
            ValueError: no such layer or feature.
        """
        feature, table = self.feature(layer, feature), self._often[layer]
        return table[slice(*np.searchsorted(table["feature"], [feature, feature + 1]))]

    def _from_first(self, positions: np.ndarray) -> np.ndarray:
        return positions - np.int32(self.first) if self.first else positions

    def check(self, replacement: ReplacementModel, layers: Iterable[int] | None = None) -> Index:
        """Refuse to be read beside other weights than it was made from, those of all layers or of some.

        Raises:
            ValueError: other weights (both fingerprints are named), or a layer that is not in the index.
        """
        if (found := fingerprint(joined(replacement).model)) != self.about["model"]:
            raise ValueError(
                f"the index in {self.folder} was made from model {self.about['model']}, not from this one, {found}: "
                "build it again"
            )
        for layer in replacement.transcoders if layers is None else layers:
            self.layer_offsets(layer)
            made = self.about["layers"][str(layer)]["weights"]
            if (found := fingerprint(replacement.transcoders[layer])) != made:
                raise ValueError(
                    f"the index in {self.folder} was made from transcoder {made} of layer {layer}, not from this one, "
                    f"{found}: build it again"
                )
        return self


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """A name for weights: a hash of one weighted sum per tensor, to four digits of the tensor's length.

    Folding LayerNorm into weights rounds a little differently on another processor, which must not change the name;
    a training step does.
    """
    signs = torch.cos(torch.arange(_PERIOD, dtype=torch.float64, device=next(module.parameters()).device))
    digest = hashlib.sha256()
    for name, weight in sorted(module.named_parameters()):
        total, length = 0.0, 0.0
        flat = weight.detach().flatten()
        whole = len(flat) // _PERIOD * _PERIOD
        # Small blocks stay in the processor's cache between the two sums; halves would round with the size of a block.
        for part in (*flat[:whole].view(-1, _PERIOD).split(8), flat[None, whole:]):
            part = part.to(torch.promote_types(part.dtype, torch.float32))
            total += (part.sum(0) * signs[: part.shape[1]]).sum().item()  # in float64, since the signs are
            length += torch.linalg.vector_norm(part, dim=1).double().square().sum().item()
        digest.update(f"{name} {tuple(weight.shape)} {total / max(length, 1e-30) ** 0.5 + 0.0:.4f}\n".encode())
    if isinstance(module, Transcoder):
        digest.update(f"{module.config.activation} {module.config.k} {module.config.hook_in}".encode())
    return digest.hexdigest()[:16]


@contextmanager
def new_folder(folder: Path):
    """A folder to be filled in; it takes its name when the block ends, or is removed if the block fails.

    Raises:
        ValueError: the disk is full or cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield part
        for path in part.iterdir():
            flush(path)
        try:
            os.rename(part, folder)
        except OSError:
            if not (folder / "index.json").exists():
                raise
            shutil.rmtree(part)  # another process made the same one meanwhile
        flush(folder.parent)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise ValueError(f"{folder} could not be written ({error.strerror}): free or change the disk") from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


class ArrayFile:
    """A one-dimensional .npy file whose length is known and whose content comes in pieces."""

    def __init__(self, path: Path, dtype: np.dtype, length: int):
        self.file = open(path, "wb")
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (int(length),)}
        np.lib.format.write_array_header_1_0(self.file, header)
        self.dtype = dtype

    def write(self, piece: Float[np.ndarray, " n"] | Int[np.ndarray, " n"]) -> None:
        """The next piece."""
        self.file.write(np.ascontiguousarray(piece, self.dtype).data)

    def close(self) -> None:
        """No piece is left."""
        self.file.close()


def blocks(offsets: Int[np.ndarray, " feature+1"], most: int = 1_000_000) -> Iterator[tuple[int, int]]:
    """Runs of features that have at most so many entries together (or are one feature), for bounded memory."""
    begin = 0
    while begin < len(offsets) - 1:
        end = max(begin + 1, int(np.searchsorted(offsets, offsets[begin] + most, side="right")) - 1)
        yield begin, end
        begin = end


def finish(folder: Path, about: dict) -> None:
    """The tables that follow from the other files, and last index.json, which makes it an index."""
    for layer in about["layers"]:
        write_often(folder, layer, about["rows"][0] * about["width"])
    (folder / "index.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n", encoding="utf-8")
