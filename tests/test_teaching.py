"""Exercises: checks accept right answers and name the mistake in wrong ones; student copies; reports."""

from __future__ import annotations

import ast
import copy
import inspect
import json
import re
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

import tclib as tc
from tclib import interventions, targets
from tclib.blind import rules
from tclib.cli import bootstrap, serve, teach
from tclib.cli.prepare import has_smollm2, own_model
from tclib.nb.teaching import checks, report, solutions, students, verdict
from tclib.nb.teaching.verdict import NotYet, answered, judge
from tclib.tasks import greater_than as gt
from tests.conftest import COMMITTED, REPO
from tests.tiny import make_transcoder
from tools import address, exercise_table
from tools.execute import merge_streams

PARTS = ("tried:", "expected:", "came back:", "usual cause:")


def relu(x):
    return x.clamp(min=0)


def transcoded(x, y, W, b, V, c, l1, act=relu, over=torch.sum):
    z = act(torch.addmm(b, x, W))
    imitation = torch.addmm(c, z, V)
    return z, imitation, over((y - imitation).square(), -1).mean() + l1 * z.sum(-1).mean()


def fvu(y, imitation):
    return (y - imitation).square().sum() / (y - y.mean(0)).square().sum()


def whole(chunks):
    return [torch.cat(part) for part in zip(*chunks, strict=True)]


def pairs(z, on, ties):
    return np.mean([(a > b) + ties * (a == b) for a in z[on].tolist() for b in z[~on].tolist()])


def exact(A, g, S, delta):
    return ((A.log() + delta * (torch.arange(len(A)) == S)).softmax(0) - A) @ g


def beam(
    sources, root, value, branches, steps, rank=lambda c: -abs(c), product=lambda c, share, value: c * share, each=False
):
    paths, rounds = [((), value, root)], []
    for _ in range(steps):
        groups = [
            sorted(
                [((*names, n), product(c, share, value), to) for n, share, to in sources(node)],
                key=lambda q: rank(q[1]),
            )
            for names, c, node in paths
            if node is not None
        ]
        found = sorted(
            [path for group in groups for path in group[: branches if each else None]], key=lambda q: rank(q[1])
        )
        paths = found if each else found[:branches]
        rounds.append([path[:2] for path in paths])
    return rounds


def kept_live(z, kept, group, mean):
    live = torch.zeros(z.shape[1], dtype=torch.bool)
    live[kept] = True
    return torch.where(live, z, mean)


def own_means(z, group):
    return torch.stack([z[group == g].mean(0) for g in group])


def along(slope, x, base, steps):
    return torch.stack([slope(base + (i + 0.5) / steps * (x - base)) for i in range(steps)]).mean(0)


def closed(N):
    return torch.linalg.inv(torch.eye(len(N), dtype=N.dtype) - N) - torch.eye(len(N), dtype=N.dtype)


def ended(reached, these, those):
    return reached[these].sum() / (reached[these].sum() + reached[those].sum())


def fitted(y, D, picks):
    return torch.zeros(len(D), dtype=y.dtype).index_add(0, torch.tensor(picks), torch.linalg.pinv(D[picks]).T @ y)


def pursued(y, D, k, refit=True, size=torch.abs):
    z, picks = torch.zeros(len(D), dtype=y.dtype), []
    for _ in range(k):
        fit = D @ (y - z @ D)
        picks.append(int(size(fit).argmax()))
        z = fitted(y, D, picks) if refit else z.index_add(0, torch.tensor(picks[-1:]), fit[picks[-1:]])
    return z


def by_kind(y, kind, middle=lambda rows: rows.mean(0)):
    return torch.stack([middle(y[kind == one]) for one in kind])


def scored_name(z, holds, k, others=None):
    order = z.argsort(descending=True)
    order = order[z[order] > 0]
    kept = holds[order[k:]] if others is None else others
    return holds[order[:k]].double().mean(), kept.double().mean(), holds[order].sum() / holds.sum()


def continued(x, y, at):
    i = int(np.clip(np.searchsorted(x, at), 1, len(x) - 1))
    return y[i - 1] + (at - x[i - 1]) * (y[i] - y[i - 1]) / (x[i] - x[i - 1])


def kept_neurons(a, mean, W, k, size=None):
    size = (a - mean).abs() if size is None else size
    chosen = torch.zeros_like(a, dtype=torch.bool).scatter_(1, (size * W.norm(dim=1)).topk(k).indices, True)
    return torch.where(chosen, a, mean)


# check -> the right answer, and wrong ones with a word of the message that each must get
ANSWERS: dict[str, tuple[Callable, dict[str, Any]]] = {
    "transcoder": (
        lambda *given: transcoded(*given),
        {
            "no ReLU": lambda *given: transcoded(*given, act=lambda a: a),
            "b_enc is missing": lambda x, y, W, b, V, c, l1: transcoded(x, y, W, 0 * b, V, c, l1),
            "b_dec is missing": lambda x, y, W, b, V, c, l1: transcoded(x, y, W, b, V, 0 * c, l1),
            "has no penalty": lambda x, y, W, b, V, c, l1: transcoded(x, y, W, b, V, c, 0.0),
            "mean over all coordinates": lambda *given: transcoded(*given, over=torch.mean),
            "loss alone": lambda *given: transcoded(*given)[2],
            "sum over all tokens": lambda *given: (*transcoded(*given)[:2], 5 * transcoded(*given)[2]),
            "the order": lambda *given: transcoded(*given)[::-1],
        },
    ),
    "dodge": (
        lambda: (1, 0.25),
        {
            "error does not change": lambda: (0.25, 0.25),
            "became smaller": (1, 4),
            "not the length": lambda: (1, 1),
            "not of their squares": (1, 1 / 16),
            "the order": (0.25, 1),
        },
    ),
    "best_activation": (
        lambda a, l1: torch.relu(a - 0.5 * l1),
        {
            "without shrinking": lambda a, l1: relu(a),
            "factor 2": lambda a, l1: relu(a - l1),
            "not be negative": lambda a, l1: a - l1 / 2,
            "sign": lambda a, l1: relu(a + l1 / 2),
            "does not shrink the others": lambda a, l1: a * (a > l1 / 2),
        },
    ),
    "fvu_in_pieces": (
        lambda chunks: fvu(*whole(chunks)),
        {
            "mean of the chunks' FVUs": lambda chunks: torch.stack([fvu(*chunk) for chunk in chunks]).mean(),
            "own mean": lambda chunks: np.divide(
                *np.sum([[(y - i).square().sum(), (y - y.mean(0)).square().sum()] for y, i in chunks], 0)
            ),
            "not subtracted": lambda chunks: (lambda y, i: (y - i).square().sum() / y.square().sum())(*whole(chunks)),
            "one mean for all": lambda chunks: (lambda y, i: (y - i).square().sum() / (y - y.mean()).square().sum())(
                *whole(chunks)
            ),
            "1 - FVU": lambda chunks: 1 - fvu(*whole(chunks)),
        },
    ),
    "recovered_from_mean": (
        lambda ce, zero, mean, r: 1 - (1 - r) * (zero - ce) / (mean - ce),
        {
            "another baseline": lambda ce, zero, mean, r: r,
            "stretched": lambda ce, zero, mean, r: r * (zero - ce) / (mean - ce),
            "loss in nats": lambda ce, zero, mean, r: (1 - r) * (zero - ce),
            "lost fraction": lambda ce, zero, mean, r: (1 - r) * (zero - ce) / (mean - ce),
            "exchanged": lambda ce, zero, mean, r: 1 - (1 - r) * (mean - ce) / (zero - ce),
        },
    ),
    "paired_interval": (
        lambda a, b: (np.percentile(a - b, 2.5), np.percentile(a - b, 97.5)),
        {
            "separate intervals": lambda a, b: (
                np.quantile(a, 0.025) - np.quantile(b, 0.975),
                np.quantile(a, 0.975) - np.quantile(b, 0.025),
            ),
            "ends of two": lambda a, b: np.quantile(a, [0.025, 0.975]) - np.quantile(b, [0.025, 0.975]),
            "sign": lambda a, b: np.quantile(b - a, [0.025, 0.975]),
            "90%": lambda a, b: np.quantile(a - b, [0.05, 0.95]),
            "the order": lambda a, b: np.quantile(a - b, [0.975, 0.025]),
        },
    ),
    "auroc": (
        lambda z, on: pairs(z, on, 0.5),
        {
            "count for nothing": lambda z, on: pairs(z, on, 0),
            "count as wins": lambda z, on: pairs(z, on, 1),
            "exchanged": lambda z, on: 1 - pairs(z, on, 0.5),
            "left out": lambda z, on: pairs(z[z > 0], on[z > 0], 0.5),
            "accuracy": lambda z, on: ((z > 0) == on).float().mean(),
        },
    ),
    "invariant": (
        lambda f_dec, f_enc: (f_dec - f_dec.mean()) @ f_enc,
        {
            "centring is missing": lambda f_dec, f_enc: f_dec @ f_enc,
            "cosine": lambda f_dec, f_enc: torch.cosine_similarity(f_dec, f_enc, dim=0),
            "not summed": lambda f_dec, f_enc: f_dec * (f_enc - f_enc.mean()),
            "reads with f_dec": lambda f_dec, f_enc: f_dec @ (f_dec - f_dec.mean()),
        },
    ),
    "path_search": (
        beam,
        {
            "inhibiting paths": lambda *given: beam(*given, rank=lambda c: -c),
            "last share alone": lambda *given: beam(*given, product=lambda c, share, value: value * share),
            "all paths of a round": lambda *given: beam(*given, each=True),
            "carries its value": lambda sources, root, value, *rest: beam(sources, root, 1.0, *rest),
            "smallest": lambda *given: beam(*given, rank=abs),
        },
    ),
    "attention_moves": (
        exact,
        {
            "first-order": lambda A, g, S, delta: A[S] * (g[S] - A @ g) * delta,
            "sum to 1": lambda A, g, S, delta: A[S] * (np.exp(delta) - 1) * g[S],
            "not to the attention": lambda A, g, S, delta: delta * g[S],
            "new output": lambda A, g, S, delta: exact(A, g, S, delta) + A @ g,
            "sign": lambda A, g, S, delta: -exact(A, g, S, delta),
        },
    ),
    "imitated": (
        lambda z, W, b, n: b[n] + sum(z[k] @ W[k][:, n - k] for k in range(n + 1)),
        {
            "earlier layers write": lambda z, W, b, n: b[n] + z[n] @ W[n][:, 0],
            "b_dec is missing": lambda z, W, b, n: sum(z[k] @ W[k][:, n - k] for k in range(n + 1)),
            "begin at layer k": lambda z, W, b, n: b[n] + sum(z[k] @ W[k][:, 0] for k in range(n + 1)),
            "one output bias": lambda z, W, b, n: sum(z[k] @ W[k][:, n - k] + b[k] for k in range(n + 1)),
            "own features": lambda z, W, b, n: b[n] + sum(z[k] @ W[k][:, n - k] for k in range(n)),
        },
    ),
    "equal_width": (
        lambda features, layers: features * (layers + 3) / 4,
        {
            "do not write to earlier": lambda features, layers: features * (layers + 1) / 2,
            "together": lambda features, layers: layers * features * (layers + 3) / 4,
            "an encoder and a decoder": lambda features, layers: features * (layers + 3) / 2,
            "same width": lambda features, layers: features,
        },
    ),
    "promoted": (
        lambda f_dec, W_U: f_dec @ (W_U - W_U.mean(1, keepdim=True)),
        {
            "all logits alike": lambda f_dec, W_U: f_dec @ W_U,
            "wrong axis": lambda f_dec, W_U: (f_dec - f_dec.mean()) @ W_U,
            "no cosines": lambda f_dec, W_U: torch.cosine_similarity(f_dec[:, None], W_U, dim=0),
            "sign is lost": lambda f_dec, W_U: (f_dec @ (W_U - W_U.mean(1, keepdim=True))).abs(),
            "spread": lambda f_dec, W_U: (lambda e: (e - e.mean()) / e.std())(f_dec @ W_U),
        },
    ),
    "tokens_needed": (
        lambda rate, chance: 1 + int(np.log(1 - chance) // np.log(1 - rate)),
        {
            "on average": lambda rate, chance: 1 / rate,
            "do not add up": lambda rate, chance: chance / rate,
            "stays unseen": lambda rate, chance: np.ceil(np.log(chance) / np.log(1 - rate)),
            "last token": lambda rate, chance: int(np.log(1 - chance) / np.log(1 - rate)),
            "is whole": lambda rate, chance: np.log(1 - chance) / np.log(1 - rate),
        },
    ),
    "name_scores": (
        scored_name,
        {
            "the order": lambda z, holds, k: [scored_name(z, holds, k)[i] for i in (1, 0, 2)],
            "leave them out": lambda z, holds, k: scored_name(z, holds, k, others=holds[z > 0]),
            "silent tokens": lambda z, holds, k: scored_name(z, holds, k, others=holds[z.argsort(descending=True)[k:]]),
            "not of the feature's": lambda z, holds, k: [*scored_name(z, holds, k)[:2], holds[z > 0].double().mean()],
            "the first k": lambda z, holds, k: [holds[:k].double().mean(), *scored_name(z, holds, k)[1:]],
        },
    ),
    "read_front": (
        lambda l0, lost, at: np.interp(np.log(at), np.log(l0), lost, left=np.nan, right=np.nan),
        {
            "return np.nan there": lambda l0, lost, at: np.interp(np.log(at), np.log(l0), lost),
            "was continued": lambda l0, lost, at: continued(np.log(l0), lost, np.log(at)),
            "interpolate in log L0": lambda l0, lost, at: np.interp(at, l0, lost, right=np.nan),
            "only L0 is": lambda l0, lost, at: np.exp(np.interp(np.log(at), np.log(l0), np.log(lost), right=np.nan)),
        },
    ),
    "top_neurons": (
        kept_neurons,
        {
            "norms of W_out": lambda a, mean, W, k: kept_neurons(a, mean, W / W.norm(dim=1, keepdim=True), k),
            "subtract the mean": lambda a, mean, W, k: kept_neurons(a, mean, W, k, size=a.abs()),
            "far below its mean": lambda a, mean, W, k: kept_neurons(a, mean, W, k, size=a - mean),
            "not at zero": lambda a, mean, W, k: kept_neurons(a, mean, W, k) * (kept_neurons(a, mean, W, k) == a),
            "not the same k": lambda a, mean, W, k: kept_neurons(
                a, mean, W, k, size=(a - mean).abs().mean(0).expand_as(a)
            ),
        },
    ),
    "keys_too": (
        lambda q, k, v, k2, v2: (k2 @ q / 2).softmax(0) @ v2 - (k @ q / 2).softmax(0) @ v2,
        {
            "root": lambda q, k, v, k2, v2: ((k2 @ q).softmax(0) - (k @ q).softmax(0)) @ v2,
            "old values": lambda q, k, v, k2, v2: ((k2 @ q / 2).softmax(0) - (k @ q / 2).softmax(0)) @ v,
            "together": lambda q, k, v, k2, v2: (k2 @ q / 2).softmax(0) @ v2 - (k @ q / 2).softmax(0) @ v,
            "alone": lambda q, k, v, k2, v2: (k @ q / 2).softmax(0) @ (v2 - v),
            "softmax": lambda q, k, v, k2, v2: (k2 - k) @ q @ v2 / 2,
        },
    ),
    "moved_rule": (
        lambda h, act, steps: (h & (np.roll(act, -steps) > 0)).sum() / h.sum(),
        {
            "was not moved": lambda h, act, steps: (h & (act > 0)).sum() / h.sum(),
            "wrong way": lambda h, act, steps: (np.roll(h, -steps) & (act > 0)).sum() / h.sum(),
            "leave the end": lambda h, act, steps: (h[:-steps] & (act[steps:] > 0)).sum() / h[:-steps].sum(),
            "recall": lambda h, act, steps: (np.roll(h, steps) & (act > 0)).sum() / (act > 0).sum(),
            "agree": lambda h, act, steps: (np.roll(h, steps) == (act > 0)).mean(),
        },
    ),
    "orthogonal_pursuit": (
        lambda y, D, k: pursued(y, D, k),
        {
            "plain matching": lambda y, D, k: pursued(y, D, k, refit=False),
            "only positive": lambda y, D, k: pursued(y, D, k, size=lambda fit: fit),
            "at once": lambda y, D, k: fitted(y, D, (D @ y).abs().topk(k).indices.tolist()),
            "least-squares fit": lambda y, D, k: torch.where(pursued(y, D, k) != 0, D @ y, 0),
            "what is left": lambda y, D, k: y - pursued(y, D, k) @ D,
        },
    ),
    "label_fvu": (
        lambda y, kind: fvu(y, by_kind(y, kind)),
        {
            "share explained": lambda y, kind: 1 - fvu(y, by_kind(y, kind)),
            "counts alike": lambda y, kind: (
                np.mean([y[kind == one].var(0, correction=0).sum() for one in kind.unique()])
                / y.var(0, correction=0).sum()
            ),
            "in the denominator": lambda y, kind: (y - by_kind(y, kind)).square().sum() / y.square().sum(),
            "not divided": lambda y, kind: (y - by_kind(y, kind)).square().sum(),
            "squared lengths": lambda y, kind: (
                (y - by_kind(y, kind)).norm(dim=1).sum() / (y - y.mean(0)).norm(dim=1).sum()
            ),
            "median": lambda y, kind: fvu(y, by_kind(y, kind, lambda rows: rows.median(0).values)),
        },
    ),
    "backward_difference": (
        lambda prob, YY: 2 * prob[:YY].sum() - 1,
        {
            "minus the forward": lambda prob, YY: 1 - 2 * prob[YY + 1 :].sum(),
            "forward metric": lambda prob, YY: 2 * prob[YY + 1 :].sum() - 1,
            "be subtracted": lambda prob, YY: prob[:YY].sum(),
            "smaller numbers": lambda prob, YY: 1 - 2 * prob[:YY].sum(),
            "no side": lambda prob, YY: prob[:YY].sum() - prob[YY + 1 :].sum(),
        },
    ),
    "keep_live": (
        lambda z, kept, group: kept_live(z, kept, group, own_means(z, group)),
        {
            "at zero": lambda z, kept, group: kept_live(z, kept, group, torch.zeros_like(z)),
            "one mean for all": lambda z, kept, group: kept_live(z, kept, group, z.mean(0)),
            "others live": lambda z, kept, group: kept_live(own_means(z, group), kept, group, z),
            "unchanged": lambda z, kept, group: z,
            "all features": lambda z, kept, group: own_means(z, group),
            "feature by feature": lambda z, kept, group: kept_live(z, kept, group, z.mean(1, keepdim=True)),
        },
    ),
    "balanced_share": (
        lambda kept, empty, whole: (kept[0] - kept[1] - 0.3) / (whole[0] - whole[1] - 0.3),
        {
            "measured from 0": lambda kept, empty, whole: (kept[0] - kept[1]) / (whole[0] - whole[1]),
            "only the forward": lambda kept, empty, whole: (kept[0] - empty[0]) / (whole[0] - empty[0]),
            "subtract": lambda kept, empty, whole: (sum(kept) - sum(empty)) / (sum(whole) - sum(empty)),
            "what is lost": lambda kept, empty, whole: 1 - (kept[0] - kept[1] - 0.3) / (whole[0] - whole[1] - 0.3),
        },
    ),
    "fair_start": (
        lambda y, a, W, kept: y.mean(0) + torch.einsum("qi,id->qd", a[:, kept] - a[:, kept].mean(0), W[kept]),
        {
            "own means": lambda y, a, W, kept: y.mean(0) + a[:, kept] @ W[kept],
            "mean of the output": lambda y, a, W, kept: (a - a.mean(0))[:, kept] @ W[kept],
            "already knows": lambda y, a, W, kept: y + (a - a.mean(0))[:, kept] @ W[kept],
            "error is gone": lambda y, a, W, kept: kept_live(a, kept, None, a.mean(0)) @ W,
            "all units": lambda y, a, W, kept: y.mean(0) + (a - a.mean(0)) @ W,
        },
    ),
    "warmer": (
        lambda prob, factor: (prob.log() / factor).softmax(0),
        {
            "upside down": lambda prob, factor: (prob.log() * factor).softmax(0),
            "sum to 1": lambda prob, factor: prob ** (1 / factor),
            "changes nothing": lambda prob, factor: prob / factor / (prob / factor).sum(),
            "not probabilities": lambda prob, factor: prob / factor,
            "softmax of probabilities": lambda prob, factor: (prob / factor).softmax(0),
        },
    ),
    "integrated": (
        lambda slope, x, base, steps: (
            (x - base) * sum(slope(base + (i + 0.5) / steps * (x - base)) for i in range(steps)) / steps
        ),
        {
            "attribution patching": lambda slope, x, base, steps: (x - base) * slope(x),
            "at the base alone": lambda slope, x, base, steps: (x - base) * slope(base),
            "multiplied by x - base": lambda slope, x, base, steps: along(slope, x, base, steps),
            "not by x": lambda slope, x, base, steps: x * along(slope, x, base, steps),
            "not added": lambda slope, x, base, steps: (x - base) * along(slope, x, base, steps) * steps,
            "sign": lambda slope, x, base, steps: (base - x) * along(slope, x, base, steps),
            "not at zero": lambda slope, x, base, steps: (x - base) * along(slope, x, 0 * x, steps),
        },
    ),
    "error_share": (
        lambda N, weights, errors, inputs: ended(weights @ closed(N), errors, inputs),
        {
            "one step": lambda N, weights, errors, inputs: ended(weights @ N, errors, inputs),
            "pass on": lambda N, weights, errors, inputs: (
                (weights @ closed(N))[errors].sum() / (weights @ closed(N)).sum()
            ),
            "ends at inputs": lambda N, weights, errors, inputs: ended(weights @ closed(N), inputs, errors),
            "not its share": lambda N, weights, errors, inputs: (weights @ closed(N))[errors].sum(),
            "by its weight": lambda N, weights, errors, inputs: ended(
                (weights > 0).double() @ closed(N), errors, inputs
            ),
        },
    ),
    "visible_part": (
        lambda v, W: W @ torch.linalg.pinv(W) @ v,
        {
            "no answer reads": lambda v, W: v - W @ torch.linalg.pinv(W) @ v,
            "what the answers read": lambda v, W: v @ W,
            "no projection": lambda v, W: W @ W.T @ v,
            "not a unit vector": lambda v, W: torch.nn.functional.normalize(W @ torch.linalg.pinv(W) @ v, dim=0),
            "unchanged": lambda v, W: v,
        },
    ),
}


def refused(check: Callable, answer: Any, *context: Any) -> str:
    """The usual cause that a check names for a wrong answer."""
    with pytest.raises(NotYet) as refusal:
        check(answer, *context)
    lines = str(refusal.value).splitlines()
    assert lines[0] == "not yet" and len(lines) == 5
    assert all(part in line for part, line in zip(PARTS, lines[1:], strict=True))
    return lines[-1]


@pytest.mark.parametrize("name", ANSWERS)
def test_right_answer_prints_one_line(name, capsys):
    getattr(checks, name)(ANSWERS[name][0])
    assert re.fullmatch(r"correct: .+\n", capsys.readouterr().out)


@pytest.mark.parametrize("name", ANSWERS)
def test_each_mistake_gets_its_own_message(name):
    wrong = ANSWERS[name][1]
    causes = [refused(getattr(checks, name), answer) for answer in wrong.values()]
    for word, cause in zip(wrong, causes, strict=True):
        assert word in cause
    assert len(set(causes)) == len(causes) >= 3


@pytest.mark.parametrize("name", ANSWERS)
def test_nothing_returned_and_nothing_written(name, capsys):
    check, (right, _) = getattr(checks, name), ANSWERS[name]

    def begun(*arguments):
        right(*arguments)

    def blank(*arguments):
        raise NotImplementedError

    assert "return" in refused(check, begun)
    capsys.readouterr()
    check(blank)
    assert capsys.readouterr().out == f"{verdict.OPEN}\n"
    with pytest.raises(NotImplementedError):
        getattr(checks.graded, name)(blank)


def test_a_check_leaves_the_generator_of_the_notebook_as_it_was():
    def drawing(live, group, how):
        torch.rand(3)
        raise NotImplementedError

    before = torch.get_rng_state()
    checks.ablation_value(drawing)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_in_the_answer_keeps_its_traceback():
    with pytest.raises(RuntimeError) as failure:
        checks.transcoder(lambda x, y, W, b, V, c, l1: x @ V)
    assert "on 5 inputs of width 4" in failure.value.__notes__[0]


def test_a_reader_s_answer_is_used_once_it_is_written():
    def blank(a):
        raise NotImplementedError

    assert answered(blank, lambda a: a + 1)(1) == 2 and answered(lambda a: 10 * a, blank)(1) == 10


def test_judge_on_odd_answers():
    for answer, word in {
        "text": "numbers",
        (1.0, 2.0, 3.0): "shape",
        (float("nan"), 1.0): "zero",
        (5, 5): "other",
    }.items():
        assert word in refused(lambda value: judge("two numbers", value, (1.0, 2.0), {}, "other"), answer)
    assert NotYet("line")._render_traceback_() == ["line"]


@pytest.fixture(scope="module")
def laboratory():
    """The bundled model, its transcoders, and the trace of one prompt."""
    lm, layers = tc.load_model(device="cpu"), tc.load_transcoders(device="cpu")
    return lm, layers, tc.trace(tc.ReplacementModel(lm, layers), "The war lasted from the year 1735 to the year 17")


def test_removal(laboratory, capsys):
    lm, layers, trace = laboratory
    table = tc.attribute(trace, targets.logit_difference(trace, "45", "20"))
    source = table[(table["kind"] == "feature") & (table["layer"] < max(layers))].iloc[1]
    context = (trace, "45", "20", source)
    checks.removal(lambda: -source["contribution"], *context)
    assert "correct: the model run without mlp" in capsys.readouterr().out
    answer = targets.logit_difference(trace, "45", "20").value(trace)
    activation = trace.features[source["layer"]][source["position"], source["feature"]]
    wrong = {
        "sign": source["contribution"],
        "answer that remains": lambda: answer - source["contribution"],
        "feature's activation": activation,
        "before anything": answer,
        "attribution table": 0.123,
    }
    for word, value in wrong.items():
        assert word in refused(checks.removal, value, *context)
    removed = interventions.set_features(source["layer"], layers[source["layer"]], [source["feature"]], 0.0, -1)
    logits = interventions.run(lm, trace.tokens[None], removed)[0, -1]
    free = (logits - trace.logits[-1])[[lm.tokenizer.convert_tokens_to_ids(word) for word in ("45", "20")]]
    assert "set free" in refused(checks.removal, free[0] - free[1], *context)


def test_cross_removal(laboratory, capsys):
    lm, _, _ = laboratory
    parts = {layer: make_transcoder(layer, d_model=lm.cfg.d_model, seed=1, n_writes=3 - layer) for layer in range(3)}
    trace = tc.trace(
        tc.ReplacementModel(lm, parts), "The war lasted from the year 1735 to the year 17", check_fit=False
    )
    table = tc.attribute(trace, targets.feature(trace, 2, 5)).query("kind == 'feature' and layer == 0")
    source = table.iloc[0]
    writes = table[table["feature"] == source["feature"]].set_index("written")["contribution"]
    context = (trace, source, 2, 5)
    checks.cross_removal(lambda: -writes.sum(), *context)
    assert "correct: the model run without layer 0's feature" in capsys.readouterr().out
    z = trace.features[0][-1, int(source["feature"])]
    wrong = {
        "several writes": -writes[0],
        "sign": writes.sum(),
        "feature's activation": z,
        "sum the feature's rows": 0.123,
    }
    for word, value in wrong.items():
        assert word in refused(checks.cross_removal, value, *context)


def test_two_tokens(laboratory, capsys):
    lm, layers, trace = laboratory
    generator = torch.Generator().manual_seed(0)
    inputs = trace.cache["blocks.1.ln2.hook_normalized"][1:]
    written, read = torch.randn(2, 256, generator=generator)
    context = (trace, 1, written, read, inputs)
    norm, mlp = lm.blocks[1].ln2, lm.blocks[1].mlp
    along = torch.func.jvp(
        lambda x: mlp((norm.weight * x + norm.bias)[None])[0], (inputs,), (written.expand_as(inputs),)
    )
    factors = along[1] @ read
    high, low = int(factors.argmax()), int(factors.argmin())
    checks.two_tokens(lambda: (high, low), *context)
    assert "correct" in capsys.readouterr().out
    least = int(factors.abs().argmin())
    order = (factors - factors.median()).abs().argsort().tolist()
    middle = next(i for i in order if i != least)
    wrong = {
        "places among": (high, 5000),
        "twice": (high, high),
        "order": (low, high),
        "most negative": (high, least),
        "one number per token": (middle, low),
    }
    for word, value in wrong.items():
        assert word in refused(checks.two_tokens, value, *context)
    assert "places among" in refused(checks.two_tokens, None, *context)


def test_one_layer(laboratory, capsys):
    _, layers, trace = laboratory

    def parts(trace, layer, position, direction):
        z, transcoder = trace.features[layer][position], layers[layer]
        out = trace.cache[f"blocks.{layer}.hook_mlp_out"][position] @ direction
        bias = transcoder.b_dec @ direction
        A = trace.cache[f"blocks.{layer}.attn.hook_pattern"][:, position]
        v = trace.cache[f"blocks.{layer}.attn.hook_v"]
        attn = trace.model.blocks[layer].attn
        brought = torch.einsum("shd,hdm,m->hs", v, attn.W_O, direction)
        imitation = transcoder(trace.cache[transcoder.config.hook_in][position]) @ direction
        return z * (transcoder.W_dec @ direction), imitation, (out, bias, A, brought, attn.b_O @ direction)

    def answer(change=lambda f, error, bias, heads, b_O: (f, error, bias, heads, b_O), weighted=True):
        def layer_parts(*given):
            features, imitation, (out, bias, A, brought, b_O) = parts(*given)
            return change(features, out - imitation, bias, A * brought if weighted else brought, b_O)

        return layer_parts

    checks.one_layer(answer(), trace)
    assert "correct" in capsys.readouterr().out
    wrong = {
        "has a bias too": answer(lambda f, error, bias, heads, b: (f, error + bias, bias, heads, b)),
        "sign of the error": answer(lambda f, error, bias, heads, b: (f, -error, bias, heads, b)),
        "not the error yet": answer(lambda f, error, bias, heads, b: (f, error + bias + f.sum(), bias, heads, b)),
        "not weighted": answer(weighted=False),
        "order of the heads": answer(lambda f, error, bias, heads, b: (f, error, bias, heads.T, b)),
        "the shape": answer(lambda f, error, bias, heads, b: (f, error, bias, heads.sum(1), b)),
        "return features": answer(lambda f, *rest: f.sum()),
        "return `": lambda *given: None,
    }
    for word, value in wrong.items():
        assert word.rstrip("`").strip() in refused(checks.one_layer, value, trace), word


def test_moving_head(laboratory, capsys):
    lm, _, trace = laboratory
    ids = gt.year_tokens(lm.tokenizer)
    other = trace.tokens.clone()
    other[8] = ids[80]
    context = (lm, trace.tokens, other, ids, torch.arange(100) > 35)
    _, there = lm.run_with_cache(other[None])
    _, here = lm.run_with_cache(trace.tokens[None])
    moves = {}
    for layer in range(3):
        for head in range(lm.cfg.n_heads):
            z = there[f"blocks.{layer}.attn.hook_z"][:, -1, head]
            logits = interventions.run(lm, trace.tokens[None], interventions.ablate_head(layer, head, z, -1))[
                0, -1, ids
            ]
            moves[layer, head] = float(logits[36:].mean() - logits[:36].mean())
    whole_model = float(trace.logits[-1][ids][36:].mean() - trace.logits[-1][ids][:36].mean())
    moves = {name: value - whole_model for name, value in moves.items()}
    best = max(moves, key=lambda name: abs(moves[name]))
    checks.moving_head(lambda: best, *context)
    assert "correct" in capsys.readouterr().out
    other_sign = max(moves, key=lambda name: -moves[name] * np.sign(moves[best]))
    looking = {name: float(here[f"blocks.{name[0]}.attn.hook_pattern"][0, name[1], -1, 8]) for name in moves}
    looking = max(looking, key=looking.get)
    idle = min(moves, key=lambda name: abs(moves[name]))
    wrong = {
        "layer, then the head": best[::-1],
        "up or down": other_sign,
        "one head at a time": idle,
        "two numbers": None,
    }
    if looking not in (best, other_sign):
        wrong["looks most"] = looking
    for word, value in wrong.items():
        assert word in refused(checks.moving_head, value, *context)
    assert len(wrong) >= 4


def replaced(live, group, how, choose=None):
    """Right for exercise 06b.1; ``choose`` gives the rows for "resample"."""
    if how == "zero":
        return torch.zeros_like(live)
    if how == "mean":
        return own_means(live, group)
    value = live.clone()
    for g in group.unique():
        rows = (group == g).nonzero()[:, 0]
        value[rows] = live[rows.roll(1) if choose is None else choose(rows)]
    return value


def test_ablation_value(capsys):
    checks.ablation_value(replaced)
    assert "correct: the same prompts, resampled" in capsys.readouterr().out

    def only(how, wrong):
        return lambda live, group, asked: wrong(live, group) if asked == how else replaced(live, group, asked)

    def in_place(live, group, how):
        value = replaced(live, group, how)
        live[:] = value
        return value

    wrong = {
        "nothing was replaced": only("zero", lambda live, group: live),
        "those are the means": only("zero", own_means),
        "one mean for all groups": only("mean", lambda live, group: live.mean(0).expand_as(live)),
        "unit by unit": only("mean", lambda live, group: live.mean(1, keepdim=True).expand_as(live)),
        "another group": only("resample", lambda live, group: live.roll(1, 0)),
        "kept its own row": only("resample", lambda live, group: live.clone()),
        "do not mix them": only("resample", own_means),
        "a row for every prompt": only("resample", lambda live, group: live[:1]),
        "return": only("resample", lambda live, group: None),
        "write into a copy": in_place,
    }
    for word, answer in wrong.items():
        assert word in refused(checks.ablation_value, answer), word


def test_blind_rule(capsys):
    vocabulary = np.array([" a", " b", " c", " d", " e"], dtype=object)
    tokens = np.random.default_rng(0).choice(vocabulary, (6, 50))
    tokens[:, 0] = "\n"
    text = rules.Words(tokens, np.full(tokens.shape, "plain", dtype=object), tokens != "\n")
    truth = {0: "tokens@-2:  b", 1: "tokens@-3:  a && tokens:  c", 2: "before 1:  d"}
    z = np.stack([np.where(rules.parse(line).hits(text), 2.0, 0.0) for line in truth.values()], axis=-1)
    context = (truth, text, z)  # here the seal is the rule itself
    for right in (lambda seal: seal, rules.parse, lambda seal: "tokens:  a" if seal == truth[1] else seal):
        checks.blind_rule(right, *context)
    assert capsys.readouterr().out.count("correct: ") == 3
    wrong = {
        "wrong place: 2 tokens too early": lambda seal: f"tokens:  {seal[-1]}",
        "leading space": lambda seal: "tokens: b",
        "claims nothing": lambda seal: "regex: .",
        "the grammar": lambda seal: "fires on b",
        "a fifth": lambda seal: "!" + seal,
        "recur in all readings": lambda seal: "tokens:  e && tokens@1:  e",
    }
    for word, player in wrong.items():
        assert word in refused(checks.blind_rule, player, *context)
    assert "the grammar" in refused(checks.blind_rule, lambda seal: None, *context)


TAUGHT = [path for path in COMMITTED if students.exercises(nbformat.read(path, 4))]
each_taught = pytest.mark.parametrize("path", TAUGHT, ids=lambda path: path.stem)


STUB = re.compile(r" *# YOUR CODE HERE\n +raise NotImplementedError\(\)")
# Where later cells use the answer, they go on with ours while the exercise is open.
CHECK = re.compile(r"checks\.(\w+)\((my_\w+)(?:, .*)?\)(?:\n\2 = answered\(\2, .+\))?")


def folded_solution(task: str) -> str:
    return re.search(r"<summary>Solution</summary>\n\n```python\n(.*?)```", task, re.DOTALL)[1]


def test_every_notebook_has_an_exercise_but_the_first_an_appendix_and_the_one_for_own_prompts():
    assert [path.stem.split("_")[0] for path in COMMITTED if path not in TAUGHT] == ["00", "01b", "08"]


@each_taught
def test_exercises_are_complete(path):
    notebook = nbformat.read(path, 4)
    found = students.exercises(notebook)
    number = path.stem.split("_")[0]
    assert [exercise.number for exercise in found] == [f"{number}.{i + 1}" for i in range(len(found))]
    solved = students.solved(notebook)
    names = [cell.metadata.nbgrader.grade_id for cell in notebook.cells if "nbgrader" in cell.metadata]
    assert len(set(names)) == len(names) == 2 * len(found)
    for exercise in found:
        task, answer, check = (notebook.cells[exercise.task + i].source for i in range(3))
        assert "<summary>Hint</summary>" in task
        assert STUB.search(answer) and students.BEGIN not in answer
        filled = solved.cells[exercise.task + 1].source.split(students.BEGIN)[1].split(students.END)[0]
        assert textwrap.dedent(filled.rstrip().strip("\n")) == folded_solution(task).strip()
        assert CHECK.fullmatch(check)
    checked = {CHECK.fullmatch(notebook.cells[e.task + 2].source)[1] for e in found}
    assert checked <= set(checks.__all__)


def test_ours_are_the_folded_solutions():
    ours = {node.name: node.body[1:] for node in ast.parse(inspect.getsource(solutions)).body if hasattr(node, "name")}
    folded = {}
    for path in TAUGHT:
        cells = nbformat.read(path, 4).cells
        for exercise in students.exercises(nbformat.read(path, 4)):
            body = textwrap.indent(folded_solution(cells[exercise.task].source), "    ")
            name = CHECK.fullmatch(cells[exercise.task + 2].source)[1]
            folded[name] = ast.parse(f"def ours():\n{body}").body[0].body
    for name, body in ours.items():  # what the answer cell gives may stand in front
        wanted = list(map(ast.dump, folded[name]))
        assert [ast.dump(statement) for statement in body][-len(wanted) :] == wanted, name


def test_every_check_is_used_and_tested():
    used = set()
    for path in TAUGHT:
        notebook = nbformat.read(path, 4)
        used |= {CHECK.fullmatch(notebook.cells[e.task + 2].source)[1] for e in students.exercises(notebook)}
    assert used == set(checks.__all__)
    here = (REPO / "tests" / "test_teaching.py").read_text(encoding="utf-8")
    for name in checks.__all__:
        assert name in ANSWERS or f"def test_{name}(" in here


@each_taught
def test_student_copy_differs_only_in_outputs_of_exercises(path):
    notebook = students.without_address(nbformat.read(path, 4))
    made = students.student_copy(notebook)
    parts = {e.task + i for e in students.exercises(notebook) for i in (1, 2)}
    for index, (cell, copied) in enumerate(zip(notebook.cells, made.cells, strict=True)):
        assert cell.source == copied.source
        assert not copied.outputs if index in parts else cell == copied
    nbformat.validate(made)


def found_diagrams(notebooks):
    """How many diagrams the prose of notebooks shows; each must be there, seen from its notebook's folder."""
    found = [(p, d) for p in notebooks for d in re.findall(r"\]\(([^)\s]*\.svg)\)", p.read_text(encoding="utf-8"))]
    assert all((path.parent / diagram).is_file() for path, diagram in found)
    return len(found)


def test_diagrams_are_found_from_every_folder(tmp_path):
    serve.copy(REPO / "notebooks", tmp_path / "runs" / "mine")
    copied = sorted((tmp_path / "runs" / "mine").glob("*.ipynb"))
    assert len(copied) == len(COMMITTED) and found_diagrams(copied) == found_diagrams(COMMITTED) > 0


def test_copies_are_written_where_there_are_exercises(tmp_path):
    written = students.write_copies(REPO / "notebooks", tmp_path / "student")
    assert [path.name for path in written] == [path.name for path in TAUGHT]
    assert found_diagrams(written)
    sources = students.write_grading_sources(REPO / "notebooks", tmp_path / "course")
    assert sources[0] == tmp_path / "course/source" / TAUGHT[0].stem / TAUGHT[0].name
    text = sources[0].read_text(encoding="utf-8")
    assert "<summary>Hint</summary>" in text and "<summary>Solution</summary>" not in text
    assert students.BEGIN in text and "YOUR CODE HERE" not in text and "checks.graded." in text
    assert json.loads(text)["nbformat"] == 4


def test_broken_exercises_are_refused():
    task = "**Exercise 09.1: x** (difficulty 1 of 5, importance 1 of 5, 5 minutes)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(task)])
    with pytest.raises(ValueError, match="09.1 lacks"):
        students.exercises(notebook)


def errors(notebook) -> dict[int, str]:
    """Cell index -> name of the error that it ended with."""
    found = {}
    for index, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", ()):
            if output.output_type == "error":
                found[index] = output.ename
    return found


def run(notebook, folder):
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, kernel_name="python3", timeout=300, allow_errors=True, resources=resources).execute()
    return notebook


def with_wrong_answers(notebook):
    """Each answer cell made to return nothing."""
    made = copy.deepcopy(notebook)
    for exercise in students.exercises(made):
        answer = made.cells[exercise.task + 1]
        answer.source = answer.source.replace("raise NotImplementedError()", "return None")
    return made


SHORT = [path for path in TAUGHT if path.stem.startswith("04b")]
LONG = [pytest.param(path, marks=pytest.mark.slow) for path in TAUGHT if path not in SHORT]


@pytest.mark.parametrize("path", [*SHORT, *LONG], ids=lambda path: path.stem)
def test_every_check_accepts_the_solution_and_stops_at_nothing_returned(path, tmp_path):
    if own_model(path) and not has_smollm2():
        pytest.skip(f"it needs {own_model(path)}: run `python -m tclib smollm2`")
    notebook = nbformat.read(path, 4)
    graded = [e.task + 2 for e in students.exercises(notebook)]
    executed = run(students.solved(notebook), tmp_path)
    assert not errors(executed)
    for index in graded:
        (output,) = merge_streams(executed.cells[index].outputs)  # a print may arrive in pieces
        assert output.name == "stdout" and output.text.startswith("correct: ") and output.text.count("\n") == 1
    if path in SHORT:
        failed = errors(run(with_wrong_answers(notebook), tmp_path))
        assert {index: failed.get(index) for index in graded} == dict.fromkeys(graded, "NotYet")


def references(page: str) -> list[str]:
    """What a browser would fetch to show a page."""
    fetched = re.findall(r"""<(?:img|script|iframe|source|link)\b[^>]*?(?:src|href)=["']([^"']*)""", page)
    fetched += re.findall(r"url\(([^)]*)\)|@import ([^;]*)", page)
    return [address for address in fetched if not str(address).startswith("data:")]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_report_needs_nothing_from_outside(path):
    notebook = nbformat.read(path, 4)
    page = report.render(notebook, path.name, path.parent)
    assert references(page) == []
    figures = sum("image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", ()))
    images = re.findall(r"<img\b[^>]*>", page)
    alternatives = [re.search(r'\balt="([^"]*)"', image) for image in images]
    assert len(images) >= figures and all(alt and len(alt[1]) > 40 for alt in alternatives)
    words = re.sub(r"<(pre|code|style|math)\b.*?</\1>|<[^>]*>", "", page, flags=re.DOTALL)
    assert "$$" not in words and not re.search(r"\\(?:mathrm|frac|sum|text)\b", words)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    prose = re.sub(r"```.*?```|`[^`]*`", "", prose, flags=re.DOTALL)  # no formulas in code
    assert page.count("<math") == len(re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", prose, flags=re.DOTALL))
    assert "<title>" in page and '<html lang="en">' in page


def test_report_shows_formulas_code_and_figures():
    png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    figure = nbformat.v4.new_output("display_data", {"image/png": png})
    prose = "# A title\n\nLook at $x_1$ and\n\n$$\\frac{a}{b}$$\n\n![a badge](https://example.org/badge.svg)"
    cells = [
        nbformat.v4.new_markdown_cell(prose),
        nbformat.v4.new_code_cell("draw(1 < 2)", execution_count=1, outputs=[figure]),
    ]
    page = report.render(nbformat.v4.new_notebook(cells=cells))
    assert "<title>A title</title>" in page and "<mfrac>" in page and "<msub>" in page
    assert "a badge" in page and "example.org" not in page and references(page) == []
    assert 'alt="A title Look at x_1 and' in page and "&lt;" in page


def test_report_refuses_what_was_not_run(tmp_path, capsys):
    cell = nbformat.v4.new_code_cell("1 + 1")
    with pytest.raises(report.NotExecuted, match="cell 1 of x was not executed"):
        report.render(nbformat.v4.new_notebook(cells=[cell]), "x")
    failed = nbformat.v4.new_output("error", ename="E", evalue="e", traceback=[])
    cell = nbformat.v4.new_code_cell("1 / 0", execution_count=1, outputs=[failed])
    with pytest.raises(report.NotExecuted, match="ended with an error"):
        report.render(nbformat.v4.new_notebook(cells=[cell]))
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "mine.ipynb")
    assert teach.report([str(tmp_path / "mine.ipynb")], tmp_path) == 2
    assert teach.report(["99"], REPO) == 2
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.skipif(report.chromium() is None, reason="no Chromium is installed")
def test_report_prints_a_pdf(tmp_path):
    (tmp_path / "notebooks").mkdir()
    cells = [nbformat.v4.new_markdown_cell("# A page\n\n$x$")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks/01_page.ipynb")
    assert teach.report(["01"], tmp_path) == 0
    assert (tmp_path / "build/report/01_page.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(RuntimeError, match="printed no PDF"):
        report.print_pdf("true", tmp_path / "build/report/01_page.html")


def test_student_command(tmp_path, capsys):
    (tmp_path / "notebooks").mkdir()
    shutil.copy(TAUGHT[0], tmp_path / "notebooks")
    stale = tmp_path / "build/student/99_gone.ipynb"
    stale.parent.mkdir(parents=True)
    stale.touch()
    assert teach.student([], tmp_path) == teach.student(["--graded"], tmp_path) == 0
    name = TAUGHT[0].name
    expected = [Path("build/student", name), Path("build/nbgrader/source", TAUGHT[0].stem, name)]
    assert capsys.readouterr().out.split() == [str(path) for path in expected]
    assert all((tmp_path / path).is_file() for path in expected) and not stale.exists()
    config = tmp_path / "build/nbgrader/nbgrader_config.py"
    assert teach.KERNEL in config.read_text(encoding="utf-8")
    config.write_text("# a teacher's own", encoding="utf-8")
    assert teach.student(["--graded"], tmp_path) == 0 and config.read_text(encoding="utf-8") == "# a teacher's own"


def test_deleted_and_copied_cells_are_named(tmp_path, capsys):
    notebook = nbformat.read(TAUGHT[0], 4)
    first, second = students.exercises(notebook)[:2]
    for student, change in {"right": 0, "deleted": -1, "copied": 1}.items():
        made = students.student_copy(notebook)
        if change < 0:
            del made.cells[first.task + 2]
        elif change > 0:
            made.cells.insert(second.task + 1, made.cells[second.task + 1])
        (tmp_path / student).mkdir()
        nbformat.write(made, tmp_path / student / TAUGHT[0].name)
    assert teach.student(["--inspect", str(tmp_path)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[0].startswith("copied") and "is there 2 times" in said[0]
    assert said[1].startswith("deleted") and f"ex-{first.number.replace('.', '-')}-check was deleted" in said[1]
    shutil.rmtree(tmp_path / "copied"), shutil.rmtree(tmp_path / "deleted")
    assert teach.student(["--inspect", str(tmp_path)]) == 0


def test_bundle_asks_pip_for_everything(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(teach.subprocess, "call", lambda command, cwd: calls.append(command) or 3)
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    assert teach.bundle([]) == 3
    monkeypatch.setenv("TORCH_INDEX", "https://index.invalid")
    assert teach.bundle([]) == 3
    everything, torch_alone = calls
    assert {"constraints.txt", ".[gguf,notebooks,teaching,test,ui]", "hatchling>=1.24", "editables"} <= set(everything)
    assert "https://index.invalid" in torch_alone and torch_alone[-1].startswith("torch==")


def test_commands_are_announced():
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    for command in ("student", "bundle", "report"):
        assert command in bootstrap.COMMANDS and re.search(rf"^[\w -]*\b{command}\b[\w -]*:", makefile, re.MULTILINE)
        assert callable(getattr(teach, command))


TEACHING = (REPO / "TEACHING.md").read_text(encoding="utf-8")


def test_teaching_page_is_fresh():
    assert TEACHING == exercise_table.fresh(), "run: python tools/exercise_table.py"


def test_teaching_page_names_what_there_is():
    numbers = {e.number for path in TAUGHT for e in students.exercises(nbformat.read(path, 4))}
    assert set(re.findall(r"\b\d\d[a-z]?\.\d\b", TEACHING)) == numbers
    measured = TEACHING.split("<!-- measured:start -->")[1].split("<!-- measured:end -->")[0]
    for path in TAUGHT:
        assert path.stem in measured
    for path in re.findall(r"`((?:tclib|tests|tools)/[\w/.]*)`", TEACHING):
        assert (REPO / path).exists(), path


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_notebook_says_what_it_lacks_and_ends_with_reading_and_a_question(path):
    notebook = nbformat.read(path, 4)
    (install,) = [cell for cell in notebook.cells if "install" in cell.metadata.get("tags", ())]
    assert 'find_spec("tclib") is None' in install.source and not install.outputs
    closing = "\n\n".join(cell.source for cell in notebook.cells[-3:] if cell.cell_type == "markdown")
    ends = re.search(r"## Further reading\n\n(.+)\n\n## An open question\n\n(.+)", closing, re.DOTALL)
    assert ends, "it ends without further reading and an open question"
    reading, question = ends.groups()
    assert reading.count("https://") >= 2 and "?" in question


def names_an_address(text: str) -> bool:
    return "git+https://" in text or "mybinder.org" in text or "colab.research" in text or "OWNER" in text


def test_no_committed_file_names_an_address_before_there_is_one():
    files = [
        path
        for kind in ("*.md", "*.toml", "*.yml", "*.cff", "docs/*.md", "notebooks/*.ipynb")
        for path in REPO.glob(kind)
    ]
    assert len(files) > 15 and not [path for path in files if "OWNER" in path.read_text(encoding="utf-8")]
    if address.published() is None:
        assert not [path for path in COMMITTED if names_an_address(path.read_text(encoding="utf-8"))]


@pytest.fixture
def copies(tmp_path):
    """A repository of two notebooks, one of them with exercises."""
    (tmp_path / "notebooks").mkdir()
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    for path in (COMMITTED[0], TAUGHT[0]):
        shutil.copy(path, tmp_path / "notebooks")
    return tmp_path


def test_address_is_set_everywhere_moved_and_kept_out_of_copies(copies):
    before = (copies / "notebooks" / TAUGHT[0].name).read_text(encoding="utf-8")
    for new in ("someone/a-copy", "someone-else/moved"):
        made = address.publish(new, copies)
        assert len(made) == 3 and address.published(copies) == new
        assert all(new in path.read_text(encoding="utf-8") for path in made)
    assert not [path for path in made if "someone/a-copy" in path.read_text(encoding="utf-8")]
    notebook = nbformat.read(copies / "notebooks" / TAUGHT[0].name, 4)
    nbformat.validate(notebook)
    assert f"someone-else/moved/blob/main/notebooks/{TAUGHT[0].name}" in notebook.cells[2].source
    for made in (students.student_copy(notebook), students.grading_source(notebook)):
        assert not names_an_address(nbformat.writes(made))
    assert nbformat.writes(students.without_address(notebook)).strip() == before.strip()
    with pytest.raises(ValueError, match="not an address"):
        address.publish("https://somewhere", copies)


def test_first_cell_installs_only_on_colab_and_only_what_was_published(copies, monkeypatch):
    address.publish("someone/a-copy", copies)
    published = nbformat.read(copies / "notebooks" / TAUGHT[0].name, 4)
    calls = []
    monkeypatch.setattr("subprocess.run", lambda command, check: calls.append(command))
    for notebook in (published, students.student_copy(published)):
        (source,) = [c.source for c in notebook.cells if "install" in c.metadata.get("tags", ())]
        exec(source, {})  # here tclib can be imported
        assert calls == []
        with monkeypatch.context() as context:
            context.setattr("importlib.util.find_spec", lambda name: None)
            if notebook is published:
                exec(source, {})
                assert calls.pop()[-1] == "tclib[ui] @ git+https://github.com/someone/a-copy"
            else:
                with pytest.raises(ModuleNotFoundError, match="this kernel has no tclib: start JupyterLab by"):
                    exec(source, {})


def test_cells_are_not_counted_in_prose():
    """Numbers of cells change with what stands before them."""
    for path in COMMITTED:
        prose = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]
        assert not re.search(r"\b(first|second|third|fourth|fifth) (code )?cell\b", "\n".join(prose)), path.name
