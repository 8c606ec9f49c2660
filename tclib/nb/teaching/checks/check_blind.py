"""Checks of notebook 05: blind case studies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tclib.blind import rules
from tclib.nb.teaching.verdict import accept, call, judge, random, reject


def moved_rule(answer: Callable[[np.ndarray, np.ndarray, int], float]) -> None:
    """Exercise 05.2, the precision of a rule moved along the text, from ``h, act, steps``. Expected: a loop."""
    draw = np.random.default_rng(2)
    h, act, steps = draw.random(60) < 0.3, np.maximum(draw.normal(0, 1, 60) - 0.5, 0), 7
    h[-5:] = True  # so that it matters what happens at the end of the text
    tried = f"a rule on 60 tokens, moved {steps} tokens to the right"
    places = [(i + steps) % 60 for i in range(60) if h[i]]
    expected = sum(act[i] > 0 for i in places) / len(places)
    moved, fires = np.roll(h, steps), act > 0
    cut = moved.copy()
    cut[:steps] = False
    mistakes = {
        "the rule was not moved, or the activations moved with it": (h & fires).sum() / h.sum(),
        "the wrong way: to the right, a hit at token t becomes one at t + steps": (np.roll(h, -steps) & fires).sum()
        / h.sum(),
        "hits that leave the end come in at the beginning, so that their number stays": (cut & fires).sum() / cut.sum(),
        "that is the recall: precision divides by the number of hits": (moved & fires).sum() / fires.sum(),
        "that is the share of tokens where rule and feature agree": (moved == fires).mean(),
    }
    cause = "move h alone, then count where it meets act > 0"
    judge(tried, call(answer, tried, h, act, steps), expected, mistakes, cause)


def keys_too(answer: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
    """Exercise 05.3, what keys add beyond values, from ``q, keys, values, other_keys, other_values``.

    Expected: both outputs with `math.exp`, number by number.
    """
    q, keys, values, other_keys, other_values = random((4,), (3, 4), (3, 2), (3, 4), (3, 2))
    tried = "a head of width 4 over 3 tokens"

    def output(keys: Tensor, values: Tensor) -> list[float]:
        weights = [math.exp(sum(a * b for a, b in zip(q.tolist(), key, strict=True)) / 2) for key in keys.tolist()]
        return [sum(w * v for w, v in zip(weights, column, strict=True)) / sum(weights) for column in values.T.tolist()]

    def hot(keys: Tensor, root: float = 2.0) -> Tensor:
        return (keys @ q / root).softmax(0)

    expected = [a - b for a, b in zip(output(other_keys, other_values), output(keys, other_values), strict=True)]
    mistakes = {
        "the scores are divided by the root of the head's width": (hot(other_keys, 1) - hot(keys, 1)) @ other_values,
        "with the old values: both sides of the difference have the other values": (hot(other_keys) - hot(keys))
        @ values,
        "that is what keys and values do together": hot(other_keys) @ other_values - hot(keys) @ values,
        "that is what the values do alone": hot(keys) @ (other_values - values),
        "the scores still have to pass the softmax": ((other_keys - keys) @ q / 2) @ other_values,
    }
    cause = "the pattern with the other keys minus the pattern with the old ones, both applied to the other values"
    judge(tried, call(answer, tried, q, keys, values, other_keys, other_values), expected, mistakes, cause)


def blind_rule(
    answer: Callable[[Any], rules.Rule | str],
    seals: Mapping[int, Any],
    words: rules.Words,
    activations: Float[np.ndarray, "row pos feature"],
) -> None:
    """Exercise 05.1, a player that turns a sealed feature into a rule, from a seal.

    Expected: for at least half of the features a correlation with the activation above that of 97.5% of 200 random
    moves of the rule along the text.
    """
    tried = f"your rule for each of {len(seals)} sealed features, on a text that nobody has seen"
    better, causes = 0, []
    for feature, seal in seals.items():
        hits = _hits(call(answer, tried, seal), words, tried)
        act = activations[..., feature][words.scored].astype(float)
        moves = np.random.default_rng(0).integers(1, len(act), 200)
        chance = float(np.quantile([_correlation(np.roll(hits, move), act) for move in moves], 0.975))
        if _correlation(hits, act) > chance:
            better += 1
        else:
            causes.append(_cause(hits, act, chance))
    if 2 * better >= len(seals):
        return accept(f"{tried}: better than chance")
    wanted = f"better than 97.5% of random moves for at least half of the {len(seals)}"
    reject(tried, wanted, f"better for {better}", max(causes, key=causes.count))


def _hits(rule: rules.Rule | str, words: rules.Words, tried: str) -> np.ndarray:
    try:
        return (rules.parse(rule) if isinstance(rule, str) else rule).hits(words)[words.scored]
    except (AttributeError, TypeError, ValueError):
        reject(tried, "a rule, or a line of text that is one", repr(rule)[:80], f"the grammar: {rules.GRAMMAR}")


def _cause(hits: np.ndarray, act: np.ndarray, chance: float) -> str:
    if not hits.any():
        return "the rule never holds: a token without its leading space is another token"
    if hits.all():
        return "a rule that always holds claims nothing"
    moved = {step: _correlation(np.roll(hits, step), act) for step in range(-8, 9)}
    step = max(moved, key=lambda s: moved[s])
    if moved[step] > max(3 * chance, 0.1):
        return f"the right tokens in the wrong place: {abs(step)} tokens too {'early' if step > 0 else 'late'}"
    if hits.mean() > 0.2:
        return "the rule claims more than a fifth of all tokens: add a clause with &&"
    return "what the weights prefer is not what the text has: use the rows that recur in all readings"


def _correlation(hits: np.ndarray, act: np.ndarray) -> float:
    centred = act - act.mean()
    return float((hits * centred).sum() / math.sqrt(max(hits.var() * len(hits) * (centred**2).sum(), 1e-12)))
