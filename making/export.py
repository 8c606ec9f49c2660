"""The trained model as a Hugging Face folder, and its bits per character on held-out works."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, GPT2Config

from making.gpt2 import GPT2, hugging_face_weights
from making.tokenizer import CONTEXT
from making.training import Settings, load_checkpoint

Logits = Callable[[Tensor], Tensor]


def export(work: Path, run: Path, out: Path) -> GPT2:
    """Write the run's newest checkpoint in fp16 to `out`, check that it loads, and return it."""
    settings = Settings(**json.loads((run / "settings.json").read_text(encoding="utf-8")))
    model = settings.model()
    step = load_checkpoint(run, model, [])
    print(f"step {step} of {settings.steps}")
    tokenizer = AutoTokenizer.from_pretrained(work)
    config = GPT2Config(
        architectures=["GPT2LMHeadModel"],
        vocab_size=settings.vocabulary,
        n_positions=settings.context,
        n_ctx=settings.context,
        n_embd=settings.d_model,
        n_layer=settings.layers,
        n_head=settings.heads,
        activation_function="gelu_new",
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        dtype="float32",  # stored in fp16, computed in float32
    )
    model.half()
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    save_file(hugging_face_weights(model), out / "model.safetensors", metadata={"format": "pt"})
    model.float()
    check(model, out)
    return model


def check(model: GPT2, folder: Path) -> None:
    """Raise unless the folder gives the model's logits, and BOS before a text."""
    bridge = TransformerBridge.boot_transformers(str(folder))
    ids = torch.arange(2 * model.wpe.num_embeddings).view(2, -1) % model.wte.num_embeddings
    with torch.no_grad():
        difference = (bridge(ids) - model(ids)).abs().max().item()
    if difference > 1e-3:
        raise ValueError(f"the exported model's logits are off by {difference}")
    first = bridge.to_tokens("The war lasted from the year 1732")[0].tolist()
    if first.count(bridge.tokenizer.bos_token_id) != 1 or first[0] != bridge.tokenizer.bos_token_id:
        raise ValueError(f"a text must start with BOS, once: {first}")


def held_out_bits(model: Logits, work: Path, context: int = CONTEXT) -> dict[str, float]:
    """Bits per character of each held-out work, and of all together."""
    facts = json.loads((work / "text.json").read_text(encoding="utf-8"))["held_out"]
    bits = {}
    for name, fact in facts.items():
        ids = torch.from_numpy(np.load(work / f"real_heldout_{name}.npy").astype(np.int64))
        bits[name] = bits_per_character(model, ids, fact["characters"], context)
    characters = {name: fact["characters"] for name, fact in facts.items()}
    total = sum(bits[name] * characters[name] for name in bits)
    return {**bits, "all": total / sum(characters.values())}


def bits_per_character(model: Logits, ids: Tensor, n_characters: int, context: int = CONTEXT, batch: int = 64) -> float:
    """Bits that `model` (ids to logits) needs for the text of `ids`, per character.

    `ids` starts with BOS. Windows of `context` overlap by half, so that each token but the first
    ones has at least half a window before it; each window's first token is replaced by BOS, as in
    training. Separators between documents count as bits, not as characters.
    """
    stride = context // 2
    starts = range(0, max(1, len(ids) - 1 - stride), stride)
    ignored = -100
    padded = torch.cat([ids, ids.new_full((context,), ignored)])
    windows = torch.stack([padded[start : start + context + 1] for start in starts])
    targets = windows[:, 1:].clone()
    targets[1:, :stride] = ignored  # scored by the window before
    inputs = windows[:, :-1].clamp(min=0)
    inputs[:, 0] = ids[0]
    nats = 0.0
    with torch.no_grad():
        for some, their_targets in zip(inputs.split(batch), targets.split(batch), strict=True):
            logits = model(some).flatten(0, 1)
            nats += F.cross_entropy(logits, their_targets.flatten(), ignore_index=ignored, reduction="sum").item()
    return nats / math.log(2) / n_characters
