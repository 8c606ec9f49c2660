"""Checks of notebook 03: reading features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tclib.nb.teaching.verdict import call, judge, random


def name_scores(answer: Callable[[Tensor, Tensor, int], Sequence[float]]) -> None:
    """Exercise 03.1, what a name promises, keeps and covers, from ``z, holds, k``.

    Expected: firing tokens sorted and counted one by one.
    """
    z = torch.tensor([9.0, 0.0, 7.0, 1.0, 2.0, 0.0, 3.0, 4.0, 8.0, 0.0, 0.5], dtype=torch.float64)
    holds = torch.tensor([True, False, True, False, False, True, True, False, True, True, True])
    tried = "11 tokens, of which 8 fire and at 7 the name holds, with k = 4"
    tokens = sorted(zip(z.tolist(), holds.tolist(), strict=True), reverse=True)
    firing = [on for value, on in tokens if value > 0]
    promised, kept = sum(firing[:4]) / 4, sum(firing[4:]) / len(firing[4:])
    covered = sum(firing) / int(holds.sum())
    every = sum(firing) / len(firing)
    silent = [on for _, on in tokens[4:]]
    mistakes = {
        "the order: promised, kept, covered": [kept, promised, covered],
        "the strongest k are not among the others: leave them out of the second number": [promised, every, covered],
        "silent tokens are no firings: the second number is about tokens with z > 0": [
            promised,
            sum(silent) / len(silent),
            covered,
        ],
        "the third is the share of the name's tokens, not of the feature's": [promised, kept, every],
        "the first k tokens are not the k strongest": [float(holds[:4].double().mean()), kept, covered],
        "activations were added up, but here every firing counts once": [
            promised,
            float((z * holds).sort(descending=True).values[4:].sum() / z.sort(descending=True).values[4:].sum()),
            covered,
        ],
    }
    cause = (
        "sort the firing tokens by activation: the first k, and the rest; then all of them against the name's tokens"
    )
    judge(tried, call(answer, tried, z, holds, 4), [promised, kept, covered], mistakes, cause)


def tokens_needed(answer: Callable[[float, float], int]) -> None:
    """Exercise 03.3, how many tokens show a feature at least once, from ``rate, chance``. Expected: token by token."""
    rate, chance = 0.002, 0.95
    tried = f"a feature that fires on {rate:.1%} of the tokens, to be seen with a chance of {chance:.0%}"
    expected, missed = 0, 1.0
    while 1 - missed < chance:
        expected, missed = expected + 1, missed * (1 - rate)
    mistakes = {
        "on average one firing in 1 / rate tokens, but more than a third of such texts have none": 1 / rate,
        "chances do not add up: the feature may fire twice in one text and not in another": chance / rate,
        "that is how long it stays unseen with a chance of 95%": math.ceil(math.log(chance) / math.log(1 - rate)),
        "the last token is missing: round up": expected - 1,
        "a number of tokens is whole: round up": math.log(1 - chance) / math.log(1 - rate),
    }
    cause = "all n tokens miss it with the chance (1 - rate)^n"
    judge(tried, call(answer, tried, rate, chance), expected, mistakes, cause, tolerance=1e-9)


def promoted(answer: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Exercise 03.2, which tokens a feature promotes, from ``f_dec, W_U``.

    Expected: the change of the log-probabilities if a little of ``f_dec`` is added to a stream that favours no token.
    """
    f_dec, W_U = random((4,), (4, 7))
    W_U = W_U + f_dec[:, None]  # a part that raises all logits alike
    tried = "a little of f_dec added to a stream that favours no token, with 7 tokens"
    expected = ((1e-4 * f_dec) @ W_U).log_softmax(0) - torch.zeros(7, dtype=torch.float64).log_softmax(0)
    expected = expected / 1e-4
    effect = f_dec @ W_U
    mistakes = {
        "what raises all logits alike promotes nothing: subtract the mean over the vocabulary": effect,
        "the mean over the wrong axis: not over f_dec's coordinates": (f_dec - f_dec.mean()) @ W_U,
        "lengths matter to the logits: no cosines": torch.cosine_similarity(f_dec[:, None], W_U, dim=0),
        "the sign is lost: a feature suppresses, too": (effect - effect.mean()).abs(),
        "that is divided by the spread: a feature with small effects would look like one with large ones": (
            (effect - effect.mean()) / effect.std()
        ),
    }
    cause = "the direct effect on each logit, relative to that on all tokens"
    judge(tried, call(answer, tried, f_dec, W_U), expected, mistakes, cause, tolerance=1e-3)
