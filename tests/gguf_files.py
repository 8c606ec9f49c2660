"""GGUF files of small random models, written as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"0123456789abcdefgh", "Ġ", "ĠĠ", "Ġa", "bc", "Ġbc"]
MERGES = ["Ġ Ġ", "Ġ a", "b c", "Ġ bc"]
LLAMA = {
    "embed_tokens.": "token_embd.", "model.norm.": "output_norm.", "lm_head.": "output.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "layers.": "blk.", "model.": "",
}  # fmt: skip
GPT2 = {
    "wte.": "token_embd.", "wpe.": "position_embd.", "ln_f.": "output_norm.", ".ln_1.": ".attn_norm.",
    ".ln_2.": ".ffn_norm.", ".attn.c_attn.": ".attn_qkv.", ".attn.c_proj.": ".attn_output.", ".mlp.c_fc.": ".ffn_up.",
    ".mlp.c_proj.": ".ffn_down.", "h.": "blk.", "transformer.": "",
}  # fmt: skip


def write(
    path: Path, family: str = "llama", kind: str = "F32", seed: int = 0, tokens: list[str] = TOKENS, **settings
) -> PreTrainedModel:
    """A random model's file, and the model with the weights that the file stands for."""
    torch.manual_seed(seed)
    common = {"vocab_size": len(tokens), "bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, **common))
    else:
        config = LlamaConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
            max_position_embeddings=32, tie_word_embeddings=True, rms_norm_eps=1e-5, **common,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    writer = GGUFWriter(path, family)
    writer.add_context_length(32 if family == "llama" else 1024)  # transformers reads no other for GPT-2
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    if family == "llama":
        writer.add_feed_forward_length(96)
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(16)
        writer.add_rope_freq_base(10_000.0)
        writer.add_vocab_size(len(tokens))
    else:
        writer.add_feed_forward_length(256)
        writer.add_layer_norm_eps(1e-5)
    _tokenizer(writer, tokens)
    for name, value in settings.items():
        writer.add_uint32(name.replace("__", "."), value)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.2 * torch.randn_like(parameter)
            parameter.copy_(_stored(writer, name, parameter.numpy(), family, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model.eval()


def _tokenizer(writer: GGUFWriter, tokens: list[str]) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def _stored(writer: GGUFWriter, name: str, value: np.ndarray, family: str, kind: str) -> torch.Tensor:
    """Add one tensor; what it stands for when it is read again."""
    ours = name
    for theirs, here in (GPT2 if family == "gpt2" else LLAMA).items():
        ours = ours.replace(theirs, here)
    heads = {"attn_q.": 4, "attn_k.": 2}
    permuted = next((n for part, n in heads.items() if part in ours), None) if family == "llama" else None
    turned = family == "gpt2" and value.ndim == 2 and "_embd" not in ours
    laid = value.T if turned else value
    if permuted:  # llama.cpp rotates neighbours, transformers the two halves of a head
        laid = laid.reshape(permuted, 2, -1, laid.shape[1]).swapaxes(1, 2).reshape(laid.shape)
    laid = np.ascontiguousarray(laid)
    number = GGMLQuantizationType[kind] if value.ndim == 2 else GGMLQuantizationType.F32
    stored = quants.quantize(laid, number)
    raw = number if number not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16) else None
    writer.add_tensor(ours, stored, raw_dtype=raw)
    again = quants.dequantize(stored, number).reshape(laid.shape)
    if permuted:
        again = again.reshape(permuted, -1, 2, again.shape[1]).swapaxes(1, 2).reshape(again.shape)
    return torch.from_numpy(np.ascontiguousarray(again.T if turned else again))
