"""Checks of notebooks 06, 06b and 09: greater than."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib import interventions
from tclib.nb.teaching.verdict import accept, call, compare, judge, random, reject


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
    answers: Int[Tensor, " answer"],
    right: Bool[Tensor, " answer"],
) -> None:
    """Exercise 06.2, the head (layer, head) that moves YY: exchanged between two prompts, it moves the answer most.

    ``answers`` are the tokens that can answer the first prompt, and ``right`` those that are. Expected: for every head,
    the difference of what it *writes* in the two prompts added to the stream at the last token. A head within 2% of the
    largest movement counts as right.
    """
    tried = "for every head, the difference between what it writes in the two prompts added at the last token"
    weights = right / right.sum() - 1.0 * ~right / (~right).sum()
    pair = torch.stack([tokens, other])
    _, cache = model.run_with_cache(pair, names_filter=lambda name: name.endswith(("hook_z", "hook_pattern")))
    whole = float(interventions.run(model, tokens[None], [])[0, -1, answers] @ weights)
    moves = {}
    for layer in range(model.cfg.n_layers):
        z = cache[f"blocks.{layer}.attn.hook_z"][:, -1]  # [prompt, head, d_head]
        for head in range(model.cfg.n_heads):
            written = (z[1, head] - z[0, head]) @ model.W_O[layer, head]
            added = (
                f"blocks.{layer}.hook_attn_out",
                lambda x, hook, w=written: torch.cat([x[:, :-1], x[:, -1:] + w], 1),
            )
            logits = interventions.run(model, tokens[None], [added])
            moves[layer, head] = float(logits[0, -1, answers] @ weights) - whole
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


def ablation_value(answer: Callable[[Tensor, Tensor, str], Tensor]) -> None:
    """Exercise 06b.1, what is put in a part's place, from ``live [prompt, unit], group [prompt], how``.

    Expected: loops over prompts; for "resample" any other prompt of the same group will do.
    """
    live = torch.rand(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    group = torch.tensor([5, 2, 5, 2, 5, 2, 2])
    members = {g: [i for i in range(7) if group[i] == g] for g in (2, 5)}
    means = torch.stack([torch.stack([live[i] for i in members[g]]).sum(0) / len(members[g]) for g in group.tolist()])

    def asked(how: str, wanted: str) -> Tensor:
        passed = live.clone()
        value = call(answer, tried, passed, group, how)
        if not torch.equal(passed, live):
            reject(tried, wanted, "the activations that were passed have changed", "write into a copy: live.clone()")
        return value

    tried = "7 prompts in 2 groups, at zero"
    mistakes = {"nothing was replaced": live, "those are the means": means}
    compare(tried, asked("zero", "zeros"), torch.zeros_like(live), mistakes, "zero is zero for every prompt and unit")
    tried = "the same prompts, at the mean"
    mistakes = {
        "one mean for all groups: what differs between nouns goes as well": live.mean(0).expand_as(live),
        "the mean over units: it is over prompts, unit by unit": live.mean(1, keepdim=True).expand_as(live),
        "nothing was replaced": live,
    }
    compare(tried, asked("mean", "means"), means, mistakes, "for each group: the mean over its prompts")
    tried, wanted = "the same prompts, resampled", "for each prompt, what another prompt of its group has"
    for _ in range(8):  # a wrong draw may come out right by chance
        drawn = asked("resample", wanted)
        if not isinstance(drawn, Tensor) or drawn.shape != live.shape:
            reject(tried, wanted, repr(drawn)[:80], "return a row for every prompt")
        place = torch.cdist(drawn, live).argmin(1)  # which prompt each row is from
        if not torch.equal(live[place], drawn):
            reject(tried, wanted, "rows that no prompt has", "take whole rows, and do not mix them")
        if not torch.equal(group[place], group):
            reject(tried, wanted, f"rows {place.tolist()}", "some are from another group: the noun would change too")
        if (place == torch.arange(7)).any():
            reject(tried, wanted, f"rows {place.tolist()}", "a prompt kept its own row: nothing was taken out there")
    accept(f"{tried}; at zero and at the mean too")


def balanced_share(answer: Callable[[Sequence[float], Sequence[float], Sequence[float]], float]) -> None:
    """Exercise 06b.3, the share that a changed model keeps, from ``kept, empty, whole``, pairs of PD forwards and
    backwards. Expected: how far along the line from ``empty`` to ``whole`` the balanced score lies."""
    kept, empty, whole = (0.6, -0.2), (0.4, 0.1), (0.9, -0.5)
    tried = "PD 0.6 and -0.2 kept, 0.4 and 0.1 empty, 0.9 and -0.5 whole"
    low, middle, high = ((ahead - back) / 2 for ahead, back in (empty, kept, whole))
    expected = next(n / 11 for n in range(12) if abs(low + n / 11 * (high - low) - middle) < 1e-9)
    added = [sum(pair) for pair in (empty, kept, whole)]
    mistakes = {
        "measured from 0: a model that knows nothing would have a share": middle / high,
        "only the forward scores: always answering late would have a share": (0.6 - 0.4) / (0.9 - 0.4),
        "backwards a model that compares is negative: subtract": (added[1] - added[0]) / (added[2] - added[0]),
        "that is what is lost, not what is kept": 1 - expected,
    }
    cause = "balance each pair, then measure from empty, in units of whole minus empty"
    judge(tried, call(answer, tried, kept, empty, whole), expected, mistakes, cause)


def warmer(answer: Callable[[Tensor, float], Tensor]) -> None:
    """Exercise 06b.2, probabilities after LayerNorm's scale grew by a factor. Expected: softmax of divided logits."""
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
    y, a, W = random((4, 3), (4, 5), (5, 3))
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
