"""One function per format: check a checkpoint of one layer and say how to read it.

What is different in each is said in docs/api.md.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor

from tclib.activations import hook_in, hook_out, mlp_out
from tclib.checkpoints.lazy import Stored, numbers
from tclib.io import safe_files
from tclib.io.safe_files import BadFile
from tclib.transcoder import TranscoderConfig, expected_shapes, read_config, read_weights

PAPERS_LAYER = "hook_point_layer"  # where the paper's checkpoints say their layer


class _Foreign(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


def native(path: Path) -> Stored:
    """What `Transcoder.save` writes: ``layer_3.safetensors`` and ``layer_3.json``."""
    config = read_config(path)
    return Stored(number(path.stem), path, numbers(config), lambda: read_weights(path), n_writes=config.n_writes or 1)


class _OriginalConfig(_Foreign):
    hook_point: str
    hook_point_layer: int
    out_hook_point: str | None = None
    is_transcoder: bool = False
    model_name: str = "unknown"
    d_in: PositiveInt | None = None
    d_out: PositiveInt | None = None
    d_sae: PositiveInt | None = None


def original(path: Path) -> Stored:
    """The paper's own checkpoints, transcoders and plain SAEs.

    As `sae_training/sparse_autoencoder.py` of github.com/jacobdunefsky/transcoder_circuits computes them.
    """
    layer = safe_files.check_pickle(path, PAPERS_LAYER)
    if layer is None:
        raise BadFile(f"{path} is not one of the paper's checkpoints: it has no cfg that says hook_point_layer")
    return Stored(layer, path, path.stat().st_size // 4, lambda: _open_original(path, layer))


def _open_original(path: Path, layer: int) -> tuple[TranscoderConfig, dict[str, Tensor]]:
    content = safe_files.read_pickle(path)
    stub = content.get("cfg") if isinstance(content, dict) else None
    if not isinstance(stub, safe_files.ConfigStub):
        raise BadFile(f"{path} is not one of the paper's checkpoints: it has no cfg")
    cfg = safe_files.parsed(path, _OriginalConfig, stub.__dict__)
    if cfg.hook_point_layer != layer:
        raise BadFile(f"{path} is damaged: it says layer {cfg.hook_point_layer} and layer {layer}")
    state = content.get("state_dict")
    t = {name: safe_files.tensor(path, state, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if t["W_enc"].ndim != 2 or t["W_dec"].ndim != 2:
        raise BadFile(f"{path} has no matrices W_enc and W_dec")
    is_transcoder = "b_dec_out" in dict(state or {})
    d_in, d_features = cfg.d_in or t["W_enc"].shape[0], cfg.d_sae or t["W_enc"].shape[1]
    d_out = (cfg.d_out or t["W_dec"].shape[1]) if is_transcoder else d_in
    config = safe_files.parsed(path, TranscoderConfig, {
        "d_in": d_in, "d_out": d_out, "d_features": d_features, "hook_in": cfg.hook_point,
        "hook_out": cfg.out_hook_point if is_transcoder else cfg.hook_point, "model_name": cfg.model_name,
    })  # fmt: skip
    t["b_in"] = t.pop("b_dec")  # subtracted from the input; a plain SAE adds it again to its output
    t["b_dec"] = safe_files.tensor(path, state, "b_dec_out") if is_transcoder else t["b_in"]
    found = {name: tuple(value.shape) for name, value in t.items()}
    safe_files.check_shapes(path, found, expected_shapes(config) | {"b_in": (d_in,)})
    return config, t


class _SAELensMetadata(_Foreign):
    model_name: str | None = None
    hook_name: str | None = None
    hook_name_out: str | None = None


class _SAELensConfig(_Foreign):
    architecture: str
    d_in: PositiveInt
    d_sae: PositiveInt
    d_out: PositiveInt
    apply_b_dec_to_input: bool = False
    normalize_activations: str = "none"
    reshape_activations: str = "none"
    rescale_acts_by_decoder_norm: bool = False
    metadata: _SAELensMetadata


SAELENS_KINDS = {
    "transcoder": {"activation": "relu"},
    "skip_transcoder": {"activation": "relu", "skip": True},
    "jumprelu_transcoder": {"activation": "jumprelu"},
    "jumprelu_skip_transcoder": {"activation": "jumprelu", "skip": True},
}


def saelens(path: Path) -> Stored:
    """SAELens: ``cfg.json`` and ``sae_weights.safetensors`` in a folder."""
    where = path.with_name("cfg.json")
    values = safe_files.read_json(where)
    if values.get("architecture") not in SAELENS_KINDS:
        kinds = ", ".join(SAELENS_KINDS)
        raise BadFile(f"{where}: the architecture {values.get('architecture')!r} is not read, only {kinds}")
    cfg = safe_files.parsed(where, _SAELensConfig, values)
    for name, plain in {"apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": False,
                        "normalize_activations": "none", "reshape_activations": "none"}.items():  # fmt: skip
        if getattr(cfg, name) != plain:
            raise BadFile(f"{where}: {name} is {getattr(cfg, name)!r}; only {plain!r} is read")
    meta = cfg.metadata
    if not meta.hook_name or not meta.hook_name_out:
        raise BadFile(f"{where} does not say hook_name and hook_name_out in its metadata: what it reads is unknown")
    layer = _layer_of(meta.hook_name, where)
    hook_in, after_norm = reads(layer, meta.hook_name)
    config = safe_files.parsed(where, TranscoderConfig, {
        "d_in": cfg.d_in, "d_out": cfg.d_out, "d_features": cfg.d_sae, "hook_in": hook_in,
        "hook_out": meta.hook_name_out, "model_name": meta.model_name or "unknown",
        **SAELENS_KINDS[cfg.architecture],
    })  # fmt: skip
    expected = expected_shapes(config) | ({"W_skip": (cfg.d_out, cfg.d_in)} if config.skip else {})
    safe_files.check_shapes(path, safe_files.safetensors_shapes(path), expected)
    names = {name: name for name in expected}
    return Stored(layer, path, numbers(config), lambda: (config, turned(path, names, "W_skip")), after_norm)


class CircuitTracerConfig(_Foreign):
    model_name: str = "unknown"
    model_kind: str = "transcoder_set"
    feature_input_hook: str
    feature_output_hook: str
    activation: str | None = None
    k: PositiveInt | None = None
    transcoders: list | None = None


def circuit_tracer(path: Path) -> Stored:
    """One layer of a circuit-tracer transcoder set: ``config.yaml`` and ``layer_3.safetensors``."""
    where = path.with_name("config.yaml")
    cfg = safe_files.parsed(where, CircuitTracerConfig, safe_files.read_yaml(where))
    if cfg.model_kind != "transcoder_set":
        raise BadFile(f"{where} is a {cfg.model_kind}: only transcoder_set is read")
    for name in cfg.transcoders or ():
        safe_files.plain_name(name, where)
    layer = number(path.stem)
    shapes = safe_files.safetensors_shapes(path)
    k = cfg.k
    if "k" in shapes:  # its own writer puts k among the tensors
        if shapes["k"] not in ((), (1,)):
            raise BadFile(f"{path}: k is {shapes['k']}, not one number")
        stored_k = safe_files.read_safetensors(path, {"k": "k"})["k"].item()
        if not 1 <= stored_k <= 10**9 or k not in (None, int(stored_k)):
            raise BadFile(f"{path} says k = {stored_k}, {where.name} says {k}")
        k = int(stored_k)
    jump = "activation_function.threshold" in shapes
    if cfg.activation not in (None, "relu", "topk", "jump_relu", "jumprelu") or (jump and cfg.activation == "topk"):
        raise BadFile(f"{where}: the activation {cfg.activation!r} is not read")
    activation = "jumprelu" if jump else "topk" if cfg.activation == "topk" or k is not None else "relu"
    if len(shapes.get("W_enc", ())) != 2:
        raise BadFile(f"{path} has no matrix W_enc")
    d_features, d_model = shapes["W_enc"]
    hook_in, after_norm = reads(layer, f"blocks.{layer}.{cfg.feature_input_hook}")
    config = safe_files.parsed(where, TranscoderConfig, {
        "d_in": d_model, "d_out": d_model, "d_features": d_features, "activation": activation,
        "k": k if activation == "topk" else None, "skip": "W_skip" in shapes, "model_name": cfg.model_name,
        "hook_in": hook_in, "hook_out": f"blocks.{layer}.{cfg.feature_output_hook}",
    })  # fmt: skip
    names = {name: name for name in expected_shapes(config)} | (
        {"threshold": "activation_function.threshold"} if jump else {}
    )
    expected = {names[name]: shape for name, shape in expected_shapes(config).items()} | {
        "W_enc": (d_features, d_model)
    }
    safe_files.check_shapes(path, {name: shape for name, shape in shapes.items() if name != "k"}, expected)
    if jump and safe_files.read_safetensors(path, {"t": names["threshold"]})["t"].min() < 0:
        raise BadFile(
            f"{path} has negative thresholds: circuit-tracer lets negative activations pass there, this does not"
        )
    return Stored(layer, path, numbers(config), lambda: (config, turned(path, names, "W_enc", "W_skip")), after_norm)


_LENGTHS = ("in_norm", "out_norm")  # mean lengths of inputs and outputs, where sparsify normalises them


class _SparsifyConfig(_Foreign):
    d_in: PositiveInt
    num_latents: int = 0
    expansion_factor: PositiveInt = 32
    k: PositiveInt
    activation: str = "topk"
    skip_connection: bool = False
    transcode: bool = False
    normalize_io: bool = False


def sparsify(path: Path) -> Stored:
    """sparsify (EleutherAI): ``cfg.json`` and ``sae.safetensors`` in a folder named after the MLP, ``layers.3.mlp``.

    It reads the MLP module's own input, after LayerNorm's gain and bias, and gives its own output, before a norm that
    may follow. With ``normalize_io`` it divides inputs by their mean length and multiplies outputs by theirs, both over
    sqrt(d_in): numbers that its weights take up here.
    """
    where = path.with_name("cfg.json")
    cfg = safe_files.parsed(where, _SparsifyConfig, safe_files.read_json(where))
    found = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)\.mlp", path.parent.name)
    if not cfg.transcode or cfg.activation != "topk":
        raise BadFile(f"{where} is not a TopK transcoder (transcode {cfg.transcode}, activation {cfg.activation!r})")
    if not found:
        raise BadFile(f"{path.parent.name!r} does not name an MLP, like layers.3.mlp: which layer is it of?")
    layer = int(found[1])
    d_features = cfg.num_latents or cfg.d_in * cfg.expansion_factor
    config = safe_files.parsed(where, TranscoderConfig, {
        "d_in": cfg.d_in, "d_out": cfg.d_in, "d_features": d_features, "activation": "topk", "k": cfg.k,
        "skip": cfg.skip_connection, "model_name": "unknown", "hook_in": hook_in(layer), "hook_out": mlp_out(layer),
    })  # fmt: skip
    names = {name: name for name in expected_shapes(config)} | {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
    expected = {names[name]: shape for name, shape in expected_shapes(config).items()}
    expected |= {name: (1,) for name in _LENGTHS if cfg.normalize_io}
    safe_files.check_shapes(
        path, safe_files.safetensors_shapes(path), expected | {"encoder.weight": (d_features, cfg.d_in)}
    )

    def open_() -> tuple[TranscoderConfig, dict[str, Tensor]]:
        tensors = turned(path, names, "W_enc", "W_skip")
        return config, _with_lengths(path, tensors) if cfg.normalize_io else tensors

    return Stored(layer, path, numbers(config), open_, after_norm=True)


def _with_lengths(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    stored = safe_files.read_safetensors(path, {name: name for name in _LENGTHS})
    length_in, length_out = (stored[name].item() for name in _LENGTHS)
    if not (math.isfinite(length_in) and math.isfinite(length_out) and length_in > 0):
        raise BadFile(f"{path} is damaged: its inputs have length {length_in} and its outputs {length_out}")
    root = len(tensors["W_enc"]) ** 0.5
    read, written = root / length_in, length_out / root
    factors = {"W_enc": read, "W_dec": written, "b_dec": written, "W_skip": read * written}
    return {name: value * factors[name] if name in factors else value for name, value in tensors.items()}


def gemma_scope(path: Path) -> Stored:
    """Gemma Scope: ``layer_3/.../params.npz``. Which hook it reads is not in the file: check the fit."""
    shapes = safe_files.npz_shapes(path)
    found = {int(m[1]) for part in path.parts if (m := re.fullmatch(r"layer_(\d+)", part))}
    if len(found) != 1:
        raise BadFile(f"{path} lies in no folder layer_0, layer_1, ...: which layer is it of?")
    (layer,) = found
    if len(shapes.get("W_enc", ())) != 2 or len(shapes.get("W_dec", ())) != 2:
        raise BadFile(f"{path} has no matrices W_enc and W_dec")
    config = safe_files.parsed(path, TranscoderConfig, {
        "d_in": shapes["W_enc"][0], "d_out": shapes["W_dec"][1], "d_features": shapes["W_enc"][1],
        "activation": "jumprelu", "hook_in": hook_in(layer), "hook_out": hook_out(layer), "model_name": "unknown",
    })  # fmt: skip
    safe_files.check_shapes(path, shapes, expected_shapes(config))
    names = {name: name for name in shapes}
    return Stored(layer, path, numbers(config), lambda: (config, safe_files.read_npz(path, names)))


def turned(path: Path, names: dict[str, str], *which: str) -> dict[str, Tensor]:
    """Tensors by our names, some of them stored as the transpose of ours."""
    tensors = safe_files.read_safetensors(path, names)
    return {name: t.T if name in which else t for name, t in tensors.items()}


def reads(layer: int, hook: str) -> tuple[str, bool]:
    """Our name of what a transcoder reads, and whether it reads that with the norm's gain and bias."""
    full = hook in (f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.ln2.hook_out")
    return (hook_in(layer) if full else hook), full


def number(stem: str) -> int:
    return int(re.sub(r"\D", "", stem))


def _layer_of(hook: str, where: Path) -> int:
    found = re.match(r"blocks\.(\d+)\.", hook)
    if not found:
        raise BadFile(f"{where}: the hook {hook!r} does not name a layer, like blocks.3.ln2.hook_normalized")
    return int(found[1])
