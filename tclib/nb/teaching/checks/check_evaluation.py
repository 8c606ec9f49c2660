"""Checks of notebooks 02 and 02b: evaluating a transcoder, and comparing it with its rivals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tclib.nb.teaching.verdict import call, judge, numbers, random

Chunks = Iterator[tuple[Tensor, Tensor]]


def fvu_in_pieces(answer: Callable[[Chunks], float]) -> None:
    """Exercise 02.3, FVU from chunks ``(y, imitation)`` seen once. Expected: two passes over all tokens at once."""
    generator = torch.Generator().manual_seed(0)
    chunks = []
    for size, mean in ((8, 0.0), (20, 3.0), (5, -2.0)):
        y = mean + torch.randn(size, 4, generator=generator, dtype=torch.float64)
        chunks.append((y, y + 0.5 * torch.randn(y.shape, generator=generator, dtype=torch.float64)))
    tried = "three chunks of 8, 20 and 5 tokens with different means"
    y, imitation = (torch.cat(part) for part in zip(*chunks, strict=True))
    error = float((y - imitation).square().sum())
    within = [float((c - c.mean(0)).square().sum()) for c, _ in chunks]
    errors = [float((c - d).square().sum()) for c, d in chunks]
    expected = error / float((y - y.mean(0)).square().sum())
    mistakes = {
        "a mean of the chunks' FVUs: a ratio of sums is not a mean of ratios": np.mean(np.divide(errors, within)),
        "each chunk's own mean was subtracted; the mean is that of all tokens": error / sum(within),
        "the mean was not subtracted from y": error / float(y.square().sum()),
        "one mean for all coordinates: the mean output is a vector": error / float((y - y.mean()).square().sum()),
        "that is 1 - FVU, the fraction explained": 1 - expected,
    }
    cause = "keep four sums: tokens, y, |y|^2 and squared errors"
    judge(tried, call(answer, tried, iter(chunks)), expected, mistakes, cause)


def recovered_from_mean(answer: Callable[[float, float, float, float], float]) -> None:
    """Exercise 02.1, recovered of mean ablation from ``ce, ce_zero, ce_mean`` and recovered of zero ablation.

    Expected: the cross-entropy that gives the second, found by bisection, put into the definition of the first.
    """
    ce, ce_zero, ce_mean, recovered = numbers = 2.0, 9.0, 4.0, 0.9
    tried = "cross-entropy 2 (whole), 9 (zero), 4 (mean), recovered of zero 0.9"
    low, high = ce, ce_zero
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (ce_zero - middle) / (ce_zero - ce) > recovered else (low, middle)
    expected = (ce_mean - low) / (ce_mean - ce)
    mistakes = {
        "the same fraction came back, but another baseline gives another fraction": recovered,
        "the fraction was stretched; what stays is the loss in nats": recovered * (ce_zero - ce) / (ce_mean - ce),
        "that is the loss in nats; it still has to be put on the scale": (1 - recovered) * (ce_zero - ce),
        "that is the lost fraction: the recovered one is 1 minus it": 1 - expected,
        "the two scales are exchanged": 1 - (1 - recovered) * (ce_mean - ce) / (ce_zero - ce),
    }
    judge(tried, call(answer, tried, *numbers), expected, mistakes, "first find the cross-entropy with the transcoder")


def paired_interval(answer: Callable[[np.ndarray, np.ndarray], Sequence[float]]) -> None:
    """Exercise 02.2, the 95% interval of the mean of ``a - b`` over paired replicates.

    Expected: the differences sorted by hand, read at ranks 2.5% and 97.5%.
    """
    draw = np.random.default_rng(0)
    shared = draw.normal(0, 1.0, 401)
    a, b = 2 + shared + draw.normal(0, 0.1, 401), 1.5 + shared + draw.normal(0, 0.1, 401)
    tried = "401 replicates of two losses that rise and fall together"
    ordered = sorted((a - b).tolist())
    expected = [ordered[10], ordered[390]]  # ranks 0.025 * 400 and 0.975 * 400
    low, high = (np.quantile([a, b], q, axis=1) for q in (0.025, 0.975))
    mistakes = {
        "two separate intervals were subtracted: replicate by replicate, what they share cancels": [
            low[0] - high[1],
            high[0] - low[1],
        ],
        "the ends of two separate intervals were subtracted": [low[0] - low[1], high[0] - high[1]],
        "the sign: a minus b": [-ordered[390], -ordered[10]],
        "that leaves out 5% on each side: an interval of 90%": np.quantile(a - b, [0.05, 0.95]),
        "the order: first the lower end": expected[::-1],
    }
    cause = "the difference first, for each replicate, then its quantiles"
    judge(tried, call(answer, tried, a, b), expected, mistakes, cause)


def auroc(answer: Callable[[Tensor, Tensor], float]) -> None:
    """Exercise 02b.3, how often a token with the label outranks one without, from ``z, on``. Expected: all pairs."""
    z = torch.tensor([0.0, 0.0, 1.5, 3.0, 2.0, 0.0, 0.0, 0.5, 2.0, 0.0])
    on = torch.tensor([True, True, True, True, True, False, False, False, False, False])
    tried = "10 tokens, 5 of them with the label, and a feature that is silent on half of them"
    pairs = [(a, b) for a in z[on].tolist() for b in z[~on].tolist()]
    wins, ties = sum(a > b for a, b in pairs) / len(pairs), sum(a == b for a, b in pairs) / len(pairs)
    firing = [(a, b) for a, b in pairs if a > 0 and b > 0]
    mistakes = {
        "ties count for nothing: two silent tokens should count for half a win": wins,
        "ties count as wins: two silent tokens should count for half a win": wins + ties,
        "the sides are exchanged: how often does the token *with* the label rank higher?": 1 - wins - ties / 2,
        "silent tokens were left out, but they are ranked as well": np.mean(
            [(a > b) + (a == b) / 2 for a, b in firing]
        ),
        "that is the accuracy of 'it fires', one threshold of many": float(((z > 0) == on).float().mean()),
    }
    cause = "compare every token with the label with every token without it"
    judge(tried, call(answer, tried, z, on), wins + ties / 2, mistakes, cause)


def read_front(answer: Callable[[np.ndarray, np.ndarray, float], float]) -> None:
    """Exercise 02b.1, a front read at one L0, from ``l0, lost, at``. Expected: a line in log L0, and nothing beyond.

    Two reads in one: inside the front and past its end.
    """
    l0, lost = np.array([8.0, 24.0, 72.0]), np.array([0.5, 0.2, 0.1])
    tried = "a front at L0 8, 24 and 72, read at 16 and at 100"
    share = math.log(16 / 8) / math.log(24 / 8)
    inside = 0.5 + share * (0.2 - 0.5)
    got = [call(answer, tried, l0, lost, at) for at in (16.0, 100.0)]
    if any(value is None for value in got):
        judge(tried, None, inside, {}, "")
    beyond = float(numbers(got[1]))
    shown = [float(numbers(got[0])), beyond if math.isfinite(beyond) else -1.0]  # -1: nothing is said
    continued = 0.1 + (math.log(100 / 72) / math.log(72 / 24)) * (0.1 - 0.2)
    mistakes = {
        "beyond its last point the front says nothing: return np.nan there": [inside, 0.1],
        "beyond its last point the line was continued, but nobody measured there": [inside, continued],
        "the axis of L0 is logarithmic: interpolate in log L0": [0.5 + 0.5 * (0.2 - 0.5), -1.0],
        "the loss is not taken in logarithms, only L0 is": [
            math.exp(math.log(0.5) + share * math.log(0.2 / 0.5)),
            -1.0,
        ],
        "that is the nearest point, not a value between two": [0.2, -1.0],
    }
    cause = "a straight line between the two nearest points, with log L0 as the axis; np.nan outside (shown here as -1)"
    judge(tried, shown, [inside, -1.0], mistakes, cause)


def top_neurons(answer: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> None:
    """Exercise 02b.2, all but k neurons held at their mean, from ``a, mean, W_out, k``. Expected: sorted one by one."""
    a, W_out = random((5, 8), (8, 3))
    mean, k = torch.linspace(-1, 2, 8, dtype=torch.float64), 3
    W_out = W_out * torch.linspace(0.3, 3, 8, dtype=torch.float64)[:, None]
    tried = "5 tokens of 8 neurons, k = 3"

    def held(importance: Tensor, rest: Tensor = mean) -> Tensor:
        result = rest.expand_as(a).clone()
        for token, sizes in enumerate(importance.tolist()):
            for neuron in sorted(range(len(sizes)), key=lambda i: -sizes[i])[:k]:
                result[token, neuron] = a[token, neuron]
        return result

    lengths = W_out.norm(dim=1)
    strength = (a - mean).abs() * lengths
    mistakes = {
        "what a neuron writes has a length: weigh by the norms of W_out": held((a - mean).abs()),
        "a neuron that always writes the same is no news: subtract the mean before ranking": held(a.abs() * lengths),
        "the sign: a neuron far below its mean matters as well": held((a - mean) * lengths),
        "the others are held at their mean, not at zero": held(strength, torch.zeros_like(mean)),
        "k neurons for each token, not the same k for all": held(strength.mean(0).expand_as(a)),
    }
    judge(
        tried,
        call(answer, tried, a, mean, W_out, k),
        held(strength),
        mistakes,
        "keep the k most important, hold the rest",
    )
