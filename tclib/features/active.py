"""Which features are active at which tokens, without a matrix of everything that outlives one chunk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float16, Int32
from torch import Tensor

from tclib.training.fast.pairs import Pairs
from tclib.training.fast.screening import CHUNK, Screen, bfloat16_hardware
from tclib.transcoder import Transcoder

LARGEST = float(np.finfo(np.float16).max)
SCREENED_FROM = 2**22  # encoder weights; below, the plain product costs next to nothing
FIXED = ("relu", "batchtopk", "jumprelu")  # each feature fires above a threshold of its own, whatever others do


@dataclass(frozen=True)
class ActivePairs:
    """Active pairs. Those of one feature stand in the order of their tokens."""

    tokens: Int32[np.ndarray, " pair"]
    features: Int32[np.ndarray, " pair"]
    values: Float16[np.ndarray, " pair"]


class ActiveFinder:
    """Finds all z > 0 of a batch.

    Large encoders are screened on processors that have bfloat16: a product that misses no active pair, and the few
    candidates again in full precision (`training.fast.screening`). Which way is taken depends on the transcoder and
    the processor alone.
    """

    def __init__(self, transcoder: Transcoder):
        self.transcoder, self.screen = transcoder, None
        W = transcoder.W_enc
        plain = W.device.type != "cpu" or W.dtype != torch.float32 or W.numel() < SCREENED_FROM
        if transcoder.config.activation in FIXED and not plain and bfloat16_hardware():
            self.rows = W.detach().T.contiguous()  # a feature's weights side by side
            self.screen = _FixedScreen(*self.rows.shape)

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "token d_in"]) -> ActivePairs:
        """The active pairs of a batch of inputs.

        Raises:
            ValueError: an activation that float16 cannot hold.
        """
        tokens, features, values = (self._screened if self.screen and len(x) else self._plain)(x)
        if len(values) and not values.max() <= LARGEST:
            raise ValueError(f"an activation of {values.max():.3g} does not fit float16, which ends at {LARGEST:.0f}")
        return ActivePairs(tokens.astype(np.int32), features.astype(np.int32), values.astype(np.float16))

    def _screened(self, x: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        t = self.transcoder
        floor = torch.zeros_like(t.b_enc) if t.threshold is None else t.threshold.clamp(min=0)
        assert self.screen is not None
        found = Pairs.of(self.screen(x, self.rows, t.b_enc, floor).sort().values, len(self.rows), len(x))
        values = found.dots(self.rows, x) + t.b_enc[found.feature]
        above = values > floor[found.feature]
        return found.token[above].numpy(), found.feature[above].numpy(), values[above].numpy()

    def _plain(self, x: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens, features, values = [np.empty(0, int)], [np.empty(0, int)], [np.empty(0)]
        for start in range(0, len(x), CHUNK):
            z = self.transcoder.encode(x[start : start + CHUNK]).float().cpu().numpy()
            index = np.flatnonzero(z > 0)
            token, feature = np.divmod(index, z.shape[1])
            tokens.append(token + start)
            features.append(feature)
            values.append(z.ravel()[index])
        return np.concatenate(tokens), np.concatenate(features), np.concatenate(values)


class _FixedScreen(Screen):
    """Weights that do not change are loaded once."""

    loaded = None

    def load(self, weights: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        if self.loaded is None:
            self.loaded = super().load(weights, bias)
        return self.loaded
