"""The pairs of feature and token that take part in a sparse step.

A bfloat16 product names candidates and misses none (`screening`); full precision decides about them. Where the
hardware has none, or many features are active, the whole product is computed in full precision.
"""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from tclib.training import distributed
from tclib.training.architectures import batch_threshold
from tclib.training.config import TrainConfig
from tclib.training.fast.pairs import Pairs
from tclib.training.fast.screening import Screen, bfloat16_hardware, exact
from tclib.transcoder import Transcoder

SAMPLE = 64  # tokens from which BatchTopK's threshold is guessed


class Active:
    """Finds the pairs that take part, with their pre-activations: the active ones, and JumpReLU's in the window."""

    def __init__(self, transcoder: Transcoder, config: TrainConfig):
        self.transcoder, self.config = transcoder, config

    @cached_property
    def screen(self) -> Screen:
        return Screen(*self.transcoder.W_enc.T.shape)

    def __call__(self, x: Float[Tensor, "token d_in"], screened: bool) -> tuple[Pairs, Float[Tensor, " pair"]]:
        t, c = self.transcoder, self.config
        if c.activation == "relu":
            return self._above(x, screened, torch.zeros_like(t.b_enc))
        if t.threshold is not None and c.activation == "jumprelu":
            return self._above(x, screened, t.threshold - c.bandwidth / 2)
        assert c.k is not None
        if c.activation == "topk":
            pairs, pre = self._above(x, screened, torch.zeros_like(t.b_enc), c.k)
            return _kept(pairs, pre, pairs.largest(pre, c.k))
        some = t.pre_activations(x[:: max(1, len(x) // SAMPLE)]).flatten()
        wanted, rank = c.k * len(x) * distributed.world(), 1.5 * some.numel() * c.k / c.d_features
        while True:  # until as many are above the guess as are wanted
            guess = some.kthvalue(max(1, len(some) - int(rank))).values.clamp(min=0) * (rank < len(some))
            guess = distributed.gathered(guess[None]).max()
            pairs, pre = self._above(x, screened, guess.expand_as(t.b_enc))
            if guess == 0 or distributed.total(torch.tensor(len(pairs))) >= wanted:
                return _kept(pairs, pre, pre >= batch_threshold(pre, c.k, len(x)))
            rank *= 2

    def _above(
        self, x: Tensor, screened: bool, floor: Float[Tensor, " d_features"], k: int | None = None
    ) -> tuple[Pairs, Tensor]:
        """Pairs with a pre-activation above the floor; with k, not all below their token's k-th largest."""
        W, b = self.transcoder.W_enc.T, self.transcoder.b_enc
        if screened and bfloat16_hardware():
            pairs = Pairs.of(self.screen(x, W, b, floor, k).sort().values, len(W), len(x))
            pre = pairs.dots(W, x) + b[pairs.feature]
        else:
            key, pre = exact(x, W, b, floor, k)
            key, order = key.sort()
            pairs, pre = Pairs.of(key, len(W), len(x)), pre[order]
        return _kept(pairs, pre, pre > floor[pairs.feature])


def _kept(pairs: Pairs, pre: Tensor, which: Tensor) -> tuple[Pairs, Tensor]:
    return pairs.kept(which), pre[which]
