"""Checks of notebooks 06 and 09: greater than."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib import interventions
from tclib.nb.teaching.verdict import accept, call, judge, reject
from tclib.tasks import greater_than as gt


def backward_difference(answer: Callable[[Tensor, int], float]) -> None:
    """Exercise 06.1, the probability difference of the backward task from ``prob [100], YY``. Expected: a loop."""
    prob = torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prob[40] += 8.0  # so that it matters on which side YY itself stands
    prob, YY = prob / prob.sum(), 40
    tried = f"100 random probabilities and YY = {YY}"
    expected = sum(value if y < YY else -value for y, value in enumerate(prob.tolist()))
    mistakes = {
        "minus the forward metric puts YY itself on the right side": prob[: YY + 1].sum() - prob[YY + 1 :].sum(),
        "that is the forward metric": prob[YY + 1 :].sum() - prob[: YY + 1].sum(),
        "the wrong answers still have to be subtracted": prob[:YY].sum(),
        "the sign: smaller numbers are right here": -expected,
        "YY itself is on no side": prob[:YY].sum() - prob[YY + 1 :].sum(),
    }
    cause = "which numbers are right after 'ended in 1740; it began in 17'?"
    judge(tried, call(answer, tried, prob, YY), expected, mistakes, cause)


def moving_head(
    answer: Callable[[], Sequence[int]] | Sequence[int],
    model: TransformerBridge,
    tokens: Int[Tensor, " pos"],
    other: Int[Tensor, " pos"],
    YY: int,
) -> None:
    """Exercise 06.2, the head (layer, head) that moves YY: exchanged between two prompts, it moves the answer most.

    Expected: for every head, the difference of what it *writes* in the two prompts added to the stream at the last
    token. A head within 2% of the largest movement counts as right.
    """
    tried = "for every head, the difference between what it writes in the two prompts added at the last token"
    ids = gt.year_tokens(model.tokenizer)
    weights = torch.where(torch.arange(100) > YY, 1 / (99 - YY), -1 / (YY + 1))
    pair = torch.stack([tokens, other])
    _, cache = model.run_with_cache(pair, names_filter=lambda name: name.endswith(("hook_z", "hook_pattern")))
    whole = float(interventions.run(model, tokens[None], [])[0, -1, ids] @ weights)
    moves = {}
    for layer in range(model.cfg.n_layers):
        z = cache[f"blocks.{layer}.attn.hook_z"][:, -1]  # [prompt, head, d_head]
        for head in range(model.cfg.n_heads):
            written = (z[1, head] - z[0, head]) @ model.W_O[layer, head]
            added = _added(written)
            logits = interventions.run(model, tokens[None], [(f"blocks.{layer}.hook_attn_out", added)])
            moves[layer, head] = float(logits[0, -1, ids] @ weights) - whole
    best = max(moves, key=lambda name: abs(moves[name]))
    wanted = f"{best}, which moves it by {moves[best]:.3f}"
    given = call(answer, tried)
    try:
        found = tuple(int(number) for number in given)
    except (TypeError, ValueError):
        found = ()
    if found not in moves:
        cause = "two numbers are wanted: the layer, then the head in it, both from 0"
        if found[::-1] == best:
            cause = "the order: first the layer, then the head"
        reject(tried, wanted, repr(given)[:80], cause)
    if abs(moves[found]) >= 0.98 * abs(moves[best]):
        return accept(tried)
    source = int((tokens != other).nonzero()[0, 0])
    looks = {name: float(cache[f"blocks.{name[0]}.attn.hook_pattern"][0, name[1], -1, source]) for name in moves}
    signed = max(moves, key=lambda name: moves[name]), min(moves, key=lambda name: moves[name])
    if found[::-1] == best:
        cause = "the order: first the layer, then the head"
    elif found in signed:
        cause = "the largest movement may be up or down: compare absolute values"
    elif found == max(looks, key=lambda name: looks[name]):
        cause = "that head looks most at YY; what it brings from there may still matter little"
    else:
        cause = "exchange one head at a time, at the last token only, and start again from the whole model"
    reject(tried, wanted, f"{found}, which moves it by {moves[found]:.3f}", cause)


def keep_live(answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Exercise 06.3, activations with only some features live, from ``z [prompt, feature], kept, group [prompt]``.

    Expected: loops over groups and features.
    """
    z = torch.rand(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept, group = torch.tensor([2, 0]), torch.tensor([7, 7, 3, 3, 3])
    tried = "5 prompts in 2 groups, and 4 features, of which 2 and 0 are kept"
    rows = list(zip(z.tolist(), group.tolist(), strict=True))
    means = {
        g: [sum(column) / len(column) for column in zip(*(row for row, own in rows if own == g), strict=True)]
        for g in (3, 7)
    }
    expected = [[value if i in (0, 2) else means[g][i] for i, value in enumerate(row)] for row, g in rows]
    live, own = torch.tensor([True, False, True, False]), torch.tensor([means[g] for _, g in rows])
    mistakes = {
        "the others are at zero: that also takes away what they write for every YY": torch.where(live, z, 0.0),
        "one mean for all groups: what differs between nouns would be removed as well": torch.where(live, z, z.mean(0)),
        "the kept ones are at their mean, the others live": torch.where(live, own, z),
        "z came back unchanged": z,
        "all features are at their mean": own,
    }
    cause = "for each group: the mean over its rows, feature by feature"
    judge(tried, call(answer, tried, z.clone(), kept, group), expected, mistakes, cause)


def warmer(answer: Callable[[Tensor, float], Tensor]) -> None:
    """Exercise 06.4, probabilities after LayerNorm's scale grew by a factor. Expected: softmax of divided logits."""
    logits = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 5
    prob, factor = logits.softmax(0), 0.8
    tried = f"100 probabilities and a scale {factor} times as large"
    weights = (logits / factor).exp()
    raised, lowered = prob ** (1 / factor), prob**factor
    mistakes = {
        "the exponent is upside down: a smaller scale gives a more decided answer": lowered / lowered.sum(),
        "they do not sum to 1 any more": raised,
        "dividing all probabilities by one number changes nothing once they sum to 1": prob,
        "logits are divided, not probabilities": prob / factor,
        "that takes the softmax of probabilities instead of logits": (prob / factor).softmax(0),
    }
    expected = weights / weights.sum()
    judge(
        tried,
        call(answer, tried, prob, factor),
        expected,
        mistakes,
        "what does dividing log p by a factor do to p?",
        1e-6,
    )


def fair_start(answer: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
    """Exercise 09.1, an MLP's output with a few units live, from ``y [prompt, d_model], a [prompt, unit],
    W [unit, d_model], kept``. Expected: one number at a time."""
    generator = torch.Generator().manual_seed(0)
    y, a, W = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 3), (4, 5), (5, 3)))
    kept = torch.tensor([3, 1])
    tried = "4 prompts and 5 units, of which 3 and 1 are live"
    n = len(y)
    expected = [
        [
            sum(y[q, d].item() for q in range(n)) / n
            + sum((a[q, i] - sum(a[:, i].tolist()) / n).item() * W[i, d].item() for i in (3, 1))
            for d in range(3)
        ]
        for q in range(n)
    ]
    deviation = a - a.mean(0)
    mistakes = {
        "the units' own means are missing: what they write for every digit is counted twice": y.mean(0)
        + a[:, kept] @ W[kept],
        "the mean of the output is missing: without a unit nothing at all would be written": deviation[:, kept]
        @ W[kept],
        "that starts from the live output, which already knows the digit": y + deviation[:, kept] @ W[kept],
        "without a unit this is the transcoder's mean, not the MLP's: the error is gone": a.mean(0) @ W
        + deviation[:, kept] @ W[kept],
        "all units are live": y.mean(0) + deviation @ W,
    }
    cause = "start from y's mean over the prompts, and add each kept unit's deviation times its vector"
    judge(tried, call(answer, tried, y.clone(), a.clone(), W.clone(), kept), expected, mistakes, cause)


def _added(written: Float[Tensor, " d_model"]) -> Callable:
    def edit(out: Float[Tensor, "row pos d_model"], hook) -> Tensor:
        out = out.clone()
        out[:, -1] += written
        return out

    return edit
