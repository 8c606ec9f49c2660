"""Pairs of a feature and a token: the few places where activations and gradients are not zero, and sums over them."""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

BLOCK = 1024  # features whose sums are made at once, so that they stay in the processor's cache

with warnings.catch_warnings():  # torch says once that CSR is in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.zeros(2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0))


class Pairs:
    """Pairs ordered by feature, then token: weights are larger than batches, so theirs are the rows read in order."""

    z: Float[Tensor, " pair"]  # activations, where somebody has set them

    def __init__(self, feature: Int[Tensor, " pair"], token: Int[Tensor, " pair"], features: int, tokens: int):
        self.feature, self.token, self.shape = feature, token, (features, tokens)
        self.start = _starts(feature, features)

    @classmethod
    def of(cls, key: Int[Tensor, " pair"], features: int, tokens: int) -> Pairs:
        """From ascending ``feature * tokens + token``."""
        return cls(key // tokens, key % tokens, features, tokens)

    def __len__(self) -> int:
        return len(self.token)

    def kept(self, which: Bool[Tensor, " pair"]) -> Pairs:
        """Only some of them."""
        return Pairs(self.feature[which], self.token[which], *self.shape)

    def dots(self, by_feature: Float[Tensor, "d_features d"], by_token: Float[Tensor, "token d"]) -> Tensor:
        """The inner product of each pair's two rows."""
        zeros = by_token.new_zeros(len(self))
        where = torch.sparse_csr_tensor(self.start, self.token, zeros, self.shape, check_invariants=False)
        return torch.sparse.sampled_addmm(where, by_feature, by_token.T, beta=0).values()

    def token_sums(
        self, weight: Float[Tensor, " pair"], rows: Float[Tensor, "d_features d"]
    ) -> Float[Tensor, "token d"]:
        """For each token, the weighted sum of its features' rows."""
        order = torch.argsort(self.token, stable=True)
        return _sums(self.feature[order], rows, _starts(self.token, self.shape[1]), weight[order])

    def feature_sums(
        self, weight: Float[Tensor, " pair"], rows: Float[Tensor, "token d"], out: Float[Tensor, "d_features d"]
    ) -> None:
        """For each feature, the weighted sum of its tokens' rows, into ``out``."""
        for first in range(0, self.shape[0], BLOCK):
            start = self.start[first : first + BLOCK + 1]
            here = slice(int(start[0]), int(start[-1]))
            out[first : first + BLOCK] = _sums(self.token[here], rows, start - start[0], weight[here])

    def largest(self, value: Float[Tensor, " pair"], k: int) -> Bool[Tensor, " pair"]:
        """Which are among the k largest values of their token; of equal values, the first."""
        order = torch.argsort(self.token, stable=True).numpy()
        token, start = self.token.numpy()[order], _starts(self.token, self.shape[1]).numpy()
        place = np.arange(len(order)) - start[token]
        table = np.full((self.shape[1], max(k, place.max(initial=0) + 1)), -np.inf, dtype=value.numpy().dtype)
        table[token, place] = value.numpy()[order]
        kth = np.partition(table, -k, axis=1)[:, -k, None]
        chosen, equal = table > kth, table == kth
        chosen |= equal & (equal.cumsum(1) <= k - chosen.sum(1, keepdims=True))
        which = np.empty(len(order), dtype=bool)
        which[order] = chosen[token, place]
        return torch.from_numpy(which)


def _starts(index: Int[Tensor, " pair"], count: int) -> Int[Tensor, " count_and_one"]:
    return F.pad(torch.bincount(index, minlength=count).cumsum(0), (1, 0))


def _sums(index: Tensor, rows: Tensor, start: Tensor, weight: Tensor) -> Tensor:
    rows = rows.detach()  # a parameter's sums would also prepare their gradients
    return F.embedding_bag(index, rows, start, mode="sum", per_sample_weights=weight, include_last_offset=True)
