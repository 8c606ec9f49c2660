"""Small random models with everything that could go wrong switched on: gains, biases, several layers."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tclib.activations import hook_in, hook_out
from tclib.model import load_model
from tclib.transcoder import Transcoder, TranscoderConfig

WORDS = [f"w{i}" for i in range(40)]
# Families of today's models: what makes a small one of each, all with two value heads for four query heads.
_WINDOW = {"sliding_window": 4}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 12, "layer_types": ["sliding_attention", "full_attention"] * 4}
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "mistral": {"head_dim": 8} | _WINDOW,
    "phi3": {"partial_rotary_factor": 0.5},
    "gemma": {"head_dim": 12},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0} | _GEMMA | _WINDOW,
    "gemma3_text": _GEMMA | _WINDOW,
    "olmo2": {},
}
SPARSE_KINDS = {  # settings of every kind of sparse step
    "relu": {"l1_coefficient": 0.05},
    "free relu": {"l1_coefficient": 0.05, "unit_norm": False},
    "topk": {"activation": "topk", "k": 8},
    "batchtopk": {"activation": "batchtopk", "k": 8},
    "jumprelu": {"activation": "jumprelu", "bandwidth": 0.05, "l0_coefficient": 0.01},
}


def make_model(
    folder: Path, layers: int = 2, d_model: int = 32, heads: int = 4, context: int = 16, seed: int = 0,
    blocks: str = "gpt2", processed: bool = True,
):  # fmt: skip
    """A random model's folder, loaded through `tclib.load_model`. Its vocabulary is w0 ... w39 and <|endoftext|>.

    ``blocks``: "gpt2"; "neox" (rotary, attention and MLP in parallel) or "neox-sequential"; one of `FAMILIES`.
    """
    torch.manual_seed(seed)
    bos = len(WORDS)
    common = {"vocab_size": bos + 1, "bos_token_id": bos, "eos_token_id": bos}
    if blocks == "gpt2":
        config = GPT2Config(n_positions=context, n_embd=d_model, n_layer=layers, n_head=heads, **common)
        model = GPT2LMHeadModel(config)
    elif blocks in FAMILIES:
        own = {name: value[:layers] if name == "layer_types" else value for name, value in FAMILIES[blocks].items()}
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[blocks](
            hidden_size=d_model, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
            intermediate_size=2 * d_model, max_position_embeddings=context, pad_token_id=None, **own, **common,
        ))  # fmt: skip
    else:
        config = GPTNeoXConfig(
            hidden_size=d_model, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=2 * d_model,
            max_position_embeddings=context, rotary_pct=0.25, use_parallel_residual=blocks == "neox", **common,
        )  # fmt: skip
        model = GPTNeoXForCausalLM(config)
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
    loaded = load_model(str(folder), device="cpu", processed=processed)
    if blocks == "qwen2":  # transformers makes a tokenizer of its own class for it, which knows none of these words
        loaded._tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)  # the public name would change it back
    return loaded


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
