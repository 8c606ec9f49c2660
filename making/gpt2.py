"""The GPT-2 architecture, written so that it trains fast on one CPU core.

It computes what transformers' GPT2LMHeadModel computes (`hugging_face_weights` gives the same weights in its layout).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS_AT_ONCE = 512  # a slice of the logits that stays in the processor's cache


class CausalAttention(torch.autograd.Function):
    """Softmax attention in the inputs' precision: on CPUs much faster than PyTorch's own in bfloat16."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        pattern = (q @ k.transpose(-1, -2)).add_(mask.to(q.dtype)).softmax(-1).to(q.dtype)
        out = pattern @ v
        ctx.save_for_backward(q, k, v, pattern, out)
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, pattern, out = ctx.saved_tensors
        d_scores = d_out @ v.transpose(-1, -2)
        # sum(pattern * d_pattern) over keys equals sum(d_out * out) over the head's dimensions
        d_scores.sub_((d_out * out).sum(-1, keepdim=True)).mul_(pattern)
        return d_scores @ k, d_scores.transpose(-1, -2) @ q, pattern.transpose(-1, -2) @ d_out, None


class UnembeddingLoss(torch.autograd.Function):
    """Mean cross-entropy and the loss of each token; the gradient is taken on the way, slice by slice."""

    @staticmethod
    def forward(ctx, hidden: Tensor, unembedding: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        weight = unembedding.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(unembedding)
        losses = []
        for start in range(0, len(targets), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            target = targets[rows, None]
            probabilities = (hidden[rows] @ weight.T).float().softmax(-1)
            right = probabilities.gather(1, target)
            losses.append(-right.log().squeeze(1))
            d_logits = probabilities.scatter_(1, target, right - 1).div_(len(targets)).to(hidden.dtype)
            d_hidden[rows] = d_logits @ weight
            d_weight += d_logits.T @ hidden[rows]
        ctx.save_for_backward(d_hidden, d_weight)
        each = torch.cat(losses)
        ctx.mark_non_differentiable(each)
        return each.mean(), each

    @staticmethod
    def backward(ctx, d_mean: Tensor, d_each: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_mean, d_weight * d_mean, None


class Attention(nn.Module):
    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(d_model, 3 * d_model)
        self.c_proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, d_model = x.shape
        d_head = d_model // self.heads
        q, k, v = self.c_attn(x).view(batch, length, 3, self.heads, d_head).permute(2, 0, 3, 1, 4).unbind()
        out = CausalAttention.apply(q / math.sqrt(d_head), k, v, mask)
        return self.c_proj(out.transpose(1, 2).reshape(batch, length, d_model))


class MLP(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(d_model, 4 * d_model)
        self.c_proj = nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(d_model)
        self.attn = Attention(d_model, heads)
        self.ln_2 = nn.LayerNorm(d_model)
        self.mlp = MLP(d_model)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """Ids to logits; embedding and unembedding are one matrix."""

    def __init__(self, vocabulary: int, d_model: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, d_model)
        self.wpe = nn.Embedding(context, d_model)
        self.h = nn.ModuleList(Block(d_model, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(d_model)
        self.register_buffer("mask", torch.full((context, context), -1e4).triu(1), persistent=False)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                scale = math.sqrt(2 * layers) if "c_proj" in name else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)

    def hidden(self, ids: Tensor) -> Tensor:
        """The final residual stream, normalised."""
        length = ids.shape[1]
        x = self.wte(ids) + self.wpe.weight[:length]
        for block in self.h:
            x = block(x, self.mask[:length, :length])
        return self.ln_f(x)

    def forward(self, ids: Tensor) -> Tensor:
        return self.hidden(ids) @ self.wte.weight.T

    def loss(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss, and the loss of each token, computed in bfloat16."""
        with torch.autocast(ids.device.type, torch.bfloat16):
            hidden = self.hidden(ids).bfloat16()
        mean, each = UnembeddingLoss.apply(hidden.flatten(0, 1), self.wte.weight, targets.flatten())
        return mean, each.view_as(targets)


def hugging_face_weights(model: GPT2) -> dict[str, Tensor]:
    """The state dict of an equal GPT2LMHeadModel, which stores the blocks' matrices transposed."""
    weights = {}
    for name, weight in model.state_dict().items():
        transposed = name.startswith("h.") and weight.dim() == 2
        weights[f"transformer.{name}"] = (weight.T if transposed else weight).contiguous()
    return weights
