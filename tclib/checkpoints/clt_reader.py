"""circuit-tracer's folders of cross-layer transcoders: each layer's encoder and decoder are files of their own."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from tclib.checkpoints.lazy import Stored, numbers
from tclib.checkpoints.readers import CircuitTracerConfig, number, reads, turned
from tclib.io import safe_files
from tclib.io.safe_files import BadFile
from tclib.transcoder import TranscoderConfig, expected_shapes


def circuit_tracer_cross_layer(path: Path) -> Stored:
    """One layer of circuit-tracer's cross-layer transcoders: ``W_enc_3`` with the biases, and ``W_dec_3``.

    Its code computes ``y_l = sum_k z_k W_dec[k -> l] + b_dec_l``; its folders hold no skip paths.
    """
    where, rows = path.with_name("config.yaml"), path.with_name(path.name.replace("W_enc", "W_dec"))
    cfg = safe_files.parsed(where, CircuitTracerConfig, safe_files.read_yaml(where))
    if cfg.model_kind != "cross_layer_transcoder":
        raise BadFile(f"{where} says {cfg.model_kind}, but {path.name} is of a cross_layer_transcoder")
    layer = number(path.stem)
    shapes = safe_files.safetensors_shapes(path)
    written = safe_files.safetensors_shapes(rows).get(f"W_dec_{layer}", ())
    if len(shapes.get(f"W_enc_{layer}", ())) != 2 or len(written) != 3:
        raise BadFile(f"{path} and {rows.name} have no matrix W_enc_{layer} and no rows W_dec_{layer} for each layer")
    jump = f"threshold_{layer}" in shapes
    d_features, d_model = shapes[f"W_enc_{layer}"]
    hook_in, after_norm = reads(layer, f"blocks.{layer}.{cfg.feature_input_hook}")
    config = safe_files.parsed(where, TranscoderConfig, {
        "d_in": d_model, "d_out": d_model, "d_features": d_features, "activation": "jumprelu" if jump else "relu",
        "n_writes": written[1], "model_name": cfg.model_name, "hook_in": hook_in,
        "hook_out": f"blocks.{layer}.{cfg.feature_output_hook}",
    })  # fmt: skip
    names = {name: f"{name}_{layer}" for name in expected_shapes(config)}
    expected = {names[name]: shape for name, shape in expected_shapes(config).items()}
    expected[f"W_enc_{layer}"] = d_features, d_model
    safe_files.check_shapes(path, shapes | {f"W_dec_{layer}": written}, expected)
    if jump and safe_files.read_safetensors(path, {"t": names["threshold"]})["t"].min() < 0:
        raise BadFile(
            f"{path} has negative thresholds: circuit-tracer lets negative activations pass there, this does not"
        )

    def open_() -> tuple[TranscoderConfig, dict[str, Tensor]]:
        own = {name: stored for name, stored in names.items() if name != "W_dec"}
        return config, turned(path, own, "W_enc") | safe_files.read_safetensors(rows, {"W_dec": names["W_dec"]})

    return Stored(layer, path, numbers(config), open_, after_norm, config.n_writes, rows)
