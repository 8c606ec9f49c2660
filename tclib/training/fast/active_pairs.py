"""The pairs of feature and token that take part in a sparse step.

An int8 or bfloat16 product names candidates and misses none (`integers`, `screening`); full precision decides about
them. Where the hardware has neither, or many features are active, the whole product is computed in full precision.
"""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tclib.training import distributed
from tclib.training.architectures import batch_threshold
from tclib.training.config import TrainConfig
from tclib.training.fast.int8 import IntegerScreen, int8_hardware
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

    @cached_property
    def integers(self) -> IntegerScreen:
        return IntegerScreen()

    def __call__(self, x: Float[Tensor, "token d_in"], screened: bool) -> tuple[Pairs, Float[Tensor, " pair"]]:
        t, c = self.transcoder, self.config
        if c.activation == "relu":
            return self._above(x, screened, torch.zeros_like(t.b_enc))
        if c.activation == "jumprelu":
            return self._above(x, screened, t.threshold - c.bandwidth / 2)
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
        found = self._screened(x, floor, k) if screened else None
        if found is None:
            key, pre = exact(x, W, b, floor, k)
            key, order = key.sort()
            pairs, pre = Pairs.of(key, len(W), len(x)), pre[order]
        else:
            key, level = found
            pairs, pre = self._scored(key, x)
            short = (torch.bincount(pairs.token[pre >= level[pairs.token]], minlength=len(x)) < (k or 0)) & (level > 0)
            if short.any():  # the guessed levels were too high
                pairs, pre = self._scored(self._completed(pairs, short, x, k), x)
        return _kept(pairs, pre, pre > floor[pairs.feature])

    def _screened(self, x: Tensor, floor: Tensor, k: int | None) -> tuple[Tensor, Tensor] | None:
        """Candidates and the levels down to which they are complete, from the fastest product that this processor has
        and whose bound is tight; None if there is none."""
        W, b = self.transcoder.W_enc.T, self.transcoder.b_enc
        found = self.integers(x, W, b, floor, k) if int8_hardware() else None
        if found is None and bfloat16_hardware():
            found = self.screen(x, W, b, floor, k), torch.zeros_like(x[:, 0])
        return found

    def _scored(self, key: Tensor, x: Tensor) -> tuple[Pairs, Tensor]:
        W, b = self.transcoder.W_enc.T, self.transcoder.b_enc
        pairs = Pairs.of(key.sort().values, len(W), len(x))
        return pairs, pairs.dots(W, x) + b[pairs.feature]

    def _completed(self, pairs: Pairs, short: Bool[Tensor, " token"], x: Tensor, k: int) -> Int[Tensor, " pair"]:
        """The candidates, and for some tokens those of the exact product: few, so that its cost does not matter."""
        t, n, which = self.transcoder, len(x), short.nonzero().squeeze(1)
        key, _ = exact(x[which], t.W_enc.T, t.b_enc, torch.zeros_like(t.b_enc), k)
        key = key // len(which) * n + which[key % len(which)]
        return torch.cat([pairs.feature * n + pairs.token, key]).unique()


def _kept(pairs: Pairs, pre: Tensor, which: Tensor) -> tuple[Pairs, Tensor]:
    return pairs.kept(which), pre[which]
