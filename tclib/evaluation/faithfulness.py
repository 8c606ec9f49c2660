"""What the model loses under an intervention: cross-entropy, KL and top-1 agreement."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.evaluation.stats import Sums, bootstrap_weights
from tclib.inputs import check_tokens, words
from tclib.interventions import Hook, edited


@torch.no_grad()
def faithfulness(
    model: TransformerBridge,
    tokens: Int[Tensor, "row pos"],
    interventions: Mapping[str, Sequence[Hook]],
    batch_size: int = 16,
    replicates: int = 0,
    seed: int = 0,
) -> pd.DataFrame:
    """CE, its increase ``ce_increase`` (nats), KL and top-1 agreement under any interventions, in one pass.

    KL = mean sum_w p(w) log(p(w) / q(w)) in nats and top1 = mean [argmax p = argmax q], with p the next-token
    distribution of the untouched model and q that under the intervention.

    Returns:
        ``name``, ``ce``, ``kl``, ``top1``, ``ce_increase``, with ``replicate`` after the name if there are any. The
        first rows, ``"original"``, are the untouched model.

    Raises:
        ValueError: no text, or rows that do not fit the model.
    """
    tokens = check_text(model, tokens)
    sums, draw = defaultdict(Sums), torch.Generator().manual_seed(seed)
    swaps = {"original": [], **interventions}
    for rows in tokens.split(batch_size):
        rows = rows.to(model.cfg.device)
        accumulate(model, rows, model(rows), swaps, bootstrap_weights(len(rows), replicates, draw), sums)
    tables = []
    for name in swaps:
        columns = {metric: sums[name].mean(metric) for metric in ("ce", "kl", "top1")}
        table = pd.DataFrame({"name": [name] * (replicates + 1), **columns})
        tables.append(table.assign(ce_increase=table["ce"] - sums["original"].mean("ce")))
    return numbered(tables, replicates)


def check_text(model: TransformerBridge, tokens: Int[Tensor, "row pos"]) -> Int[Tensor, "row pos"]:
    """The text as int64; raises one sentence for one that no number can be measured on."""
    tokens = check_tokens(model, tokens, least=2)
    if not words(model, tokens[:, 1:]).any():
        raise ValueError("the text holds nothing but BOS: give rows with words")
    return tokens


def accumulate(
    model: TransformerBridge,
    rows: Int[Tensor, "row pos"],
    logits: Float[Tensor, "row pos vocab"],
    swaps: Mapping,
    weights: Float[Tensor, "replicate row"],
    sums: Mapping,
) -> None:
    """Add CE, KL and top-1 agreement of one batch under each intervention."""
    targets, log_p = rows[:, 1:, None], logits[:, :-1].log_softmax(-1)
    keep, best = words(model, targets[..., 0]), log_p.argmax(-1)
    p = log_p.exp()
    for name, hooks in swaps.items():
        with edited(model, hooks):
            log_q = model(rows)[:, :-1].log_softmax(-1) if hooks else log_p
        sums[name].add(
            weights,
            keep,
            ce=-log_q.gather(-1, targets)[..., 0],
            kl=(p * (log_p - log_q)).sum(-1),
            top1=(log_q.argmax(-1) == best).float(),
        )


def numbered(tables: list[pd.DataFrame], replicates: int) -> pd.DataFrame:
    """One table; the name of each row in front, the replicate behind it if there are any."""
    if not tables:
        return pd.DataFrame()
    first = ["layer" if "layer" in tables[0] else "name"]
    if replicates:
        tables, first = [t.assign(replicate=t.index) for t in tables], [*first, "replicate"]
    table = pd.concat(tables, ignore_index=True)
    return table[[*first, *(c for c in table if c not in first)]]
