"""Small random models with everything that could go wrong switched on: gains, biases, several layers."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tclib.activations import hook_in, hook_out
from tclib.model import load_model
from tclib.transcoder import Transcoder, TranscoderConfig

WORDS = [f"w{i}" for i in range(40)]


def make_model(folder: Path, layers: int = 2, d_model: int = 32, heads: int = 4, context: int = 16, seed: int = 0):
    """A random GPT-2 folder, loaded through `tclib.load_model`. Its vocabulary is w0 ... w39 and <|endoftext|>."""
    torch.manual_seed(seed)
    bos = len(WORDS)
    config = GPT2Config(
        vocab_size=bos + 1, n_positions=context, n_embd=d_model, n_layer=layers, n_head=heads,
        bos_token_id=bos, eos_token_id=bos,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(WORDS)} | {"<|endoftext|>": bos}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="w0"
    )
    fast.save_pretrained(folder)
    return load_model(str(folder), device="cpu")


def make_transcoder(layer: int, d_model: int = 32, d_features: int = 64, seed: int = 0, **config) -> Transcoder:
    """A random transcoder of any architecture."""
    config = TranscoderConfig(
        d_in=d_model, d_out=d_model, d_features=d_features, hook_in=hook_in(layer), hook_out=hook_out(layer), **config
    )
    transcoder = Transcoder(config)
    generator = torch.Generator().manual_seed(seed + 31 * layer)
    with torch.no_grad():
        for name, parameter in transcoder.named_parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            if name == "threshold":
                parameter.abs_()
    return transcoder.requires_grad_(False)
