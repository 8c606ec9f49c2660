"""The sparse training step: what `trainer.Trainer` computes, for active features alone.

Only active pairs of feature and token have an activation or a gradient, and there are few of them. What is left of the
dense step is the encoder product that finds them: a bfloat16 product names candidates and misses none (`screening`),
and full precision decides about them. Where the hardware has none, or many features are active, the whole product is
computed in full precision. The rest are sums over pairs:

    error = y - z W_dec - b_dec        r = dL/d(output) = -2 error        dL/dz = r W_dec^T + cost
    dW_dec = z^T r                     dW_enc = x^T dL/dz                 db_enc = sum of dL/dz

`Trainer` stays the definition: gradients are equal up to the order of sums, and while many features are active it does
the work itself. Adam is dense in both: a feature without a gradient still moves by its momentum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tclib.training import distributed
from tclib.training.architectures import batch_threshold
from tclib.training.config import TrainConfig
from tclib.training.fast.pairs import Pairs
from tclib.training.fast.screening import CHUNK, Screen, bfloat16_hardware, exact
from tclib.training.trainer import Trainer, lengths
from tclib.transcoder import Transcoder

SAMPLE = 64  # tokens from which BatchTopK's threshold is guessed


def make_trainer(layer: int, x: Tensor, y: Tensor, config: TrainConfig, n_writes: int | None = None) -> Trainer:
    """The sparse trainer for large transcoders where it is exact and was measured: on processors, in full precision."""
    full = x.dtype in (torch.float32, torch.float64) and not config.bfloat16
    sparse = config.d_features >= config.sparse_from and full and x.device.type == "cpu"
    return (SparseTrainer if sparse else Trainer)(layer, x, y, config, n_writes)


@dataclass(frozen=True)
class Found:
    """The pairs that take part in a step: the active ones, with values ``pairs.z``, and JumpReLU's in the window."""

    pairs: Pairs
    pre: Float[Tensor, " pair"]
    threshold: Float[Tensor, " pair"]
    written: Float[Tensor, "token width"]  # by all features, to everything that they write to, side by side


class SparseTrainer(Trainer):
    """A `Trainer` that computes active features alone while few are active (`TrainConfig.sparse_below`)."""

    def __init__(self, layer: int, x: Tensor, y: Tensor, config: TrainConfig, n_writes: int | None = None):
        super().__init__(layer, x, y, config, n_writes)
        W_enc = self.transcoder.W_enc
        W_enc.data = W_enc.data.T.contiguous().T  # a feature's weights side by side
        expected = config.k or config.start_l0 or config.d_features
        self.density = torch.tensor(expected / config.d_features, dtype=torch.float64)  # of the step before

    @cached_property
    def screen(self) -> Screen:
        return Screen(*self.transcoder.W_enc.T.shape)

    def gradients(self, x: Tensor, y: Tensor, sparsity_scale: float = 1.0) -> tuple[tuple[Tensor, ...], Tensor | Pairs]:
        """As `Trainer.gradients`; a sparse step gives the activations as pairs, with values ``z``."""
        if self.skips():
            with torch.no_grad():
                found = self.forward(x)
                error = found.written.neg_().add_(y).sub_(self.transcoder.b_dec)
                if self.transcoder.W_skip is not None:
                    error -= x @ self.transcoder.W_skip
                squared = error.flatten().dot(error.flatten())
                paid, count = self.backward(found, x, error, sparsity_scale)
            sums, z = (squared + paid, squared, count), found.pairs
        else:
            sums, z = super().gradients(x, y, sparsity_scale)
        self.visited(z if isinstance(z, Pairs) else sums[2], len(x))
        return sums, z

    def skips(self) -> bool:
        """Whether so few features were active in the step before that the others are skipped in this one."""
        return bool(self.density < self.config.sparse_below)

    def visited(self, where: Pairs | Tensor, tokens: int) -> None:
        """Remember which share of pairs a step has visited: how the next one is done depends on it."""
        count = torch.tensor(len(where), dtype=torch.float64) if isinstance(where, Pairs) else where.double()
        self.density = distributed.total(count) / (tokens * distributed.world() * self.config.d_features)

    def forward(self, x: Float[Tensor, "token d_in"]) -> Found:
        """The pairs that take part, and what their features write."""
        t, c = self.transcoder, self.config
        pairs, pre = self.find(x, bool(self.density < c.screen_below))
        threshold = torch.zeros_like(pre)
        if t.threshold is not None and c.activation == "jumprelu":
            threshold = t.threshold[pairs.feature]
        pairs.z = pre * (pre > threshold)
        return Found(pairs, pre, threshold, pairs.token_sums(pairs.z, t.W_dec.flatten(1)))

    def find(self, x: Float[Tensor, "token d_in"], screened: bool) -> tuple[Pairs, Float[Tensor, " pair"]]:
        """The active pairs, and JumpReLU's in the window, with their pre-activations."""
        t, c = self.transcoder, self.config
        if c.activation == "relu":
            return self._above(x, screened, torch.zeros_like(t.b_enc))
        if c.activation == "jumprelu":
            assert t.threshold is not None
            return self._above(x, screened, t.threshold - c.bandwidth / 2)
        assert c.k is not None
        if c.activation == "topk":
            pairs, pre = self._above(x, screened, torch.zeros_like(t.b_enc), c.k)
            return _kept(pairs, pre, pairs.largest(pre, c.k))
        if c.activation != "batchtopk":
            assert_never(c.activation)
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

    def backward(
        self, found: Found, x: Tensor, error: Float[Tensor, "token width"], sparsity_scale: float
    ) -> tuple[Tensor, ...]:
        """Fill ``grad``, given the errors of all that the features write to, side by side.

        Returns:
            What was charged beyond those errors, and active features, each summed over this process's tokens.
        """
        t, c, share = self.transcoder, self.config, 1 / (len(x) * distributed.world())
        pre, threshold, active = found.pre, found.threshold, found.pre > found.threshold
        W_dec, own = t.W_dec.flatten(1), error[:, : len(t.b_dec)]
        if t.W_skip is not None:
            _grad(t.W_skip).copy_(-2 * share * (x.T @ own))
        r = -2 * share * error
        _grad(t.b_dec).copy_(r[:, : len(t.b_dec)].sum(0))
        count = active.sum().to(error)
        loss = torch.zeros_like(count)

        pairs, z = found.pairs, found.pairs.z
        if c.activation.endswith("topk") and c.aux and self.dead().any():
            pairs, z, x, r, missed = self._with_dead(pairs, x, r, error)
            loss += missed
        dz = pairs.dots(W_dec, r)  # dL/dz
        if t.threshold is not None and c.activation == "jumprelu":
            window = (pre - threshold).abs() < c.bandwidth / 2
            through = (threshold * dz + share * sparsity_scale * c.l0_coefficient) * window / -c.bandwidth
            _grad(t.threshold).zero_().index_add_(0, pairs.feature, through)
            loss += sparsity_scale * c.l0_coefficient * count
        if c.activation == "relu":
            cost = sparsity_scale * c.l1_coefficient * (torch.ones_like(t.b_enc) if c.unit_norm else lengths(t))
            loss += (cost[pairs.feature] * z).sum()
            dz += share * cost[pairs.feature]
        dz *= z > 0
        pairs.feature_sums(z, r, _grad(t.W_dec).flatten(1))
        pairs.feature_sums(dz, x, _grad(t.W_enc).T)
        _grad(t.b_enc).zero_().index_add_(0, pairs.feature, dz)
        if c.activation == "relu" and not c.unit_norm:  # the cost grows with the length of the row
            paid = torch.zeros_like(t.b_enc).index_add_(0, pairs.feature, z) * cost
            _grad(t.W_dec).flatten(1).addcmul_(W_dec, (share * paid / W_dec.pow(2).sum(1))[:, None])
        for p in self.adam.param_groups[0]["params"]:
            distributed.total(p.grad)
        return loss, count

    def _with_dead(self, pairs: Pairs, x: Tensor, r: Tensor, error: Tensor) -> tuple[Pairs, *tuple[Tensor, ...]]:
        """Aux-k: dead features see each token a second time, with what was missed there as their target."""
        t, c, n, dead = self.transcoder, self.config, len(x), self.dead().nonzero().squeeze(1)
        k = min(len(dead), error.shape[1] // 2)
        W, b = t.W_enc[:, dead], t.b_enc[dead]
        parts = [(part @ W + b).relu().topk(k, sorted=False) for part in x.split(CHUNK)]
        value, index = (torch.cat(column) for column in zip(*parts, strict=True))
        feature = dead[index]
        rows = t.W_dec.detach().flatten(1)
        missed = error - F.embedding_bag(feature, rows, mode="sum", per_sample_weights=value)
        token, place = (value > 0).nonzero(as_tuple=True)
        feature, value = feature[token, place], value[token, place]
        key, order = torch.cat([pairs.feature * 2 * n + pairs.token, feature * 2 * n + n + token]).sort()
        both = Pairs.of(key, c.d_features, 2 * n), torch.cat([pairs.z, value])[order]
        again = -2 * c.aux / (n * distributed.world()) * missed
        return *both, torch.cat([x, x]), torch.cat([r, again]), c.aux * missed.pow(2).sum()

    def update(self) -> None:
        W = self.transcoder.W_enc
        _turn(W)  # Adam is five times as slow on a matrix that does not lie in memory row by row
        super().update()
        _turn(W)

    def fired(self, z: Tensor | Pairs) -> Bool[Tensor, " d_features"]:
        if isinstance(z, Tensor):
            return super().fired(z)
        return torch.zeros_like(self.silent, dtype=torch.bool).index_fill(0, z.feature[z.z > 0], True)

    def smallest(self, z: Tensor | Pairs, tokens: int) -> Tensor:
        return super().smallest(z if isinstance(z, Tensor) else z.z, tokens)

    def finished(self, later: Sequence[Tensor] = ()) -> Transcoder:
        t = super().finished(later)
        t.W_enc.data = t.W_enc.data.contiguous()
        return t

    def state(self) -> dict[str, Tensor]:
        return _turned(super().state()) | {"density": self.density}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        super().restore(_turned(tensors))
        self.density = tensors.get("density", self.density)  # a run may begin on a GPU, by the plain step


def _kept(pairs: Pairs, pre: Tensor, which: Tensor) -> tuple[Pairs, Tensor]:
    return pairs.kept(which), pre[which]


def _grad(p: Tensor) -> Tensor:
    """The gradient's memory, laid out as the parameter; it is written anew in each step."""
    if p.grad is None:
        p.grad = torch.empty_like(p)
    return p.grad


def _turn(p: Tensor) -> None:
    """Transpose a parameter and its gradient where they are."""
    grad, p.grad = _grad(p), None
    p.data = p.data.T
    p.grad = grad.T


def _turned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoints hold Adam's moments as the plain step has them."""
    return {k: v.T.contiguous() if k.startswith("adam.W_enc.exp") else v for k, v in tensors.items()}
