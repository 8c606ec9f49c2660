"""What a GGUF file says that it holds, compared with its size before anything is read or allocated.

The format is described at github.com/ggml-org/ggml/blob/master/docs/gguf.md. Reading the weights is left to
transformers and gguf, which trust what is written here.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tclib.io.safe_files import LONGEST_TEXT, BadFile, Shape

MOST_TENSORS, MOST_KEYS = 100_000, 10_000
MOST_ELEMENTS = 2_000_000  # of all lists together: the largest vocabularies with their merges have 1.5 million
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FEWEST = 24  # bytes: magic, version and two counts


@dataclass(frozen=True)
class GGUFHeader:
    """Shapes as torch has them, the kind of number that each tensor is stored as, and all settings but lists."""

    shapes: dict[str, Shape]
    kinds: dict[str, str]
    settings: dict[str, Any]

    @property
    def weights(self) -> int:
        """How many weights there are."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def shares(self) -> dict[str, float]:
        """The share of the weights that each kind of number stores, largest first."""
        counts: Counter[str] = Counter()
        for name, shape in self.shapes.items():
            counts[self.kinds[name]] += math.prod(shape)
        return {kind: count / self.weights for kind, count in counts.most_common()}


def read_header(path: Path) -> GGUFHeader:
    """The header of a GGUF file.

    Raises:
        BadFile: it is none, is truncated, or says that it holds more than it can.
        ValueError: the package gguf is not installed.
    """
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise ValueError(
            f"reading {path} needs the package gguf: install it with `python -m pip install gguf`"
        ) from None
    sizes = {kind.value: (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
    try:
        if path.stat().st_size < _FEWEST:
            raise BadFile(f"{path} is not a GGUF file: it has fewer than {_FEWEST} bytes")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Walk(path, content).header(sizes)
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}") from error


class _Walk:
    """One pass over a header; every step is compared with what is left of the file."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.at, self.elements = path, content, 0, 0

    def header(self, sizes: dict[int, tuple[str, int, int]]) -> GGUFHeader:
        if self.take(4) != b"GGUF":
            raise BadFile(f"{self.path} is not a GGUF file")
        version, tensors, keys = self.unpack("IQQ")
        if version not in (2, 3):
            raise BadFile(f"{self.path} is a GGUF file of version {version}: only versions 2 and 3 are read")
        if tensors > MOST_TENSORS or keys > MOST_KEYS:
            raise BadFile(f"{self.path} is damaged: it says that it has {tensors} tensors and {keys} settings")
        settings = {}
        for _ in range(keys):
            key = self.string()
            if key in settings:
                raise BadFile(f"{self.path} is damaged: it has two settings {key!r}")
            settings[key] = self.value(*self.unpack("I"))
        shapes, kinds, ends = self.tensors(tensors, sizes)
        align = settings.get("general.alignment", 32)
        if not isinstance(align, int) or not 1 <= align <= 1 << 20 or align & (align - 1):
            raise BadFile(f"{self.path} is damaged: its alignment is {align}, not a power of two")
        start, there = -(-self.at // align) * align, len(self.content)
        furthest = max(ends, key=lambda name: ends[name][1], default=None)
        if furthest is None:
            raise BadFile(f"{self.path} holds no tensors: a vocabulary alone is no model")
        if start + ends[furthest][1] > there:
            raise BadFile(
                f"{self.path} is truncated: {furthest} ends at byte {start + ends[furthest][1]} and the file at {there}"
            )
        if start + sum(end - begin for begin, end in ends.values()) > there:
            raise BadFile(f"{self.path} is damaged: its tensors overlap")
        plain = {key: value for key, value in settings.items() if value is not None}
        return GGUFHeader(shapes, kinds, plain)

    def tensors(self, count: int, sizes: dict[int, tuple[str, int, int]]):
        shapes, kinds, ends = {}, {}, {}
        for _ in range(count):
            name, (rank,) = self.string(), self.unpack("I")
            if name in shapes or not 1 <= rank <= 4:
                raise BadFile(f"{self.path} is damaged: {name!r} is there twice or has {rank} dimensions")
            sides, (kind, offset) = self.unpack(f"{rank}Q"), self.unpack("IQ")
            if kind not in sizes or sizes[kind][0].startswith("I") and sizes[kind][0][1:].isdigit():
                raise BadFile(f"{self.path}: {name!r} is stored in a way (number {kind}) that is not read")
            kinds[name], block, width = sizes[kind]
            if min(sides) < 1 or sides[0] % block:
                raise BadFile(f"{self.path} is damaged: {name!r} is {sides} of {kinds[name]}, in blocks of {block}")
            shapes[name] = tuple(reversed(sides))
            ends[name] = offset, offset + math.prod(sides) // block * width
        return shapes, kinds, ends

    def value(self, kind: int) -> Any:
        """The next setting; None for a list, whose elements nobody here needs."""
        if kind in _NUMBERS:
            return self.unpack(_NUMBERS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise BadFile(f"{self.path} is damaged: it has a setting of the unknown kind {kind}")
        inner, count = self.unpack("IQ")
        self.elements += count
        if self.elements > MOST_ELEMENTS:
            raise BadFile(f"{self.path} says that its lists have {self.elements} elements: no vocabulary has so many")
        if inner in _NUMBERS:
            self.take(count * struct.calcsize(_NUMBERS[inner]))
        elif inner == _STRING:
            for _ in range(count):
                self.string()
        else:
            raise BadFile(f"{self.path} has a list of the kind {inner}, which is not read")
        return None

    def string(self) -> str:
        (length,) = self.unpack("Q")
        if length > LONGEST_TEXT:
            raise BadFile(f"{self.path} is damaged: it has a text of {length} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise BadFile(f"{self.path} is damaged: one of its texts is not text") from None

    def unpack(self, codes: str) -> tuple:
        return struct.unpack(f"<{codes}", self.take(struct.calcsize(f"<{codes}")))

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.content):
            raise BadFile(f"{self.path} is truncated: its header goes on after its last byte, {len(self.content)}")
        self.at += count
        return self.content[self.at - count : self.at]
