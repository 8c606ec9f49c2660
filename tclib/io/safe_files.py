"""Opening files that may be hostile: nothing in them runs, and sizes are checked before memory is taken.

Every function raises `BadFile`, whose one sentence names the file and what is wrong with it.
"""

from __future__ import annotations

import json
import math
import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from tclib.io.paths import decoded

LONGEST_TEXT = 1_000_000  # bytes of a configuration, or of the pickled part of a .pt file: real ones have thousands
MOST_INFLATED = 20  # times its compressed size: weights are noise and shrink by a third at most
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
CONFIG_CLASS = "sae_training.config.LanguageModelSAERunnerConfig"
_PICKLE_NAMES = {  # all that a checkpoint of tensors and one configuration needs
    "collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch.device", "torch.Size", CONFIG_CLASS,
    "torch.FloatStorage", "torch.DoubleStorage", "torch.HalfStorage", "torch.BFloat16Storage",
    "torch.float32", "torch.float64", "torch.float16", "torch.bfloat16",
}  # fmt: skip
_PICKLE_EVALUATES = {"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX"}

Shape = tuple[int, ...]


class BadFile(ValueError):
    """A file that is not read, and why."""


class ConfigStub:
    """Stands in for the one class that the original checkpoints pickle: attributes, no code."""


def read_text(path: Path) -> str:
    """A small text file."""
    try:
        with path.open("rb") as file:
            raw = file.read(LONGEST_TEXT + 1)
    except FileNotFoundError:
        raise BadFile(f"{path.name} is missing in {path.parent}") from None
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}") from error
    if len(raw) > LONGEST_TEXT:
        raise BadFile(f"{path} is longer than {LONGEST_TEXT} bytes: that is no configuration")
    try:
        return decoded(raw, path)
    except ValueError as error:
        raise BadFile(str(error)) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path} is damaged: {error}") from error
    return _an_object(content, path)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping, without tags (they construct objects) and aliases (they may explode)."""
    text = read_text(path)
    try:
        special = any(isinstance(token, yaml.AliasToken | yaml.TagToken) for token in yaml.scan(text, yaml.SafeLoader))
        content = None if special else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadFile(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error
    if special:
        raise BadFile(f"{path} uses YAML tags or aliases, which a plain configuration does not need")
    return _an_object(content, path)


def _an_object(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise BadFile(f"{path} is damaged: it should hold names and values")
    return content


def safetensors_shapes(path: Path) -> dict[str, Shape]:
    """Names and shapes from the header alone; the library checks that they fill the file exactly."""
    with _safetensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        for name, part in slices.items():
            rounded = part.get_dtype() == "I8" and f"{name}.scale" in slices
            if part.get_dtype() not in FLOATS and not rounded:
                raise BadFile(f"{path}: {name} is stored as {part.get_dtype()}; weights are floating-point numbers")
        return {name: tuple(part.get_shape()) for name, part in slices.items()}


def read_safetensors(path: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors ``{our name: name in the file}``, mapped from the file and not copied."""
    with _safetensors(path) as file:
        return {ours: file.get_tensor(theirs) for ours, theirs in names.items()}


def _safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise BadFile(f"{path.name} is missing in {path.parent}") from None
    except Exception as error:  # SafetensorError, and whatever else a crafted header brings about
        raise BadFile(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def npz_shapes(path: Path) -> dict[str, Shape]:
    """Names and shapes of an .npz file, from its headers alone."""
    shapes = {}
    with _zip(path) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            try:
                with archive.open(entry) as member:
                    version = np.lib.format.read_magic(member)
                    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                    shape, _, dtype = header[version](member)
                    rest = entry.file_size - member.tell()
            except Exception as error:  # whatever numpy and zipfile stumble over in a crafted header
                raise BadFile(f"{path}: {name} is damaged: {' '.join(str(error).split())[:120]}") from error
            if dtype.kind != "f":
                kind = "pickled objects, which are never read" if dtype.hasobject else f"{dtype}"
                raise BadFile(f"{path}: {name} holds {kind}; weights are floating-point numbers")
            if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != rest:
                raise BadFile(f"{path}: {name} says it is {shape} of {dtype}, but has {rest} bytes")
            shapes[name] = shape
    return shapes


def read_npz(path: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Arrays ``{our name: name in the file}``; `npz_shapes` must have accepted the file."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {ours: torch.from_numpy(arrays[theirs]) for ours, theirs in names.items()}
    except Exception as error:  # its contents may still be damaged
        raise BadFile(f"{path} is damaged: {error}") from error


def read_pickle(path: Path) -> Any:
    """A .pt file of tensors and at most one `ConfigStub`, its tensors mapped from the file and not copied.

    What the pickle names is compared with a short list before it is read; then torch reads it with ``weights_only``.
    """
    check_pickle(path)
    try:
        with torch.serialization.safe_globals([(ConfigStub, CONFIG_CLASS)]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever torch stumbles over in a crafted file
        raise BadFile(f"{path} is damaged: {str(error).splitlines()[0][:200]}") from error


def check_pickle(path: Path, wanted: str | None = None) -> int | None:
    """Refuse a .pt file that is packed, a program, or names anything but weights need, without reading its pickle.

    Returns:
        The whole number that follows the text ``wanted`` in the pickle, as a configuration's value follows its name.
    """
    names, value = _look_into_pickle(path, wanted)
    unknown = sorted(names - _PICKLE_NAMES)
    if unknown:
        raise BadFile(f"{path} asks to run {', '.join(unknown)}: weights never need that, so it is not read")
    return value


def pickle_says(path: Path, wanted: str) -> bool | None:
    """Whether a whole number follows the text ``wanted`` in the pickle of a .pt file, whatever else it names, since
    nothing of it is read; None if the file is damaged."""
    try:
        return _look_into_pickle(path, wanted)[1] is not None
    except BadFile:
        return None


def _look_into_pickle(path: Path, wanted: str | None) -> tuple[set[str], int | None]:
    with _zip(path) as archive:
        entries = archive.infolist()
        packed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise BadFile(f"{path} is not as torch.save writes it: its parts are compressed or overlap")
        pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > LONGEST_TEXT:
            raise BadFile(f"{path} is not a checkpoint: it should hold one small data.pkl")
        if any("constants.pkl" in entry.filename for entry in entries):
            raise BadFile(f"{path} is a TorchScript program, which is never run")
        try:
            return _pickled_names(archive.read(pickles[0]), wanted)
        except Exception as error:  # whatever the libraries stumble over in a crafted file
            raise BadFile(f"{path} is damaged: {error}") from error


def _pickled_names(data: bytes, wanted: str | None) -> tuple[set[str], int | None]:
    # torch's own scan tells names alone, and takes more of them than weights need.
    found, value, before = set(), None, None
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name == "GLOBAL":
            found.add(str(argument).replace(" ", "."))
        elif name in _PICKLE_EVALUATES:
            found.add(f"an object by {name}")
        elif "PUT" not in name:  # remembers what came before for later use
            value = argument if before == wanted is not None and isinstance(argument, int) else value
            before = argument
    return found, value


def _zip(path: Path) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise BadFile(f"{path.name} is missing in {path.parent}") from None
    except Exception as error:  # as above
        hint = "; if it is an old .pt file, save it anew with torch.save" if path.suffix == ".pt" else ""
        raise BadFile(f"{path} is damaged or not a zip archive{hint}: {error}") from error
    inflated = sum(entry.file_size for entry in archive.infolist())
    if inflated > MOST_INFLATED * path.stat().st_size:
        archive.close()
        raise BadFile(f"{path} unpacks to {inflated} bytes from {path.stat().st_size}: weights do not shrink like that")
    return archive


def check_shapes(path: Path, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Refuse tensors that are missing, unknown or of another shape, naming them."""
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        parts = ", ".join(f"{name} is {found.get(name)}, not {expected.get(name)}" for name in wrong)
        raise BadFile(f"the transcoder at {path} does not fit its configuration: {parts}")


def tensor(path: Path, content: Any, name: str) -> Tensor:
    """``content[name]`` if it is a plain tensor of floating-point numbers that fills its storage."""
    value = content.get(name) if isinstance(content, dict) else None
    if not isinstance(value, Tensor):
        raise BadFile(f"{path} has no tensor {name}")
    if not value.is_floating_point() or not value.is_contiguous() or value.layout != torch.strided:
        raise BadFile(f"{path}: {name} is not a plain tensor of floating-point numbers")
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise BadFile(f"{path}: {name} is larger than what the file holds of it")
    return value


def plain_name(name: Any, where: Path) -> str:
    """A file name from a configuration, if it stays in its folder."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w\-][\w\-. ]*", name):
        raise BadFile(f"{where} names the file {name!r}: only plain names of files beside it are followed")
    return name


def parsed(path: Path, model: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """A pydantic model of a configuration; what is wrong is named."""
    from pydantic import ValidationError

    try:
        return model(**values)
    except (ValidationError, TypeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(str(part) for part in first["loc"])
        raise BadFile(f"{path} is damaged: {where} {first['msg']}".replace("  ", " ")) from error
