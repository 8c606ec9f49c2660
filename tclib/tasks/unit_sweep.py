"""How many units of an MLP are enough? The probability difference with k of them live, for many k; steps they make.

The k units are nested, so the residual stream after the MLP is a running sum to which one unit at a time is added,
and everything before it is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.inputs import check_layers
from tclib.tasks import greater_than as gt
from tclib.tasks.shared_prefix import SharedPrefix
from tclib.transcoder import Transcoder

Order = Literal["variance", "random"]
Rest = Literal["mean", "zero"]


@torch.no_grad()
def rank_units(
    model: TransformerBridge,
    prompts: gt.Prompts,
    layer: int,
    transcoder: Transcoder | None = None,
    order: Order = "variance",
    seed: int = 0,
) -> Int[Tensor, " unit"]:
    """All units of one MLP: features, or neurons where no transcoder is given, in the order in which to keep them.

    "variance" over YY within noun and century, at the last token (the paper's order); "random" draws among units that
    vary there.
    """
    units = units_at_last_token(model, prompts, layer, transcoder)
    variance = (units - gt.mean_over_years(units, prompts)).square().mean(dim=0)
    if order == "variance":
        return variance.argsort(descending=True)
    if order != "random":
        raise ValueError(f"order is 'variance' or 'random', not {order!r}")
    shuffled = torch.randperm(len(variance), generator=torch.Generator().manual_seed(seed)).to(variance.device)
    return torch.cat([shuffled[(variance > 1e-12)[shuffled]], shuffled[(variance <= 1e-12)[shuffled]]])


@torch.no_grad()
def units_at_last_token(
    model: TransformerBridge, prompts: gt.Prompts, layer: int, transcoder: Transcoder | None = None
) -> Float[Tensor, "prompt unit"]:
    """Activations of the features, or of the neurons where no transcoder is given."""
    check_layers(model, [layer])
    gt.check_prompts(model, prompts)
    runs = (SharedPrefix(model, tokens, layer) for tokens, _ in alike(prompts))
    return torch.cat([_units(run, run.rest[:, -1], transcoder) for run in runs])


@torch.no_grad()
def keep_units(
    model: TransformerBridge,
    prompts: gt.Prompts,
    layer: int,
    ks: Sequence[int],
    ranked: Int[Tensor, " unit"],
    transcoder: Transcoder | None = None,
    rest: Rest = "mean",
) -> Float[Tensor, "k prompt 100"]:
    """Answers with the first k units of ``ranked`` live and the others held, for each k.

    Args:
        rest: "mean" holds the others at their mean over YY, at the last token only; earlier tokens keep the MLP.
            "zero" holds them at zero at all tokens, as the paper does. With a transcoder its output is in the MLP's
            place wherever units are held, without an error term.

    Raises:
        ValueError: a k beyond the number of units, a model other than GPT-2's kind, or another ``rest``.
    """
    check_layers(model, [layer])
    gt.check_prompts(model, prompts)
    if rest not in ("mean", "zero"):
        raise ValueError(f"rest is 'mean' or 'zero', not {rest!r}")
    if not ks or min(ks) < 0 or max(ks) > len(ranked):
        raise ValueError(f"k lies between 0 and the number of units, {len(ranked)}: {list(ks)}")
    ids = gt.year_tokens(model.tokenizer).to(model.cfg.device)
    W_U, b_U = model.W_U[:, ids], model.b_U[ids]
    sizes = torch.tensor(sorted(ks))
    ranked = ranked[: int(sizes[-1])]
    batches = []
    for tokens, _ in alike(prompts):
        kept = _Kept(model, tokens, layer, transcoder, rest)
        steps = [(kept.finish() @ W_U + b_U).softmax(-1).cpu() for _ in kept.add(ranked, sizes)]
        batches.append(torch.stack(steps))
    return torch.cat(batches, dim=1)


def alike(prompts: gt.Prompts) -> Iterator[tuple[Int[Tensor, "row pos"], slice]]:
    """Prompts of one noun and century together: they share the longest prefix. Rows are those of the frame."""
    codes = prompts.frame.groupby(["noun", "century"], sort=False).ngroup().to_numpy()
    first = 0
    for group in prompts.groups:
        _, sizes = np.unique(codes[first : first + len(group)], return_counts=True)
        for tokens in group.split(sizes.tolist()):
            yield tokens, slice(first, first + len(tokens))
            first += len(tokens)


def sweep(
    model: TransformerBridge,
    prompts: gt.Prompts,
    layer: int,
    ks: Sequence[int],
    transcoder: Transcoder | None = None,
    order: Order = "variance",
    rest: Rest = "mean",
    seed: int = 0,
) -> pd.DataFrame:
    """Probability difference with k units live, by noun and century; arguments as in `rank_units`, `keep_units`.

    Returns:
        ``k``, ``kind`` ("features", "random neurons", ...), ``noun``, ``century``, ``probability_difference``; the
        limits k = 0 and k = all units are always among the rows.
    """
    ranked = rank_units(model, prompts, layer, transcoder, order, seed)
    ks = sorted({0, len(ranked), *ks})
    answers = keep_units(model, prompts, layer, ks, ranked, transcoder, rest)
    kind = f"{order} " * (order != "variance") + ("neurons" if transcoder is None else "features")
    tables = [
        prompts.frame.assign(k=k, kind=kind, probability_difference=gt.probability_difference(a, prompts.years).numpy())
        for k, a in zip(ks, answers, strict=True)
    ]
    by_cell = pd.concat(tables).groupby(["k", "kind", "noun", "century"], sort=False)["probability_difference"]
    return by_cell.mean().reset_index()


def curve(table: pd.DataFrame) -> pd.Series:
    """Mean over nouns and centuries for each k of a `sweep`."""
    return table.groupby("k")["probability_difference"].mean()


def recovered(table: pd.DataFrame, k: int) -> float:
    """(m_k - m_0) / (m_full - m_0) of a `sweep`: 0 with no unit live, 1 with all; it may exceed 1."""
    m = curve(table)
    return float((m[k] - m[0]) / (m.iloc[-1] - m[0]))


def crossing(features: pd.DataFrame, neurons: pd.DataFrame) -> int | None:
    """The smallest k at which k neurons do at least as well as k features, after features led; None: never.

    Only a k that both sweeps have, and that is no limit of either, counts.

    Raises:
        ValueError: there is no such k.
    """
    m, n = curve(features), curve(neurons)
    lead = (m - n).dropna().drop([0, min(m.index[-1], n.index[-1])], errors="ignore")
    if lead.empty:
        raise ValueError("the two sweeps have no k in common besides their limits")
    behind = lead.index[(lead <= 0) & ((lead > 0).cumsum() > 0)]
    return int(behind[0]) if len(behind) else None


def fit_steps(effects: Float[Tensor, "unit 100"]) -> pd.DataFrame:
    """The best single step under each curve of effects on the logits of 00 to 99, by least squares.

    Returns:
        One row per curve: ``location`` (the step lies between this number and the next) and ``r2`` (share of the
        curve's variance that the step explains: 1 is a pure step, a straight line has 0.75).
    """
    effects = effects.double().cpu()
    counts = torch.arange(1, 100, dtype=torch.float64)  # numbers up to the step, for the 99 places where it can be
    below = effects.cumsum(dim=1)[:, :-1] / counts
    above = (effects.sum(dim=1, keepdim=True) - effects.cumsum(dim=1)[:, :-1]) / (100 - counts)
    best, place = ((above - below).square() * counts * (100 - counts) / 100).max(dim=1)
    variance = (effects - effects.mean(dim=1, keepdim=True)).square().sum(dim=1)
    return pd.DataFrame({"location": place.numpy(), "r2": (best / variance).numpy()})


def _units(run: SharedPrefix, resid: Tensor, transcoder: Transcoder | None) -> Tensor:
    if transcoder is None:
        return run.neurons(run.layer, resid)
    if transcoder.config.n_writes is not None:
        raise ValueError("a cross-layer transcoder has no features of one MLP alone to sweep over: use replace_mlps")
    return transcoder.encode(run.normalised(resid))


class _Kept:
    """The residual stream after one MLP of which only some units are live."""

    def __init__(
        self,
        model: TransformerBridge,
        tokens: Int[Tensor, "row pos"],
        layer: int,
        transcoder: Transcoder | None,
        rest: Rest,
    ):
        self.run = SharedPrefix(model, tokens, layer)
        prefix, other = self.run.prefix, self.run.rest
        self.shape = other.shape if rest == "zero" else other[:, -1:].shape
        self.everywhere = rest == "zero"
        resid = torch.cat([prefix, other.flatten(0, 1)]) if self.everywhere else other[:, -1]
        self.units = _units(self.run, resid, transcoder)
        if transcoder is None:
            self.writes, constant = model.blocks[layer].mlp.W_out, model.blocks[layer].mlp.b_out
        else:
            self.writes, constant = transcoder.W_dec, transcoder.b_dec
            if transcoder.W_skip is not None:
                constant = constant + self.run.normalised(resid) @ transcoder.W_skip
        self.resid = resid + constant
        if not self.everywhere:
            mean = self.units.mean(dim=0)  # over YY: all prompts here have one noun and one century
            self.units = self.units - mean
            self.resid = self.resid + mean @ self.writes

    def add(self, ranked: Int[Tensor, " unit"], ks: Int[Tensor, " k"]) -> Iterator[int]:
        """Add units in order; pause at each k."""
        units, writes = self.units[:, ranked], self.writes[ranked]
        done = 0
        for k in ks.tolist():
            self.resid.addmm_(units[:, done:k], writes[done:k])
            done = k
            yield k

    def finish(self) -> Float[Tensor, "prompt d_model"]:
        """The last token's final residual stream, normalised."""
        if not self.everywhere:
            return self.run.finish(None, self.resid[:, None])
        shared = len(self.run.prefix)
        return self.run.finish(self.resid[:shared], self.resid[shared:].view(self.shape))
