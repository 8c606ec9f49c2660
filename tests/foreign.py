"""Files as other tools write them, put together key by key and not by the code under test.

Each function writes a random transcoder and returns what that tool computes: a function of the input.
"""

from __future__ import annotations

import json
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

Forward = Callable[[Tensor], Tensor]
ORIGINAL = "final_sparse_autoencoder_gpt2-small_blocks.{}.ln2.hook_normalized_{}"
D, F = 32, 64


def weights(seed: int = 0, d: int = D, f: int = F) -> dict[str, Tensor]:
    """Random numbers of a transcoder and its extras; decoder rows of length 1."""
    g = torch.Generator().manual_seed(seed)
    w = {"W_enc": torch.randn(d, f, generator=g) / d**0.5, "W_dec": torch.randn(f, d, generator=g)}
    w |= {"b_enc": torch.randn(f, generator=g) / 3, "b_dec": torch.randn(d, generator=g) / 3}
    w |= {"b_dec_out": torch.randn(d, generator=g) / 3, "threshold": torch.rand(f, generator=g)}
    w["W_skip"] = torch.randn(d, d, generator=g) / d**0.5
    w["W_dec"] /= w["W_dec"].norm(dim=1, keepdim=True)
    return w


@contextmanager
def original_class(**attributes):
    """The class that the paper's code pickles, for as long as a file is written."""
    cls = type("LanguageModelSAERunnerConfig", (), {"__module__": "sae_training.config"})
    modules = {"sae_training": types.ModuleType("sae_training"), "sae_training.config": types.ModuleType("config")}
    modules["sae_training.config"].LanguageModelSAERunnerConfig = cls
    cfg = cls()
    cfg.__dict__.update(attributes)
    sys.modules.update(modules)
    try:
        yield cfg
    finally:
        for name in modules:
            del sys.modules[name]


def original(
    folder: Path, layer: int = 0, seed: int = 0, d: int = D, f: int = F, plain_sae: bool = False, **changed: Tensor
) -> Forward:
    """The paper's checkpoint and its ``_log_feature_sparsity.pt``; ``changed`` tensors take the random ones' place."""
    w = weights(seed, d, f) | changed
    names = ("W_enc", "b_enc", "W_dec", "b_dec") + (() if plain_sae else ("b_dec_out",))
    attributes = {
        "model_name": "gpt2-small", "hook_point": f"blocks.{layer}.ln2.hook_normalized", "hook_point_layer": layer,
        "out_hook_point": f"blocks.{layer}.hook_mlp_out", "out_hook_point_layer": layer,
        "is_transcoder": not plain_sae, "d_in": d, "d_out": d, "d_sae": f, "expansion_factor": f // d,
        "l1_coefficient": 1e-4, "lr": 4e-4, "dtype": torch.float32, "device": torch.device("cuda"),
        "use_ghost_grads": (False,), "wandb_entity": None,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / ORIGINAL.format(layer, f)
    # The published files were saved on a GPU, which their storages remember.
    with original_class(**attributes) as cfg, mock.patch("torch.serialization.location_tag", lambda _: "cuda:0"):
        torch.save({"cfg": cfg, "state_dict": OrderedDict((n, w[n]) for n in names)}, f"{stem}.pt")
    torch.save(torch.linspace(-6, -1, f), f"{stem}_log_feature_sparsity.pt")
    out = w["b_dec"] if plain_sae else w["b_dec_out"]
    return lambda x: torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) @ w["W_dec"] + out


def saelens(folder: Path, kind: str = "transcoder", layer: int = 0, seed: int = 0, **changes) -> Forward:
    """SAELens 6, one of its four transcoders; ``changes`` go into its cfg.json."""
    w, jump, skip = weights(seed), "jumprelu" in kind, "skip" in kind
    names = ["W_enc", "b_enc", "W_dec", "b_dec", *["threshold"] * jump, *["W_skip"] * skip]
    cfg = {
        "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": False,
        "normalize_activations": "none", "reshape_activations": "none", "d_out": D, "architecture": kind,
        "metadata": {
            "sae_lens_version": "6.54.12", "model_name": "gpt2", "context_size": 128, "prepend_bos": True,
            "hook_name": f"blocks.{layer}.ln2.hook_normalized", "hook_name_out": f"blocks.{layer}.hook_mlp_out",
        },
    } | changes  # fmt: skip
    folder.mkdir(parents=True)
    save_file({name: w[name] for name in names}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg), encoding="utf-8")

    def forward(x):
        pre = x @ w["W_enc"] + w["b_enc"]
        z = torch.relu(pre) * ((pre > w["threshold"]) if jump else 1)
        return z @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if skip else 0)

    return forward


def circuit_tracer(
    folder: Path, kind: str = "relu", skip: bool = False, layers: int = 2, k: int = 5, extra: str = ""
) -> list[Forward]:
    """A transcoder set of ``layers`` layers."""
    folder.mkdir(parents=True)
    topk = f"activation: topk\nk: {k}\n" if kind == "topk" else ""
    hooks = "feature_input_hook: ln2.hook_normalized\nfeature_output_hook: hook_mlp_out\n"
    text = f"model_name: gpt2\nmodel_kind: transcoder_set\n{hooks}scan: gpt2\n{topk}{extra}"
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    return [_circuit_tracer_layer(folder / f"layer_{i}.safetensors", kind, skip, k, i) for i in range(layers)]


def circuit_tracer_cross_layer(folder: Path, kind: str = "relu", layers: int = 3, hook_in: str = "ln2.hook_normalized"):
    """A cross-layer transcoder; gives what all layers compute together, from inputs to outputs by layer."""
    folder.mkdir(parents=True)
    hooks = f"feature_input_hook: {hook_in}\nfeature_output_hook: hook_mlp_out\n"
    text = f"model_name: gpt2\nmodel_kind: cross_layer_transcoder\n{hooks}scan: gpt2\n"
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    g = torch.Generator().manual_seed(7)
    W = [weights(i) | {"W_dec": torch.randn(F, layers - i, D, generator=g)} for i in range(layers)]
    for i, w in enumerate(W):
        names = ["b_enc", "b_dec", *["threshold"] * (kind == "jumprelu")]
        tensors = {f"{name}_{i}": w[name] for name in names} | {f"W_enc_{i}": w["W_enc"].T.contiguous()}
        save_file(tensors, folder / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": w["W_dec"]}, folder / f"W_dec_{i}.safetensors")

    def forward(x: dict[int, Tensor]) -> dict[int, Tensor]:
        pre = [x[i] @ w["W_enc"] + w["b_enc"] for i, w in enumerate(W)]
        z = [torch.relu(p) * ((p > w["threshold"]) if kind == "jumprelu" else 1) for p, w in zip(pre, W, strict=True)]
        return {
            to: W[to]["b_dec"] + sum(z[at] @ W[at]["W_dec"][:, to - at] for at in range(to + 1)) for to in range(layers)
        }

    return forward


def _circuit_tracer_layer(path: Path, kind: str, skip: bool, k: int, seed: int) -> Forward:
    w = weights(seed)
    tensors = {"W_enc": w["W_enc"].T.contiguous(), "W_dec": w["W_dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    if kind == "jumprelu":
        tensors["activation_function.threshold"] = w["threshold"]
    if kind == "topk":
        tensors["k"] = torch.tensor(float(k))
    if skip:
        tensors["W_skip"] = w["W_skip"]
    save_file(tensors, path)

    def forward(x):
        pre = torch.nn.functional.linear(x, tensors["W_enc"], w["b_enc"])
        if kind == "relu":
            z = torch.relu(pre)
        elif kind == "topk":
            values, index = torch.relu(pre).topk(k)
            z = torch.zeros_like(pre).scatter(-1, index, values)
        else:
            z = pre * (pre > w["threshold"])
        return z @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if skip else 0)

    return forward


def sparsify(
    folder: Path, layer: int = 0, k: int = 6, skip: bool = True, seed: int = 0, d: int = D, f: int = F,
    lengths: tuple[float, float] | None = None, name: str = "layers.{}.mlp", **changes,
) -> Forward:  # fmt: skip
    """sparsify's folder for one MLP; the function is of the MLP's own input, behind gain and bias.

    ``lengths``: of inputs and outputs, which are normalised by them.
    """
    w = weights(seed, d, f)
    place = folder / name.format(layer)
    place.mkdir(parents=True)
    cfg = {
        "activation": "topk", "expansion_factor": f // d, "normalize_decoder": True, "num_latents": 0, "k": k,
        "multi_topk": False, "skip_connection": skip, "transcode": True, "d_in": d,
    } | ({"normalize_io": True} if lengths else {}) | changes  # fmt: skip
    (place / "cfg.json").write_text(json.dumps(cfg), encoding="utf-8")
    tensors = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"], "W_dec": w["W_dec"]}
    tensors |= {"b_dec": w["b_dec"]} | ({"W_skip": w["W_skip"]} if skip else {})
    if lengths:
        tensors |= {name: torch.tensor([length]) for name, length in zip(("in_norm", "out_norm"), lengths, strict=True)}
    save_file(tensors, place / "sae.safetensors")
    length_in, length_out = lengths or (d**0.5, d**0.5)

    def forward(x):
        x = x * (d**0.5 / length_in)
        values, index = torch.relu(x @ w["W_enc"] + w["b_enc"]).topk(k)
        z = torch.zeros(*x.shape[:-1], f).scatter(-1, index, values)
        out = z @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].mT if skip else 0)
        return out * (length_out / d**0.5)

    return forward


def gemma_scope(folder: Path, layer: int = 0, seed: int = 0, save: Callable = np.savez) -> Forward:
    """Gemma Scope's params.npz in its nested folders."""
    w = weights(seed)
    place = folder / f"layer_{layer}" / "width_16k" / "average_l0_40"
    place.mkdir(parents=True)
    save(place / "params.npz", **{n: w[n].numpy() for n in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")})

    def forward(x):
        pre = x @ w["W_enc"] + w["b_enc"]
        return (torch.relu(pre) * (pre > w["threshold"])) @ w["W_dec"] + w["b_dec"]

    return forward
