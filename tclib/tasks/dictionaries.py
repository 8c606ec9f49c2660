"""Dictionaries of any kind for one MLP or one attention layer, and the four measures that compare them.

A dictionary reads one place of the model, writes another, and is a rule for a code of few units and a vector for each
unit. What it writes stands in for the model's own: its error, the model's loss, the agreement of its units with the
labels of the chronicle, and the greater-than task with few units kept are the measures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib import text
from tclib.activations import check_layers, hook_in, hook_out
from tclib.evaluation import baselines, ground_truth
from tclib.inputs import words
from tclib.tasks import greater_than as gt

NOUNS = ["war", "siege", "reign", "voyage"]
BATCH, RATE = 1024, 2e-3
Acts = Mapping[str, Float[Tensor, "token width"]]


class Dictionary(NamedTuple):
    """What is put in place of ``writes`` is ``encode(v, k) @ D + rest(v)``, for ``v`` from ``reads``."""

    reads: str
    writes: str
    encode: Callable[[Tensor, int], Tensor]
    D: Float[Tensor, "unit width"]
    rest: Callable[[Tensor], Tensor | float] = lambda v: 0.0

    def rebuilt(self, z: Float[Tensor, "token unit"], v: Float[Tensor, "token width"]) -> Tensor:
        """What stands in place of the activation for a code and what was read."""
        return z @ self.D + self.rest(v)


class Bench:
    """The MLP and the attention layer that greater-than needs most, their activations, and a table of measures.

    Activations are centred and divided by their typical length, so a mean squared error is an FVU; neurons stay as they
    are. BOS is left out. ``train`` is half chronicle and half sampled text, and ``held_out`` is unseen; ``choose`` and
    ``test`` are chronicle text on which labels are chosen and scored; ``fit`` and ``few`` are thinned copies of the
    first two.

    Args:
        layer: the MLP to take apart; -1 for the one whose mean over the start years costs the task most.
        rows: rows of text to learn from.
        k: units that a dictionary may use at one token.

    Raises:
        ValueError: the model has no such layer, or its tokenizer does not write years in two tokens.
    """

    @torch.no_grad()
    def __init__(self, model: TransformerBridge, layer: int = -1, rows: int = 160, k: int = 16, seed: int = 0):
        check_layers(model, [max(layer, 0)])
        self.model, self.k = model, k
        self.prompts = gt.prompts(model.tokenizer, NOUNS, [17], gt.YEARS[::6])
        blocks = range(model.cfg.n_layers)
        mlps, attentions = [hook_out(i) for i in blocks], [f"blocks.{i}.attn.hook_z" for i in blocks]
        whole = self.difference()
        at_mean = {name: gt.mean_over_years(self._at_end(name), self.prompts) for name in mlps + attentions}
        self.drops = {name: whole - self.difference(self.put(name, value)) for name, value in at_mean.items()}
        self.key = _layer(max(mlps, key=self.drops.__getitem__)) if layer == -1 else layer
        self.IN, self.NEURONS, self.OUT = hook_in(self.key), baselines.neuron_hook(self.key), hook_out(self.key)
        self.ATTN = max(attentions, key=self.drops.__getitem__)
        self.ends = {name: self._at_end(name) for name in self.places}
        self._collect(rows, seed)
        zero = {name: [(name, lambda y, hook: torch.zeros_like(y))] for name in (self.OUT, self.ATTN)}
        self.floor, self.whole = {name: self.loss(hooks) for name, hooks in zero.items()}, self.loss([])
        self.table: dict[str, dict[str, float]] = {}
        self.made: dict[str, Dictionary] = {}
        self.f1s: dict[str, pd.Series] = {}
        self.bands: dict[str, list[float]] = {}

    @property
    def places(self) -> list[str]:
        """What the MLP reads, its neurons, what it writes, and what the heads mix."""
        return [self.IN, self.NEURONS, self.OUT, self.ATTN]

    def score(self, name: str, d: Dictionary) -> pd.DataFrame:
        """All measures of a dictionary, kept in ``table`` under its name, as a row."""
        self.made[name], self.f1s[name], code = d, self.agreement(d), d.encode(self.held_out[d.reads], self.k)
        recovered = (self.floor[d.writes] - self.loss(self.spliced(d))) / (self.floor[d.writes] - self.whole)
        active = code != 0
        self.table[name] = {
            "L0": active.sum(1).float().mean().item(),
            "dead": (~active).all(0).float().mean().item(),
            "FVU": self.fvu(d),
            "CE recovered": recovered,
            "F1": self.f1s[name].mean(),
            "PD": self.kept(d, self.k),
        }
        return pd.DataFrame(self.table).T.tail(1).round(3)

    def control(self, name: str, make: Callable[[int], Dictionary], draws: int) -> None:
        """FVU of ``draws`` dictionaries without the learning, ``make(0)``, ``make(1)`` ..., beside the real one."""
        self.bands[name] = [self.fvu(make(seed), self.few) for seed in range(draws)]
        print(f"{name}: FVU {self.fvu(self.made[name], self.few):.3f}; {draws} controls {band(self.bands[name])}")

    def fvu(self, d: Dictionary, acts: Acts | None = None, k: int | None = None) -> float:
        """The fraction of variance that a dictionary leaves unexplained, on held-out text unless told otherwise."""
        acts = self.held_out if acts is None else acts
        v, y = acts[d.reads], acts[d.writes]
        wrong = y - d.rebuilt(d.encode(v, self.k if k is None else k), v)
        return (wrong.square().sum() / (y - y.mean(0)).square().sum()).item()

    def spliced(self, d: Dictionary) -> list[tuple]:
        """Hooks that put the dictionary in place of what it rebuilds, at every token but BOS."""
        seen = {}

        def remember(v, hook):
            seen["v"] = (v.flatten(2).flatten(0, 1) - self.mean[d.reads]) / self.size[d.reads]

        def replace(y, hook):
            code = d.encode(seen["v"], self.k)
            new = d.rebuilt(code, seen["v"]) * self.size[d.writes] + self.mean[d.writes]
            return torch.cat([y[:, :1], new.reshape(y.shape)[:, 1:]], 1)

        return [(d.reads, remember), (d.writes, replace)]

    def loss(self, hooks: list[tuple], rows: Int[Tensor, "row pos"] | None = None) -> float:
        """The cross-entropy of held-out text with hooks, in nats."""
        rows = self.held_out_rows if rows is None else rows
        log_p = self.model.run_with_hooks(rows, fwd_hooks=hooks)[:, :-1].log_softmax(-1)
        said = words(self.model, rows[:, 1:])
        return -log_p.gather(-1, rows[:, 1:, None])[said].mean().item()

    def agreement(self, d: Dictionary, every: int = 1) -> pd.Series:
        """F1 of each label's best unit: unit and threshold chosen on one split, scored on another."""
        codes = [d.encode(part[d.reads][::every], self.k).numpy() for part in (self.choose, self.test)]
        chosen, scored = (truth.iloc[::every] for truth in self.truths[1:])
        return ground_truth.score(codes[0], chosen, codes[1], scored).labels.set_index("label").f1

    def kept(self, d: Dictionary, n: int, live: Int[Tensor, " unit"] | None = None) -> float:
        """Probability difference with n units live and all others at their mean over YY, at the last token."""
        v = (self.ends[d.reads] - self.mean[d.reads]) / self.size[d.reads]
        z = d.encode(v, self.k)
        live = (z.var(0) * d.D.square().sum(1)).topk(n).indices if live is None else live
        frozen = gt.mean_over_years(z, self.prompts)
        frozen[:, live] = z[:, live]
        y = d.rebuilt(frozen, gt.mean_over_years(v, self.prompts))
        return self.difference(self.put(d.writes, y * self.size[d.writes] + self.mean[d.writes]))

    def difference(self, hooks: Callable | Sequence = ()) -> float:
        """The mean probability difference of the prompts."""
        return gt.probability_difference(gt.run(self.model, self.prompts, hooks), self.prompts.years).mean().item()

    @staticmethod
    def put(name: str, values: Float[Tensor, "prompt width"]) -> Callable:
        """Hooks that write values at the last token of the prompts."""

        def edit(v: Tensor, rows: slice) -> Tensor:
            v = v.clone()
            v[:, -1] = values[rows].reshape(v[:, -1].shape)
            return v

        return lambda rows: [(name, lambda v, hook: edit(v, rows))]

    def _at_end(self, name: str) -> Float[Tensor, "prompt width"]:
        return gt.at_last_token(self.model, self.prompts, _layer(name), [name])[0].flatten(1)

    def _collect(self, rows: int, seed: int) -> None:
        texts = [text.chronicle(self.model, n, seed + i) for i, n in enumerate((rows // 2, 32, 32))]
        self.sampled = text.load_text(self.model, "sampled", rows // 2 + 16, seed)
        self.held_out_rows = torch.cat([texts[2].tokens[:16], self.sampled[:16]])
        learn_rows = torch.cat([texts[0].tokens, self.sampled[16:]])
        raw = [self._read(tokens) for tokens in (learn_rows, self.held_out_rows, texts[1].tokens, texts[2].tokens)]
        self.mean = {name: v.mean(0) for name, v in raw[0].items()}
        self.size = {name: (v - self.mean[name]).square().sum(1).mean().sqrt() for name, v in raw[0].items()}
        self.mean[self.NEURONS], self.size[self.NEURONS] = torch.zeros(()), torch.ones(())
        parts = [{name: (v - self.mean[name]) / self.size[name] for name, v in part.items()} for part in raw]
        self.train, self.held_out, self.choose, self.test = parts
        self.fit, self.few = _thinned(self.train, 4000), _thinned(self.held_out, 500)
        truths = [ground_truth.truth(one) for one in texts]
        labels = [name for name in truths[0] if all(name in truth for truth in truths)]
        self.truths = [truth.loc[:, labels] for truth in truths]

    def _read(self, tokens: Int[Tensor, "row pos"]) -> dict[str, Float[Tensor, "token width"]]:
        deepest = max(self.key, _layer(self.ATTN))
        _, cache = self.model.run_with_cache(tokens, names_filter=self.places, stop_at_layer=deepest + 1)
        keep = words(self.model, tokens)
        return {name: cache[name][keep].flatten(1) for name in self.places}


def learn(loss: Callable[[Tensor], Tensor], weights: Sequence[Tensor], tokens: int, steps: int, seed: int) -> None:
    """Adam on ``loss(which tokens)``, with a rate that falls to zero; the weights are changed in place."""
    order = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam([w.requires_grad_() for w in weights])
    for step in range(steps):
        adam.param_groups[0]["lr"] = RATE * (1 - step / steps)
        adam.zero_grad()
        with torch.enable_grad():
            loss(torch.randint(tokens, (BATCH,), generator=order)).backward()
        adam.step()
    for w in weights:
        w.requires_grad_(False)


def topk_dictionary(
    bench: Bench, reads: str, writes: str, units: int, steps: int, seed: int, skip: bool = False
) -> Dictionary:
    """A TopK transcoder (``reads`` the MLP's input), skip transcoder or SAE (``reads`` what it writes).

    It learns by `learn`, as every other dictionary of the bench does, so that they are compared at equal training;
    `tclib.train` would give each of these a recipe of its own.
    """
    V, Y = bench.train[reads], bench.train[writes]
    D = directions(units, Y.shape[1], seed)
    E, b, c, S = D.T.clone(), torch.zeros(units), torch.zeros(Y.shape[1]), torch.zeros(V.shape[1], Y.shape[1])

    def loss(at: Tensor) -> Tensor:
        v = V[at]
        return (Y[at] - top_k(v @ E + b, bench.k) @ D - c - v @ S).square().sum(1).mean()

    learn(loss, [D, E, b, c] + [S] * skip, len(Y), steps, seed)
    return Dictionary(reads, writes, lambda v, k: top_k(v @ E + b, k), D, lambda v: c + v @ S)


def top_k(pre: Float[Tensor, "token unit"], k: int) -> Float[Tensor, "token unit"]:
    """The k largest positive pre-activations, and zero elsewhere."""
    values, index = pre.relu().topk(k)
    return torch.zeros_like(pre).scatter(-1, index, values)


def directions(n: int, width: int, seed: int) -> Float[Tensor, "n width"]:
    """Random directions of length 1."""
    return F.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def band(values: Sequence[float]) -> str:
    """The range and the median of some controls."""
    return f"{min(values):.3f} to {max(values):.3f}, median {np.median(values):.3f}"


def _thinned(acts: Acts, n: int) -> dict[str, Tensor]:
    return {name: v[:: max(1, len(v) // n)] for name, v in acts.items()}


def _layer(name: str) -> int:
    return int(name.split(".")[1])
