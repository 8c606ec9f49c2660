"""Is a transcoder any good? Every metric in one pass over the text, in memory that does not grow with it.

With y the target (the MLP's true output; for an SAE what it reads), y' = TC(x), p the model's next-token distribution
and q the same with MLPs replaced, over all tokens but BOS unless ``bos=True``:

    L0        = mean |{i : z_i > 0}|                            features
    FVU       = sum ||y - y'||^2 / sum ||y - mean(y)||^2        0 is perfect, 1 is no better than the mean
    cosine    = mean y.y' / (||y|| ||y'||)
    CE        = - mean log p(next token)                        nats; BOS is read, but never a target
    recovered = (CE_zero - CE_replaced) / (CE_zero - CE)        1 means that nothing was lost
    KL        = mean sum_w p(w) log(p(w) / q(w))                nats
    top1      = mean [argmax p = argmax q]

(paper, section 3.2 and its appendix on evaluation). ``replicates`` adds a Poisson bootstrap over rows: replicate r
weighs each row by a draw from Poisson(1), the same draw for every metric and model, so that differences are paired.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.activations import forward, hook_in, our_name
from tclib.evaluation.faithfulness import accumulate, check_text, numbered
from tclib.evaluation.stats import Sums, bootstrap_weights
from tclib.inputs import check_layers, words
from tclib.interventions import Hook, ablate_mlp, reencode_input, replace_mlp, replace_mlps
from tclib.replacement_model import ReplacementModel, joined
from tclib.transcoder import Transcoder, imitation, is_cross_layer

Groups = Mapping[Any, Sequence[int]]  # by layer, or by name
MEAN_ROWS = 64  # mean ablation writes the MLP's mean output over this many rows of the text, BOS included
LIVE = 1e-4  # a feature is live if it fires on more than this fraction of tokens (paper)
DENSE = 0.1  # a feature is dense if it fires on more than this fraction of tokens


@dataclass(frozen=True)
class Measured:
    """What one pass gives. With replicates, each table has a column ``replicate``; 0 is the text as it is."""

    layers: pd.DataFrame  # layer, tokens, l0, fvu, cosine, dead, dense
    groups: pd.DataFrame  # layer (the group's name), ce, ce_replaced, ce_zero, ce_mean, recovered, kl, top1
    positions: pd.DataFrame  # layer, position, tokens, l0, fvu (error there / variance of all), cosine, ce_increase
    firing: dict[int, Float[Tensor, " d_features"]]  # fraction of tokens on which each feature fires


@torch.no_grad()
def measure(
    replacement: ReplacementModel,
    tokens: Int[Tensor, "row pos"],
    batch_size: int = 16,
    groups: Groups | None = None,
    bos: bool = False,
    replicates: int = 0,
    seed: int = 0,
) -> Measured:
    """All metrics of the module's head, for transcoders or SAEs, in one pass.

    Args:
        groups: which layers are replaced together, by name; by default `cumulative`. Empty: none, and no logits.
        bos: count BOS in L0, FVU, cosine and firing too.
        replicates: how many bootstrap replicates over rows.
        seed: of the bootstrap.

    Raises:
        ValueError: no text, no transcoder at all or for a layer of a group, or weights that are not finite.
    """
    tokens, model, transcoders = check(replacement, tokens), replacement.model, replacement.transcoders
    groups = cumulative(transcoders) if groups is None else groups
    if missing := sorted({layer for layers in groups.values() for layer in layers} - set(transcoders)):
        raise ValueError(f"layer {missing[0]} has no transcoder: there are some for layers {sorted(transcoders)}")
    layers = list(transcoders)
    fits = {layer: _Fit(transcoder) for layer, transcoder in transcoders.items()}
    swaps = _swaps(transcoders, groups, _mean_outputs(model, layers, tokens[:MEAN_ROWS], batch_size) if groups else {})
    faith = defaultdict(Sums)
    names = {name for t in transcoders.values() for name in (t.config.hook_in, t.config.hook_out)}
    stop = None if groups else max(layers) + 1
    draw = torch.Generator().manual_seed(seed)
    for rows in tokens.split(batch_size):
        rows = rows.to(model.cfg.device)
        weights = bootstrap_weights(len(rows), replicates, draw)
        logits, cache = model.run_with_cache(rows, names_filter=lambda n: n in names, stop_at_layer=stop)
        keep = torch.ones_like(rows, dtype=torch.bool) if bos else words(model, rows)
        z = {layer: t.encode(cache[t.config.hook_in]) for layer, t in transcoders.items()}
        for layer, fit in fits.items():
            config = transcoders[layer].config
            imitated = imitation(transcoders, layer, z, cache[config.hook_in])
            fit.add(weights, keep, z[layer], cache[config.hook_out], imitated)
        if groups:
            accumulate(model, rows, logits, swaps, weights, faith)
    return Measured(
        numbered([fit.table().assign(layer=layer) for layer, fit in fits.items()], replicates),
        numbered([_group_table(faith, name) for name in groups], replicates),
        pd.concat([_positions(layer, fit, faith) for layer, fit in fits.items()], ignore_index=True),
        {layer: fit.rate() for layer, fit in fits.items()},
    )


def evaluate(
    replacement: ReplacementModel,
    tokens: Int[Tensor, "row pos"],
    batch_size: int = 16,
    replicates: int = 0,
) -> pd.DataFrame:
    """One row per layer (and replicate): how close each transcoder is, and what replacing its MLP alone does.

    Raises:
        ValueError: as `measure`.
    """
    singles = {layer: [layer] for layer in joined(replacement).transcoders}
    m = measure(replacement, tokens, batch_size, singles, replicates=replicates)
    return m.layers.merge(m.groups, on=["layer", "replicate"] if replicates else "layer")


def reconstruction(
    replacement: ReplacementModel,
    tokens: Int[Tensor, "row pos"],
    batch_size: int = 16,
) -> pd.DataFrame:
    """The ``layers`` table of `measure` alone; the forward pass stops after the last layer asked for."""
    return measure(replacement, tokens, batch_size, groups={}).layers


def cumulative(layers: Mapping[int, Transcoder] | Sequence[int]) -> dict[int | str, list[int]]:
    """Groups to replace: each layer alone, ``"up to l"`` from below, and ``"all"``."""
    layers = sorted(layers)
    upto = {f"up to {layer}": [i for i in layers if i <= layer] for layer in layers[1:-1]}
    return {**{layer: [layer] for layer in layers}, **upto, "all": layers}


def replacement_hooks(layer: int, dictionary: Transcoder) -> list[Hook]:
    """Hooks that put a transcoder, or an SAE of either side, where it belongs (paper, section 3.2)."""
    reads, writes = (our_name(hook) for hook in (dictionary.config.hook_in, dictionary.config.hook_out))
    is_sae_of_input = reads == writes == hook_in(layer)
    return reencode_input(layer, dictionary) if is_sae_of_input else replace_mlp(layer, dictionary)


def check(replacement: ReplacementModel, tokens: Int[Tensor, "row pos"]) -> Int[Tensor, "row pos"]:
    """The text as int64; raises one sentence for anything that would make the numbers meaningless."""
    tokens = check_text(joined(replacement).model, tokens)
    check_layers(replacement.model, list(replacement.transcoders))
    for layer, transcoder in replacement.transcoders.items():
        for name, weight in transcoder.named_parameters():
            # The sum is formed thirty times as quickly; that of finite weights may overflow.
            if not weight.sum().isfinite() and not weight.isfinite().all():
                raise ValueError(f"{name} of the transcoder of layer {layer} holds NaN or infinity: train it again")
    return tokens


class _Fit:
    """How close one transcoder is to its target."""

    def __init__(self, transcoder: Transcoder):
        self.sums = Sums()
        self.fired = torch.zeros(transcoder.config.d_features, dtype=torch.float64)

    def add(self, weights: Tensor, keep: Bool[Tensor, "row pos"], z: Tensor, y: Tensor, imitated: Tensor) -> None:
        self.fired += (z[keep] > 0).sum(0).cpu()
        self.sums.add(
            weights,
            keep,
            y=y,
            square=y.pow(2).sum(-1),
            error=(y - imitated).pow(2).sum(-1),
            active=(z > 0).sum(-1).float(),
            cosine=torch.cosine_similarity(y, imitated, dim=-1),
        )

    def table(self) -> pd.DataFrame:
        s, rate = self.sums, self.rate()
        table = pd.DataFrame({"tokens": s.total["n"].long().numpy(), "l0": s.mean("active")})
        table["fvu"] = s.mean("error") / self.variance()
        table["cosine"] = s.mean("cosine")
        # A resampled text says nothing new about which features never fire.
        table.loc[0, ["dead", "dense"]] = [(rate == 0).double().mean().item(), (rate > DENSE).double().mean().item()]
        return table

    def rate(self) -> Float[Tensor, " d_features"]:
        return self.fired / self.sums.total["n"][0]

    def variance(self) -> Float[np.ndarray, " replicate"]:
        """Variance of the target, per token."""
        s = self.sums.total
        return ((s["square"] - s["y"].pow(2).sum(-1) / s["n"]) / s["n"]).numpy()

    def positions(self) -> pd.DataFrame:
        s = self.sums
        table = pd.DataFrame({"tokens": s.place["n"].long().numpy(), "l0": s.mean_at("active")})
        table.insert(0, "position", range(len(table)))
        return table.assign(fvu=s.mean_at("error") / self.variance()[0], cosine=s.mean_at("cosine"))


def _positions(layer: int, fit: _Fit, faith: Mapping) -> pd.DataFrame:
    table = fit.positions().assign(layer=layer)
    if ("ce_replaced", layer) in faith:
        increase = faith["ce_replaced", layer].mean_at("ce") - faith["ce", "original"].mean_at("ce")
        table["ce_increase"] = pd.Series(increase)  # the last position predicts nothing
    return table


def _swaps(transcoders: Mapping[int, Transcoder], groups: Groups, means: Mapping[int, Tensor]) -> dict:
    swaps: dict = {("ce", "original"): []}
    cross = is_cross_layer(transcoders)
    for name, layers in groups.items():
        single = [] if cross else [h for layer in layers for h in replacement_hooks(layer, transcoders[layer])]
        swaps["ce_replaced", name] = replace_mlps(transcoders, layers) if cross else single
        swaps["ce_zero", name] = [h for layer in layers for h in ablate_mlp(layer)]
        swaps["ce_mean", name] = [h for layer in layers for h in ablate_mlp(layer, means[layer])]
    return swaps


def _group_table(sums: Mapping, name: int | str) -> pd.DataFrame:
    ce = {kind: sums[kind, name].mean("ce") for kind in ("ce_replaced", "ce_zero", "ce_mean")}
    table = pd.DataFrame({"ce": sums["ce", "original"].mean("ce"), **ce}).assign(layer=name)
    table["recovered"] = (table["ce_zero"] - table["ce_replaced"]) / (table["ce_zero"] - table["ce"])
    return table.assign(**{metric: sums["ce_replaced", name].mean(metric) for metric in ("kl", "top1")})


def _mean_outputs(model: TransformerBridge, layers: list[int], tokens: Tensor, batch_size: int) -> dict[int, Tensor]:
    total, count = {layer: torch.zeros(()) for layer in layers}, 0
    for acts in forward(model, tokens, layers, batch_size):
        count += acts[layers[0]].y[..., 0].numel()
        for layer in layers:
            total[layer] = total[layer] + acts[layer].y.sum((0, 1))
    return {layer: total[layer] / count for layer in layers}
