"""Greater-than with MLPs made of transcoder features, per layer or cross-layer: with few of them, and under ablations.

A set that imitates MLPs well on the text need not compute as they do. What it says of a model that is ablated in the
middle is where that shows (Ameisen et al. 2025, "mechanistic faithfulness").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.activations import hook_in, hook_out
from tclib.circuits import validation
from tclib.circuits.graph import Graph
from tclib.interventions import Hook, ablate_head, ablate_mlp, edited, replace_mlps
from tclib.replacement_model import ReplacementModel, joined
from tclib.targets import Target
from tclib.tasks import greater_than as gt
from tclib.tracing import Trace
from tclib.transcoder import Transcoder, imitation, writers


@torch.no_grad()
def few_features(
    replacement: ReplacementModel,
    prompts: gt.Prompts,
    layer: int,
    ks: Sequence[int],
    seed: int | None = None,
) -> pd.DataFrame:
    """One MLP made of k live features at the last token, all others of them held at their mean over YY.

    Of a cross-layer transcoder, the features of all layers that write there are ranked together, by how much what they
    write there varies over YY; with a seed, at random among those that vary.

    Returns:
        ``k`` and ``difference``, the mean probability difference.
    """
    model, transcoders = joined(replacement).model, replacement.transcoders
    x, z, means, sizes = {}, {}, {}, {}
    for at, rows in writers(transcoders, layer).items():
        (x[at],) = gt.at_last_token(model, prompts, at, [hook_in(at)])
        z[at] = transcoders[at].encode(x[at])
        means[at] = gt.mean_over_years(z[at], prompts)
        sizes[at] = (z[at] - means[at]).square().mean(0) * rows.square().sum(1)
    size = torch.cat(list(sizes.values()))
    order = size.argsort(descending=True)
    if seed is not None:
        varies = order[size[order] > 0]
        order = varies[torch.randperm(len(varies), generator=torch.Generator().manual_seed(seed))]
    rows = []
    for k in ks:
        live = torch.zeros(len(size), dtype=torch.bool).index_fill(0, order[:k], True)
        by_layer = dict(zip(sizes, live.split([len(s) for s in sizes.values()]), strict=True))
        mixed = {at: torch.where(by_layer[at], z[at], means[at]) for at in z}
        out = imitation(transcoders, layer, mixed, x[layer])
        answers = gt.run(model, prompts, lambda part, out=out: ablate_mlp(layer, out[part], -1))
        rows.append({"k": k, "difference": gt.probability_difference(answers, prompts.years).mean().item()})
    return pd.DataFrame(rows)


@torch.no_grad()
def ablations(
    model: TransformerBridge, prompts: gt.Prompts, layers: Sequence[int], hooks: Sequence[Hook] = ()
) -> dict[str, list[Hook]]:
    """Hooks that hold one part at its mean over the prompts, position by position: ``"head 1.2"``, ``"MLP 1"``.

    Args:
        hooks: interventions under which the means are taken.
    """
    names = [name for layer in layers for name in (f"blocks.{layer}.attn.hook_z", hook_out(layer))]
    with edited(model, hooks):
        _, cache = model.run_with_cache(prompts.tokens.to(model.cfg.device), names_filter=names.__contains__)
    made = {}
    for layer in layers:
        z = cache[f"blocks.{layer}.attn.hook_z"].mean(0)
        for head in range(model.cfg.n_heads):
            made[f"head {layer}.{head}"] = ablate_head(layer, head, z[:, head])
        made[f"MLP {layer}"] = ablate_mlp(layer, cache[hook_out(layer)].mean(0))
    return made


def middle(model: TransformerBridge, prompts: gt.Prompts, layer: int) -> dict[str, list[Hook]]:
    """Those of the `ablations` that come after the first layer and before one MLP."""
    return {
        name: hooks for name, hooks in ablations(model, prompts, range(1, layer + 1)).items() if name != f"MLP {layer}"
    }


@torch.no_grad()
def under_ablations(replacement: ReplacementModel, prompts: gt.Prompts) -> pd.DataFrame:
    """What every head and MLP, held at its mean over the prompts, changes in the model and with all MLPs replaced.

    Returns:
        One row per ablation and prompt: ``ablated``, ``prompt``, and the change of the mean logit difference in the
        ``model`` and in the ``replaced`` one.
    """
    model, transcoders, layers = joined(replacement).model, replacement.transcoders, list(replacement.transcoders)
    columns = {}
    for kind, hooks in {"model": [], "replaced": replace_mlps(transcoders, layers)}.items():
        base = gt.mean_logit_difference(gt.run(model, prompts, hooks), prompts.years)
        answers = {
            name: gt.run(model, prompts, hooks + ablation)
            for name, ablation in ablations(model, prompts, layers, hooks).items()
        }
        columns[kind] = {name: gt.mean_logit_difference(a, prompts.years) - base for name, a in answers.items()}
    tables = [
        pd.DataFrame({"ablated": name, "model": columns["model"][name], "replaced": columns["replaced"][name]})
        for name in columns["model"]
    ]
    return pd.concat([table.rename_axis("prompt").reset_index() for table in tables], ignore_index=True)


def agreement(table: pd.DataFrame, ours: str = "replaced", theirs: str = "model") -> dict[str, float]:
    """How alike two columns of changes are: ``correlation``, and ``error``, sum (ours - theirs)^2 / sum theirs^2."""
    error = (table[ours] - table[theirs]).pow(2).sum() / table[theirs].pow(2).sum()
    return {"correlation": table[ours].corr(table[theirs]), "error": error}


@torch.no_grad()
def answer_of_mlp(
    replacement: ReplacementModel,
    prompts: gt.Prompts,
    layer: int,
    ablation: Sequence[Hook],
) -> dict[str, Float[Tensor, "prompt d_model"]]:
    """How an ablation changes one MLP's output at the last token, and what a set of transcoders says it would be.

    Returns:
        ``model``, the change of the MLP's output; ``imitated``, that of its imitation from the ablated model's own
        activations; and ``early``, the part of the latter that features of earlier layers write.
    """
    model, transcoders = joined(replacement).model, replacement.transcoders
    writing = writers(transcoders, layer)
    names = {hook_out(layer), *(hook_in(at) for at in writing)}
    outputs: dict[str, list[Tensor]] = {"model": [], "imitated": [], "early": []}
    for hooks in ([], list(ablation)):
        with edited(model, hooks):
            _, cache = model.run_with_cache(prompts.tokens.to(model.cfg.device), names_filter=names.__contains__)
        z = {at: transcoders[at].encode(cache[hook_in(at)][:, -1]) for at in writing}
        y = cache[hook_out(layer)][:, -1]
        early = [z[at] @ rows for at, rows in writing.items() if at < layer]
        outputs["model"].append(y)
        outputs["imitated"].append(imitation(transcoders, layer, z, cache[hook_in(layer)][:, -1]))
        outputs["early"].append(sum(early, torch.zeros_like(y)))
    return {name: after - before for name, (before, after) in outputs.items()}


@torch.no_grad()
def late_writes(
    replacement: ReplacementModel,
    prompts: gt.Prompts,
    layer: int,
    ablation: Sequence[Hook],
) -> pd.DataFrame:
    """Every earlier feature that writes to an MLP at the last token, beside what that MLP itself does along its write.

    Returns:
        ``layer``, ``feature``, ``size`` (mean activation times the write's length; those below a hundredth of the
        largest are left out), mean ``activation`` before the ablation and ``ablated``, and the MLP's output along the
        write in the same units, ``model`` and ``model_ablated``; largest first.
    """
    model, transcoders = joined(replacement).model, replacement.transcoders
    writing = {at: rows for at, rows in writers(transcoders, layer).items() if at < layer}
    names = {hook_out(layer), *(hook_in(at) for at in writing)}
    seen = []
    for hooks in ([], list(ablation)):
        with edited(model, hooks):
            seen.append(model.run_with_cache(prompts.tokens.to(model.cfg.device), names_filter=names.__contains__)[1])
    tables = []
    for at, rows in writing.items():
        lengths = rows.norm(dim=1)
        z = [transcoders[at].encode(cache[hook_in(at)][:, -1]).mean(0) for cache in seen]
        y = [cache[hook_out(layer)][:, -1].mean(0) @ rows.T / lengths.square().clamp(min=1e-12) for cache in seen]
        numbers = {"size": z[0] * lengths, "activation": z[0], "ablated": z[1], "model": y[0], "model_ablated": y[1]}
        table = pd.DataFrame({name: value.cpu().numpy() for name, value in numbers.items()})
        tables.append(table.rename_axis("feature").reset_index().assign(layer=at))
    table = pd.concat(tables).sort_values("size", ascending=False, ignore_index=True)
    table = table[table["size"] > 0.01 * table["size"].max()]
    return table[["layer", "feature", "size", "activation", "ablated", "model", "model_ablated"]]


def early_share(transcoders: Mapping[int, Transcoder], z: Mapping[int, Float[Tensor, "token d_features"]]) -> pd.Series:
    """How much of what is written to each MLP comes from features of earlier layers: their share of squared lengths."""
    shares = {}
    for layer in transcoders:
        sizes = {at: (z[at] @ rows).square().sum().item() for at, rows in writers(transcoders, layer).items()}
        shares[layer] = 1 - sizes[layer] / sum(sizes.values())
    return pd.Series(shares, name="early share").rename_axis("MLP")


def removals(trace: Trace, graph: Graph, answer: Target, most: int = 12) -> pd.DataFrame:
    """A graph's strongest features taken out one at a time: its prediction beside two experiments.

    Returns:
        ``layer``, ``position``, ``feature``, and the change of the answer: ``predicted``; with later MLPs ``free`` to
        answer; and ``constrained``, with all MLPs frozen so that the feature's own writes alone change.
    """
    features = graph.nodes[graph.nodes["kind"] == "feature"]
    strongest = graph.adjacency[-1, : len(features)].abs().argsort(descending=True)[:most].tolist()
    chosen = features.iloc[strongest][["layer", "position", "feature"]]
    table = validation.compare(trace, chosen, [answer]).rename(columns={"measured": "free"}).drop(columns="target")
    return table.assign(constrained=validation.measure(trace, chosen, [answer], ["mlps"])[:, 0].tolist())
