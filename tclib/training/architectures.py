"""Activation and sparsity penalty of each architecture in training. At inference `Transcoder.activate` is enough."""

from __future__ import annotations

from typing import assert_never

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from tclib.training import distributed
from tclib.training.config import TrainConfig
from tclib.transcoder import Transcoder

Pre = Float[Tensor, "token d_features"]


def activate(transcoder: Transcoder, pre: Pre, config: TrainConfig) -> Pre:
    """Activations z with the gradients that training needs.

    ReLU and TopK (Gao et al. 2024) are as at inference. BatchTopK (Bussmann et al. 2024) keeps the ``k * tokens``
    largest activations of the batch of all processes. JumpReLU (Rajamanoharan et al. 2024, equations 11 and 12) gives
    its thresholds a straight-through gradient inside a window.
    """
    if config.activation == "jumprelu":
        return _Jump.apply(pre, transcoder.threshold, config.bandwidth)
    if config.activation == "batchtopk":
        z = torch.relu(pre)
        assert config.k is not None
        return z * (z >= batch_threshold(z.detach(), config.k, len(z)))
    return transcoder.activate(pre)


def batch_threshold(z: Tensor, k: int, tokens: int) -> Float[Tensor, ""]:
    """The smallest activation that BatchTopK keeps: the ``k * tokens``-th largest, with tokens of all processes.

    ``z`` are this process's activations: of all features, or of those that may be kept.
    """
    count = k * tokens * distributed.world()
    mine = z.flatten().topk(min(count, z.numel()), sorted=False).values
    largest = distributed.gathered(torch.nn.functional.pad(mine, (0, count - len(mine))))
    # Never 0: the tokens of a dead batch must not switch everything on.
    return largest.kthvalue(len(largest) - count + 1).values.clamp(min=torch.finfo(z.dtype).tiny)


def penalty(z: Pre, pre: Pre, transcoder: Transcoder, config: TrainConfig) -> Float[Tensor, ""]:
    """What the architecture charges, summed over tokens: a coefficient times ``||z||_1`` or ``||z||_0``, or nothing."""
    exact = transcoder.W_dec.dtype  # autocast sums in half precision otherwise
    if config.activation == "relu":
        return config.l1_coefficient * z.sum(dtype=exact)
    if config.activation == "jumprelu":
        return config.l0_coefficient * _Count.apply(pre, transcoder.threshold, config.bandwidth).sum(dtype=exact)
    if config.activation in ("topk", "batchtopk"):
        return z.new_zeros((), dtype=exact)
    assert_never(config.activation)


def auxiliary(
    transcoder: Transcoder,
    pre: Pre,
    error: Float[Tensor, "token width"],
    dead: Float[Tensor, " d_features"],
) -> Float[Tensor, ""]:
    """AuxK (Gao et al. 2024, appendix A.2): squared error of explaining ``error`` with dead features alone.

    The ``width / 2`` strongest dead features of each token take part; ``error`` is the true residual, without
    gradient, of everything that they write to: of one MLP, or of several side by side. Summed over tokens.
    """
    k = min(int(dead.sum()), error.shape[1] // 2)
    values, index = torch.relu(pre).masked_fill(~dead, 0).topk(k, dim=-1, sorted=False)
    z = torch.zeros_like(pre).scatter(-1, index, values)
    return (error - (z @ transcoder.W_dec.flatten(1)).to(error.dtype)).pow(2).sum()


class _Jump(Function):
    """``pre`` where it is above the threshold, else 0; the threshold's gradient is estimated in a window around it."""

    @staticmethod
    def forward(ctx, pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, grad: Tensor):
        pre, threshold = ctx.saved_tensors
        window = (pre - threshold).abs() < ctx.width / 2
        return grad * (pre > threshold), (-threshold / ctx.width * (grad * window)).sum(0), None


class _Count(Function):
    """1 where ``pre`` is above the threshold, with the same window for the threshold's gradient."""

    @staticmethod
    def forward(ctx, pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        pre, threshold = ctx.saved_tensors
        window = (pre - threshold).abs() < ctx.width / 2
        return None, -(grad * window).sum(0) / ctx.width, None
