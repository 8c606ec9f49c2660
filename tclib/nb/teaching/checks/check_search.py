"""Checks of notebook 04b: circuits searched and tested."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice

import pandas as pd
import torch
from torch import Tensor

from tclib import interventions
from tclib.model import to_token
from tclib.nb.teaching.verdict import call, judge, reject
from tclib.plots import feature_name
from tclib.tracing import Trace


def path_search(answer: Callable[..., Sequence[Sequence[tuple[tuple[str, ...], float]]]]) -> None:
    """Exercise 04b.1, a beam search over paths, from ``sources, root, value, branches, steps``.

    Expected: on a small tree, from all paths of each length, of which those are kept whose beginning was kept.
    """
    tree = {
        "answer": [("a", 0.6, "a"), ("b", -0.5, "b"), ("c", 0.3, "c"), ("end", 0.1, None)],
        "a": [("d", 0.7, "d"), ("e", 0.2, None), ("f", 0.1, "d")],
        "b": [("d", 1.5, "d"), ("e", -0.9, "e")],
        "c": [("d", 2.5, "d"), ("f", -1.5, "e")],
        "d": [("g", 0.8, None), ("h", 0.2, None)],
        "e": [("g", 1.2, None), ("h", -0.2, None)],
    }
    value, branches, steps = 4.0, 2, 3
    tried = f"a tree of {len(tree)} nodes below an answer of {value:g}, {branches} branches, {steps} steps"

    def sources(node: str) -> list[tuple[str, float, str | None]]:
        return list(tree[node])

    def worth(path: tuple[str, ...], last_alone: bool) -> float:
        node, product, share = "answer", value, 1.0
        for name in path:
            _, share, node = next(item for item in tree[node] if item[0] == name)
            product *= share
        return value * share if last_alone else product

    def search(rank: Callable[[float], float], last_alone: bool = False, each: bool = False) -> list[list[float]]:
        def best(paths: dict) -> dict:
            return {q: paths[q] for q in sorted(paths, key=lambda q: -rank(worth(q, last_alone)))}

        kept, rounds = {(): "answer"}, []
        for _ in range(steps):
            found = {}
            for path, node in kept.items():
                longer = best({(*path, name): to for name, _, to in tree.get(node, ())})
                found |= dict(islice(longer.items(), branches if each else None))
            kept = dict(islice(best(found).items(), None if each else branches))
            rounds.append([worth(path, last_alone) for path in kept])
        return rounds

    def flat(rounds: Sequence[Sequence[float]]) -> list[float]:
        return [x for part in rounds for x in part]

    given = call(answer, tried, sources, "answer", value, branches, steps)
    try:
        given = None if given is None else flat([[float(contribution) for _, contribution in part] for part in given])
    except (TypeError, ValueError):
        reject(tried, "a list of rounds", repr(given)[:80], "each round is a list of pairs (names, contribution)")
    right = flat(search(abs))
    mistakes = {
        "inhibiting paths were dropped: rank by absolute contribution": flat(search(lambda c: c)),
        "the last share alone is no path: multiply by the contribution before": flat(search(abs, last_alone=True)),
        "branches are counted for all paths of a round together, not for each path": flat(search(abs, each=True)),
        "shares of the answer, not contributions: the empty path carries its value": [c / value for c in right],
        "the smallest were kept": flat(search(lambda c: -abs(c))),
    }
    cause = "extend every path that goes on by every source of its node, then keep the largest of all"
    judge(tried, given, right, mistakes, cause)


def attention_moves(answer: Callable[[Tensor, Tensor, int, float], float]) -> None:
    """Exercise 04b.3, how far a head's output moves if one score does, from ``A, g, S, delta``.

    Expected: softmax with `math.exp`, from scores that have this pattern, before and after.
    """
    scores, S, delta = [0.3, 2.0, -1.0, 1.2], 1, -1.5
    g = torch.tensor([0.5, 2.0, -1.0, 0.1], dtype=torch.float64)

    def output(scores: Sequence[float]) -> tuple[list[float], float]:
        weights = [math.exp(score) for score in scores]
        A = [w / sum(weights) for w in weights]
        return A, sum(a * value for a, value in zip(A, g.tolist(), strict=True))

    before, old = output(scores)
    _, new = output([score + delta * (j == S) for j, score in enumerate(scores)])
    A = torch.tensor(before, dtype=torch.float64)
    tried = f"a pattern over {len(scores)} tokens and one score lowered by {-delta}"
    grown = A.clone()
    grown[S] *= math.exp(delta)
    shifted = A.clone()
    shifted[S] += delta
    mistakes = {
        "that is the first-order estimate; here the softmax itself is wanted": A[S] * (g[S] - A @ g) * delta,
        "the new weights do not sum to 1: what one token loses the others gain": (grown - A) @ g,
        "delta is added to the score, not to the attention": (shifted - A) @ g,
        "that is the new output; how far it moved is wanted": new,
        "the sign: new minus old": old - new,
    }
    cause = "the new pattern is proportional to A, with A[S] times exp(delta)"
    judge(tried, call(answer, tried, A, g, S, delta), new - old, mistakes, cause)


def removal(answer: Callable[[], float] | float, trace: Trace, later: str, earlier: str, source: pd.Series) -> None:
    """Exercise 04b.2, the change of ``logit(later) - logit(earlier)`` when one feature is taken out.

    ``source`` is a row of an attribution table. Expected: the model is run without the feature, with patterns, scales,
    values and MLPs frozen.
    """
    layer, feature, position = (int(source[name]) for name in ("layer", "feature", "position"))
    tried = f"the model run without {feature_name(layer, feature)}, with everything frozen that attribution freezes"
    ids = [to_token(trace.model, word) for word in (later, earlier)]
    removed = interventions.set_features(layer, trace.transcoders[layer], [feature], 0.0, position)

    def difference(hooks: list) -> float:
        logits = interventions.run(trace.model, trace.tokens[None], hooks)[0, -1]
        return float(logits[ids[0]] - logits[ids[1]])

    whole = difference([])
    frozen = interventions.freeze(trace.cache, ["patterns", "scales", "values", "mlps"])
    measured = difference(frozen + removed) - whole
    mistakes = {
        "the sign: what a feature adds is lost when it goes": -measured,
        "that is the answer that remains; its change is wanted": whole + measured,
        "that is the feature's activation, not what it does to the answer": trace.features[layer][position, feature],
        "that is what happens when everything is set free": difference(removed) - whole,
        "that is the answer before anything was removed": whole,
    }
    cause = "read it off the attribution table of the answer: the row of this feature"
    judge(tried, call(answer, tried), measured, mistakes, cause, tolerance=5e-3)
