"""The forward pass of many prompts that begin alike, as plain matrix products.

"The war lasted from the year 17" is the same in all 97 prompts of a noun and a century, so its tokens run once. And
where only the last token's answer is wanted, the last blocks need not compute the other tokens: keys and values are
read through the query, so that one token costs four small products.

Only for GPT-2-style models with processed weights, as `tclib.load_model` gives them.
"""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge


class SharedPrefix:
    """The residual stream before the MLP of ``layer``, for prompts of one length.

    ``prefix`` [pos, d_model] is that of the tokens that all prompts share, ``rest`` [prompt, pos, d_model] that of the
    others; the last token is always in ``rest``.
    """

    @torch.no_grad()
    def __init__(self, model: TransformerBridge, tokens: Int[Tensor, "prompt pos"], layer: int):
        check_supported(model)
        self.model, self.layer, self.last = model, layer, model.cfg.n_layers - 1
        tokens = tokens.to(model.cfg.device)
        alike = (tokens == tokens[0]).all(dim=0)[:-1].long().cumprod(0)
        shared = int(alike.sum())
        positions = model.W_pos[: tokens.shape[1]]
        prefix = (model.W_E[tokens[0, :shared]] + positions[:shared])[None]
        rest = model.W_E[tokens[:, shared:]] + positions[shared:]
        for before in range(layer):
            prefix, rest = self._block(before, prefix, rest)
        prefix, self.rest = self._attend(layer, prefix, rest)
        self.prefix = prefix[0]

    def normalised(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """LayerNorm without gain, which processed weights have folded in."""
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=self.model.cfg.eps)

    def mlp(self, layer: int, resid: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """What the MLP of a layer writes."""
        m = self.model.blocks[layer].mlp  # model.W_out would stack all layers anew
        return self.neurons(layer, resid) @ m.W_out + m.b_out

    def neurons(self, layer: int, resid: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_mlp"]:
        """Activations of the neurons of a layer's MLP."""
        m = self.model.blocks[layer].mlp
        pre = torch.addmm(m.b_in, self.normalised(resid).reshape(-1, resid.shape[-1]), m.W_in)
        return torch.nn.functional.gelu(pre, approximate="tanh").view(*resid.shape[:-1], -1)

    @torch.no_grad()
    def finish(
        self, prefix: Float[Tensor, "pos d_model"] | None, rest: Float[Tensor, "prompt pos d_model"]
    ) -> Float[Tensor, "prompt d_model"]:
        """The last token's final normalised residual stream, from the residual stream after the MLP of ``layer``.

        Args:
            prefix: None where only the last token of ``rest`` [prompt, 1, d_model] was changed; the other tokens are
                then as in the untouched model.
        """
        if prefix is None:
            for layer in range(self.layer + 1, self.last + 1):
                before, others = self._untouched[layer]
                rest = self._last_token(layer, before, torch.cat([others, rest], dim=1))[:, None]
        elif self.layer < self.last:
            prefix = prefix[None]
            for layer in range(self.layer + 1, self.last):
                prefix, rest = self._block(layer, prefix, rest)
            rest = self._last_token(self.last, prefix[0], rest)[:, None]
        return self.normalised(rest[:, -1])

    @cached_property
    def _untouched(self) -> dict[int, tuple[Tensor, Tensor]]:
        """What each later layer of the untouched model reads at all tokens but the last."""
        prefix, rest = self.prefix[None], self.rest
        prefix, rest = prefix + self.mlp(self.layer, prefix), rest + self.mlp(self.layer, rest)
        reads = {}
        for layer in range(self.layer + 1, self.last + 1):
            reads[layer] = prefix[0], rest[:, :-1]
            if layer < self.last:
                prefix, rest = self._block(layer, prefix, rest)
        return reads

    def _block(self, layer: int, prefix: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        prefix, rest = self._attend(layer, prefix, rest)
        return prefix + self.mlp(layer, prefix), rest + self.mlp(layer, rest)

    def _attend(self, layer: int, prefix: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Both parts of the residual stream after the attention of a layer; the prefix is one row, seen by all."""
        q, past_k, past_v = self._qkv(layer, prefix)
        after = prefix + self._mix(layer, q, past_k, past_v, past_k[0, :0], past_v[0, :0])
        q, k, v = self._qkv(layer, rest)
        return after, rest + self._mix(layer, q, k, v, past_k[0], past_v[0])

    def _qkv(self, layer: int, resid: Tensor) -> list[Tensor]:
        m = self.model.blocks[layer].attn
        x = self.normalised(resid).reshape(-1, resid.shape[-1])
        parts = []
        for W, b in ((m.W_Q, m.b_Q), (m.W_K, m.b_K), (m.W_V, m.b_V)):
            flat = W.permute(1, 0, 2).reshape(x.shape[-1], -1)
            parts.append(torch.addmm(b.flatten(), x, flat).view(*resid.shape[:-1], *b.shape))
        return parts

    def _mix(self, layer: int, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
        """What all heads write: causal attention to own keys, behind those of the past [pos, head, d_head]."""
        size = q.shape[1]
        own = torch.einsum("nqhe,nkhe->nhqk", q, k)
        own = own.masked_fill(torch.ones(size, size, device=q.device).triu(1).bool(), -torch.inf)
        scores = torch.cat([torch.einsum("nqhe,khe->nhqk", q, past_k), own], dim=-1) / q.shape[-1] ** 0.5
        past, own = scores.softmax(dim=-1).split([len(past_k), size], dim=-1)
        z = torch.einsum("nhqk,khe->nqhe", past, past_v) + torch.einsum("nhqk,nkhe->nqhe", own, v)
        m = self.model.blocks[layer].attn
        return z.flatten(2) @ m.W_O.flatten(0, 1) + m.b_O

    def _last_token(self, layer: int, prefix: Tensor, rest: Tensor) -> Tensor:
        """The last token's residual stream after a layer, from all tokens' residual stream before it."""
        m, here = self.model.blocks[layer].attn, rest[:, -1]
        x, past = self.normalised(rest), self.normalised(prefix)
        q = torch.einsum("nd,hde->hne", x[:, -1], m.W_Q) + m.b_Q[:, None]
        through_k = torch.bmm(q, m.W_K.mT).transpose(0, 1)  # [prompt, head, d_model]
        own = torch.bmm(through_k, x.mT)  # b_K moves all scores of a query alike
        scores = torch.cat([through_k @ past.T, own], dim=-1) / q.shape[-1] ** 0.5
        of_past, of_own = scores.softmax(dim=-1).split([len(past), x.shape[1]], dim=-1)
        mixed = (of_past @ past + torch.bmm(of_own, x)).transpose(0, 1)  # [head, prompt, d_model]
        z = torch.bmm(mixed, m.W_V) + m.b_V[:, None]
        here = here + z.transpose(0, 1).flatten(1) @ m.W_O.flatten(0, 1) + m.b_O
        return here + self.mlp(layer, here)


def check_supported(model: TransformerBridge) -> None:
    """Refuse blocks that this module does not compute, naming the property."""
    cfg = model.cfg
    reasons = {
        "its positions are rotary": cfg.positional_embedding_type != "standard",
        "its attention and MLP are in parallel": getattr(cfg, "parallel_attn_mlp", False),
        "its MLPs compute another activation": cfg.act_fn != "gelu_new",
        "its norms have gains (tclib.load_model(name) folds them)": not bool((model.ln_final.weight == 1).all()),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"this sweep runs GPT-2's blocks by itself, and {reason}: on {cfg.model_name} use "
                "tclib.tasks.greater_than.run with the hooks of tclib.interventions"
            )
