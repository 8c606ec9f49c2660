"""Language models by name, and prompts as tokens."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.paths import data_path


def pick_device(device: str | None = None) -> torch.device:
    """The device asked for, or the best one present (cuda, then mps, then cpu).

    Raises:
        ValueError: the device asked for is not on this machine.
    """
    present = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if device is None:
        return torch.device(present[0])
    if device.split(":")[0] not in present:
        raise ValueError(f"device {device!r} is not on this machine: choose one of {', '.join(present)}")
    return torch.device(device)


def load_model(name: str = "bundled", device: str | None = None, processed: bool = True) -> TransformerBridge:
    """A language model, processed as the paper's transcoders expect.

    LayerNorm gains are folded into the weights, writing weights and the unembedding are centred, and value biases
    are folded into the attention output bias, so the log-probabilities are those of the plain model.

    Args:
        name: ``"bundled"``, or a folder holding config.json, model.safetensors and tokenizer.json of a GPT-2 or
            GPT-NeoX model.
        device: ``"cpu"``, ``"cuda"`` or ``"mps"``; the best one present by default.
        processed: False leaves the weights as they are on disk, for transcoders trained on such a model.

    Raises:
        ValueError: unknown name, or a folder whose model has other blocks than GPT-2's or GPT-NeoX's.
    """
    folder = data_path("model") if name == "bundled" else Path(name)
    if not folder.is_dir():
        raise ValueError(
            f"unknown model {name!r}: use 'bundled' or a folder with config.json, model.safetensors and "
            "tokenizer.json (models from the hub are not supported yet)"
        )
    missing = [f for f in ("config.json", "model.safetensors", "tokenizer.json") if not (folder / f).is_file()]
    if missing:
        raise ValueError(f"{folder} is not a model folder: {', '.join(missing)} is missing")
    with _quiet_loading():
        try:
            model = TransformerBridge.boot_transformers(str(folder), device=str(pick_device(device)))
        except Exception as error:
            raise ValueError(f"{folder} could not be read as a model: {error}") from error
    if model.cfg.architecture not in ("GPT2LMHeadModel", "GPTNeoXForCausalLM"):
        raise ValueError(f"{folder} is a {model.cfg.architecture}: only GPT-2 and GPT-NeoX blocks are supported")
    model = model.float().eval().requires_grad_(False)
    if processed:
        with _quiet_loading():
            model.enable_compatibility_mode(disable_warnings=True)
    return model.requires_grad_(False)


def to_tokens(model: TransformerBridge, prompt: str) -> Int[Tensor, " pos"]:
    """The prompt's tokens behind one BOS token.

    Raises:
        ValueError: an empty prompt, or more tokens than the model's context.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty: give at least one word")
    ids = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = [model.tokenizer.bos_token_id, *ids]
    if len(ids) > model.cfg.n_ctx:
        raise ValueError(
            f"the prompt has {len(ids)} tokens with BOS, but the model reads at most {model.cfg.n_ctx}: shorten it"
        )
    return torch.tensor(ids, device=model.cfg.device)


def to_token(model: TransformerBridge, text: str) -> int:
    """The id of a text that is exactly one token.

    Raises:
        ValueError: the text is none or several tokens (they are named).
    """
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = [model.tokenizer.decode([i]) for i in ids]
        raise ValueError(f"{text!r} is {len(ids)} tokens {pieces}, but one token is needed here")
    return ids[0]


def token_strings(model: TransformerBridge, tokens: Int[Tensor, " pos"]) -> list[str]:
    """Each token as text, BOS as ``<bos>``."""
    bos = model.tokenizer.bos_token_id
    return ["<bos>" if i == bos else model.tokenizer.decode([i]) for i in tokens.tolist()]


@contextmanager
def _quiet_loading():
    # Loading bars of small local files would end up in every committed notebook.
    level = logging.root.manager.disable
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    from transformers.utils import logging as hf_logging

    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(level)
        os.environ.pop("TQDM_DISABLE") if before is None else os.environ.update(TQDM_DISABLE=before)
        if bars:
            hf_logging.enable_progress_bar()
