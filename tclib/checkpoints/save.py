"""Transcoders for other tools. What a format cannot express is refused, not approximated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from tclib import __version__
from tclib.checkpoints.readers import SAELENS_KINDS
from tclib.io.paths import flush, write_whole
from tclib.transcoder import Transcoder, is_cross_layer

SAELENS_VERSION = "6.54.12"  # whose format is written; SAELens reads older ones differently
CONTEXT_SIZE = 128  # of the paper's training; SAELens wants one in the metadata


def save_transcoders(
    transcoders: Mapping[int, Transcoder],
    folder: str | Path,
    format: Literal["tclib", "saelens", "circuit-tracer"] = "tclib",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a set of transcoders that `load_transcoders` and the other tool read back, exactly in float32.

    ``tclib``: ``layer_3.safetensors`` + ``layer_3.json``. ``saelens``: one folder per layer, ``layer_3``.
    ``circuit-tracer``: one set, ``config.yaml`` + ``layer_3.safetensors``, or of a cross-layer transcoder
    ``W_enc_3.safetensors`` and ``W_dec_3.safetensors``.

    Raises:
        ValueError: no transcoders, an unknown format, a folder that holds something, or what the format cannot express:
            TopK or cross-layer ones in SAELens; TopK (its loader would make ReLU of it), missing layers, different
            sizes or kinds, other hooks, or cross-layer ones with a skip path in circuit-tracer.
    """
    writers = {"tclib": _tclib, "saelens": _saelens, "circuit-tracer": _circuit_tracer}
    if format not in writers:
        raise ValueError(f"format {format!r} is not written: choose one of {', '.join(writers)}")
    if not transcoders:
        raise ValueError("there are no transcoders to save")
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: two formats in one folder cannot be told apart; give a new one")
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        writers[format](transcoders, folder, dtype)
    return folder


def _tclib(transcoders: Mapping[int, Transcoder], folder: Path, dtype: torch.dtype) -> None:
    for layer, transcoder in transcoders.items():
        transcoder.save(folder / f"layer_{layer}", dtype)


def _saelens(transcoders: Mapping[int, Transcoder], folder: Path, dtype: torch.dtype) -> None:
    if is_cross_layer(transcoders):
        raise ValueError("SAELens has no cross-layer transcoders, so they cannot be written for it")
    kinds = {(k["activation"], k.get("skip", False)): name for name, k in SAELENS_KINDS.items()}
    for layer, transcoder in transcoders.items():
        if transcoder.config.activation == "topk":
            raise ValueError(f"layer {layer} is a TopK transcoder: SAELens has none, so it cannot be written for it")
    for layer, transcoder in transcoders.items():
        c = transcoder.config
        cfg = {
            "architecture": kinds["jumprelu" if c.activation in ("batchtopk", "jumprelu") else c.activation, c.skip],
            "d_in": c.d_in, "d_sae": c.d_features, "d_out": c.d_out, "dtype": str(dtype).removeprefix("torch."),
            "device": "cpu", "apply_b_dec_to_input": False, "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {
                "sae_lens_version": SAELENS_VERSION, "written_by": f"tclib {__version__}", "model_name": c.model_name,
                "hook_name": c.hook_in, "hook_name_out": c.hook_out, "context_size": CONTEXT_SIZE, "prepend_bos": True,
            },
        }  # fmt: skip
        place = folder / f"layer_{layer}"
        place.mkdir()
        write_whole(place / "cfg.json", (json.dumps(cfg, indent=2) + "\n").encode())  # weights never stand alone
        _write(place / "sae_weights.safetensors", _tensors(transcoder, dtype, "W_skip"))


def _circuit_tracer(transcoders: Mapping[int, Transcoder], folder: Path, dtype: torch.dtype) -> None:
    configs = [transcoders[layer].config for layer in sorted(transcoders)]
    if sorted(transcoders) != list(range(len(transcoders))):
        raise ValueError(
            f"circuit-tracer needs a transcoder for every layer from 0, and these are of layers {sorted(transcoders)}"
        )
    hooks = {(c.hook_in.split(".", 2)[-1], c.hook_out.split(".", 2)[-1]) for c in configs}
    for name, values in {
        "widths": {(c.d_in, c.d_out, c.d_features) for c in configs}, "hooks": hooks,
        "skip connections": {c.skip for c in configs},
    }.items():  # fmt: skip
        if len(values) > 1:
            raise ValueError(f"circuit-tracer wants equal {name} in all layers, and these have {sorted(values)}")
    if any(c.activation == "topk" for c in configs):
        raise ValueError(
            "these are TopK transcoders: circuit-tracer would read them as ReLU, so they are not written for it"
        )
    cross = is_cross_layer(transcoders)
    if cross and (configs[0].skip or any(c.n_writes != len(configs) - at for at, c in enumerate(configs))):
        raise ValueError("circuit-tracer's cross-layer transcoders write to every later layer and have no skip path")
    ((feature_in, feature_out),) = hooks
    if configs[0].d_in != configs[0].d_out:
        raise ValueError("circuit-tracer knows only transcoders that write as wide as they read")
    cfg = {
        "model_name": configs[0].model_name, "model_kind": "cross_layer_transcoder" if cross else "transcoder_set",
        "feature_input_hook": feature_in,
        "feature_output_hook": feature_out, "scan": configs[0].model_name,
    }  # fmt: skip
    write_whole(folder / "config.yaml", yaml.safe_dump(cfg, sort_keys=False).encode())
    for layer, transcoder in transcoders.items():
        tensors = _tensors(transcoder, dtype, "W_enc", "W_skip")
        if "threshold" in tensors:  # below 0, a threshold cuts nothing here, and would let negative numbers pass there
            name = "threshold" if cross else "activation_function.threshold"
            tensors[name] = tensors.pop("threshold").clamp(min=0)
        if cross:
            _write(folder / f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": tensors.pop("W_dec")})
            _write(folder / f"W_enc_{layer}.safetensors", {f"{name}_{layer}": t for name, t in tensors.items()})
            continue
        _write(folder / f"layer_{layer}.safetensors", tensors)


def _tensors(transcoder: Transcoder, dtype: torch.dtype, *turned: str) -> dict[str, Tensor]:
    """Our tensors, some as their transpose."""
    tensors = transcoder.state_dict()
    return {name: (t.T if name in turned else t).to("cpu", dtype) for name, t in tensors.items()}


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    part = path.with_name(path.name + ".part")
    save_file({name: t.contiguous() for name, t in tensors.items()}, part)
    flush(part)
    part.replace(path)
