"""What a model's blocks are like, whatever its family: norms, heads and biases, read off the model itself.

    stream -> [norm] -> attention -> [norm] -> + stream            the MLP likewise, after it or (GPT-NeoX) beside it

A norm may centre (LayerNorm) or not (RMSNorm), and stand before, after, or on both sides (Gemma 2 and 3; OLMo 2 has
none before). Several query heads may share one key and value head. A family of transformers whose blocks have no other
property is one row of `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Family:
    """Where transformers keeps on disk what is looked at before a model is loaded, without prefixes like ``model.``."""

    embedding: str
    norm: str | None  # of a block: the norm that its MLP reads through, if it has one
    offset: bool = False  # gains are stored as what they have above 1
    sizes: tuple[str, ...] = ("vocab_size", "hidden_size", "num_hidden_layers")  # keys of config.json


_LLAMA = Family("embed_tokens.weight", "post_attention_layernorm")
_GEMMA_2 = Family("embed_tokens.weight", "pre_feedforward_layernorm", offset=True)
FAMILIES = {
    "gpt2": Family("wte.weight", "ln_2", sizes=("vocab_size", "n_embd", "n_layer")),
    "gpt_neox": Family("embed_in.weight", "post_attention_layernorm"),
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mistral": _LLAMA,
    "phi3": _LLAMA,
    "gemma": Family("embed_tokens.weight", "post_attention_layernorm", offset=True),
    "gemma2": _GEMMA_2,
    "gemma3_text": _GEMMA_2,
    "olmo2": Family("embed_tokens.weight", None),
}
SUPPORTED = "GPT-2, GPT-NeoX, Llama, Qwen 2 and 3, Mistral, Phi-3, Gemma 1 to 3 and OLMo 2"
_UNFIT = {  # key of config.json: what does not fit where it is set
    "num_experts": "its MLPs are mixtures of experts",
    "num_local_experts": "its MLPs are mixtures of experts",
    "is_encoder_decoder": "it has an encoder beside the decoder",
    "add_cross_attention": "its blocks also attend to an encoder",
    "alibi": "its attention adds ALiBi position biases",
    "quantization_config": "its weights are quantised",
}
_KINDS = {
    "gptj": "its attention and MLP share one LayerNorm",
    "phi": "its attention and MLP share one LayerNorm",
    "cohere": "its attention and MLP share one LayerNorm",
    "opt": "its positions and its MLP's activation differ",
    "gpt_neo": "its attention is local in every other layer",
    "granite": "its blocks scale what they write",
    "gemma3": "it sees images beside the text",
    "mamba": "it has no attention",
    "bert": "its attention is not causal",
}


def check_architecture(config: Mapping[str, Any], where: str) -> None:
    """Refuse blocks that attribution here does not know, naming the property.

    Args:
        config: a model's config.json.

    Raises:
        ValueError: a family without a row in `FAMILIES`, or a property that its models usually do not have.
    """
    kind = config.get("model_type")
    reasons = [reason for key, reason in _UNFIT.items() if config.get(key)]
    if kind == "gpt_neox" and "glu" in str(config.get("hidden_act")):
        reasons.append("its MLPs are gated")
    if kind not in FAMILIES or reasons:
        reason = reasons[0] if reasons else _KINDS.get(str(kind), "its blocks are not the same as theirs")
        raise ValueError(f"{where} is a {kind} model: only {SUPPORTED} blocks are supported, and {reason}")


@dataclass(frozen=True)
class Norm:
    """``(x - mean, if it centres) / scale * gain + bias``. Attribution freezes the scale; what is left is linear."""

    hook: str  # its hooks are {hook}.hook_scale and {hook}.hook_normalized
    centres: bool
    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    eps: float

    @classmethod
    def of(cls, module: Any, hook: str) -> Norm | None:
        """The norm that a bridge's module is; None for a place that has none."""
        if module is None:
            return None
        weight, centres = module.weight.detach(), not module.uses_rms_norm
        gain = 1 + weight if module.uses_weight_offset else weight
        bias = module.bias.detach() if centres else torch.zeros_like(weight)
        return cls(hook, centres, gain, bias, module.config.eps)

    def centre(self, vectors: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """Vectors (or readers: centring is symmetric) without their means, where this norm removes those."""
        return vectors - vectors.mean(-1, keepdim=True) if self.centres else vectors

    def normalised(self, x: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """What the norm makes of any input, before gain and bias."""
        x = self.centre(x)
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


@dataclass(frozen=True)
class Block:
    """One block: its norms, and attention's values and outputs. ``W_O`` and ``b_O`` include the gain of the norm after.

    Query head h takes the keys and values of head ``h // group``.
    """

    before_attn: Norm | None
    before_mlp: Norm | None
    after_attn: Norm | None
    after_mlp: Norm | None
    W_V: Float[Tensor, "value_head d_model d_head"]
    b_V: Float[Tensor, "value_head d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    b_O: Float[Tensor, " d_model"]
    group: int

    @classmethod
    def of(cls, model: TransformerBridge, layer: int) -> Block:
        """The block of a layer of a model. The weights are views where no gain comes after them."""
        block, prefix = model.blocks[layer], f"blocks.{layer}"
        before, before_mlp, after, after_mlp = (
            Norm.of(getattr(block, name, None), f"{prefix}.{name}") for name in ("ln1", "ln2", "ln1_post", "ln2_post")
        )
        attn = block.attn
        W_V, W_O = attn.W_V.detach(), attn.W_O.detach()
        b_V, b_O = (None if b is None else b.detach() for b in (attn.b_V, attn.b_O))
        b_V = torch.zeros_like(W_V[:, 0]) if b_V is None else b_V
        b_O = torch.zeros_like(W_O[0, 0]) if b_O is None else b_O
        if after is not None:
            W_O, b_O = after.centre(W_O) * after.gain, after.centre(b_O) * after.gain
        return cls(before, before_mlp, after, after_mlp, W_V, b_V, W_O, b_O, len(W_O) // len(W_V))

    def per_head(self, values: Float[Tensor, "*any"], dim: int = 0) -> Float[Tensor, "*any"]:
        """What stands for value heads along a dimension, for each of the query heads."""
        return values if self.group == 1 else values.repeat_interleave(self.group, dim)

    def head(self, head: int) -> tuple[Float[Tensor, "d_model d_head"], Float[Tensor, "d_head d_model"]]:
        """What a head reads its values with, and what it writes them with."""
        return self.W_V[head // self.group], self.W_O[head]


def embeddings(model: TransformerBridge) -> Float[Tensor, "vocab d_model"]:
    """What each token's embedding writes to the stream; Gemma's models scale their W_E for that."""
    with torch.no_grad():
        return model.embed(torch.arange(model.cfg.d_vocab, device=model.cfg.device)[None])[0]
