"""Checks of notebook 04b: circuits searched and tested."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from torch import Tensor

from tclib import interventions
from tclib.model import to_token
from tclib.nb.teaching.verdict import call, judge
from tclib.tracing import Trace


def path_contribution(answer: Callable[[Sequence[float], Sequence[float]], float]) -> None:
    """Exercise 04b.1, a path's contribution from direct contributions and pre-activations, answer first.

    Expected: the source of a small chain raised by a thousandth, and the answer computed again.
    """
    source, into, through, out = 3.0, 0.5, -2.0, 0.7  # the source's activation, then three weights
    others_far, others_near = 1.0, 9.0  # what other sources add to the two features

    def chain(z: float) -> tuple[float, float, float]:
        far = into * z + others_far
        near = through * far + others_near
        return out * near, near, far

    (value, near, far), (higher, _, _) = chain(source), chain(1.001 * source)
    contributions, pre = [out * near, through * far, into * source], [near, far]
    tried = "a chain of a source, two features and the answer, with the source raised by a thousandth"
    c = math.prod(contributions)
    mistakes = {
        "contributions are multiplied without dividing by the pre-activations they belong to": c,
        "the last feature on the path still has to pass on a share: divide by its pre-activation": c / near,
        "the first feature on the path still has to pass on a share: divide by its pre-activation": c / far,
        "that multiplies by the pre-activations": c * near * far,
        "along a path contributions are multiplied, not added": sum(contributions),
    }
    cause = "each feature passes on contribution / pre-activation of it"
    judge(tried, call(answer, tried, contributions, pre), (higher - value) / 0.001, mistakes, cause)


def attention_moves(answer: Callable[[Tensor, Tensor, int, float], float]) -> None:
    """Exercise 04b.2, how far a head's output moves if one score does, from ``A, g, S, delta``.

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
    """Exercise 04b.3, the change of ``logit(later) - logit(earlier)`` when one feature is taken out.

    ``source`` is a row of an attribution table. Expected: the model is run without the feature, with patterns, scales,
    values and MLPs held.
    """
    layer, feature, position = (int(source[name]) for name in ("layer", "feature", "position"))
    tried = f"the model run without mlp{layer}[{feature}], with everything held that attribution holds"
    ids = [to_token(trace.model, word) for word in (later, earlier)]
    removed = interventions.set_features(layer, trace.transcoders[layer], [feature], 0.0, position)

    def difference(hooks: list) -> float:
        logits = interventions.run(trace.model, trace.tokens[None], hooks)[0, -1]
        return float(logits[ids[0]] - logits[ids[1]])

    whole = difference([])
    held = interventions.freeze(trace.cache, ["patterns", "scales", "values", "mlps"])
    measured = difference(held + removed) - whole
    mistakes = {
        "the sign: what a feature adds is lost when it goes": -measured,
        "that is the answer that remains; its change is wanted": whole + measured,
        "that is the feature's activation, not what it does to the answer": trace.features[layer][position, feature],
        "that is what happens when everything is set free": difference(removed) - whole,
        "that is the answer before anything was removed": whole,
    }
    cause = "read it off the attribution table of the answer: the row of this feature"
    judge(tried, call(answer, tried), measured, mistakes, cause, tolerance=5e-3)
