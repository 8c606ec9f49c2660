"""What notebook 09 claims about a model that writes digit by digit: scores, ledger rows and three sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib import interventions
from tclib.evaluation import stats
from tclib.tasks import digits, published
from tclib.tasks import greater_than as gt
from tclib.transcoder import Transcoder

SHOWN = {"forward": 3, "balanced": 2}  # digits of the intervals


def scores(
    model: TransformerBridge,
    ahead: gt.Prompts,
    answers: Float[Tensor, "prompt answer"],
    backward_years: Sequence[int],
    nouns: Sequence[str],
    centuries: Sequence[int],
    seed: int = 0,
) -> dict[str, float]:
    """Forward and balanced probability difference with intervals over nouns and centuries, and the sharpness.

    Args:
        ahead, answers: the forward prompts and the model's probabilities.
        backward_years: the years from which the backward prompts are made, of the same nouns and centuries.
    """
    back = digits.prompts(model.tokenizer, nouns, centuries, backward_years, gt.BACKWARD_TEMPLATE)
    cells = stats.cell_means(gt.probability_difference(answers, ahead.bounds).cpu().numpy(), ahead.frame)
    behind = stats.cell_means(gt.probability_difference(gt.run(model, back), back.bounds).cpu().numpy(), back.frame)
    row = {"forward": stats.interval(cells, seed=seed), "balanced": stats.interval((cells - behind) / 2, seed=seed)}
    found = {f"{name} {part}": float(number) for name, value in row.items() for part, number in value.items()}
    inner = (ahead.years > 0) & (ahead.years < len(ahead.answers) - 1)
    return found | {"sharpness": gt.sharpness(answers[inner], ahead.years[inner]).mean().item()}


def counterparts(
    model: TransformerBridge, prompts: gt.Prompts, layer: int, transcoder: Transcoder, order: Int[Tensor, " feature"]
) -> dict[str, float]:
    """The paper's numbers about its key MLP, measured its way: other features at zero, at all tokens.

    Args:
        order: features, those to keep first.
    """

    def difference(hooks: list) -> float:
        return gt.probability_difference(gt.run(model, prompts, hooks), prompts.bounds).mean().item()

    zero = torch.zeros(transcoder.config.d_features)
    found = {
        "greater_than_replaced/probability_difference": difference(interventions.replace_mlp(layer, transcoder)),
        "greater_than_removed/probability_difference": difference(interventions.ablate_mlp(layer)),
    }
    for k in range(20, 25):
        kept = interventions.keep_features(layer, transcoder, order[:k], zero)
        found[f"greater_than_keep_features/{k}"] = difference(kept)
    return found


def crossing(features: Mapping[int, float], neurons: Mapping[int, float], ks: Sequence[int]) -> dict[str, int | None]:
    """The largest k at which features leave less than neurons, and the smallest at which they do not."""
    led = [k for k in ks if features[k] < neurons[k]]
    behind = next((k for k in ks if not features[k] < neurons[k]), None)
    names = ("features_ahead_to", "neurons_ahead_from")
    return dict(zip((f"greater_than_crossing/{name}" for name in names), (max(led, default=None), behind), strict=True))


def sentences(
    behaviour: pd.Series,
    heads: Sequence[tuple[int, int]],
    circuit: tuple[int, float],
    contest: pd.DataFrame,
    likeness: pd.Series,
    left: pd.DataFrame,
    ten_answers_no_reason: bool,
) -> list[str]:
    """The three answers of the notebook.

    Args:
        behaviour: forward and balanced mean, low and high.
        heads: the two that bring the digit.
        circuit: its nodes, and what it keeps on other nouns.
        contest: features, neurons, features - neurons, low and high, for each (MLP, order, k).
        likeness: of the first features to neurons, a row for each key MLP and last for the bundled model.
        left: for each key MLP the KL with ``all`` features, and with 16 ``features, error live`` and 16 ``neurons``.
    """
    u, keys = behaviour, left.index.tolist()
    gpt2 = published.values("greater_than_original")["probability_difference"]
    worse, better = int((contest["low"].to_numpy() > 0).sum()), int((contest["high"].to_numpy() < 0).sum())
    brings = " and ".join(f"{layer}.{head}" for layer, head in heads)

    def at(layer: int, k: int) -> str:
        row: Any = contest.xs((layer, "written", k))
        return (
            f"MLP {layer}, {k} units: {row['features']:.3f} against {row['neurons']:.3f}, difference "
            f"{row['features - neurons']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        )

    def both(column: str) -> str:
        return " and ".join(f"{value:.3f}" for value in left[column])

    forward, balanced = (f"[{u[f'{name} low']:.{d}f}, {u[f'{name} high']:.{d}f}]" for name, d in SHOWN.items())
    verdict = "carries over" if better == len(contest) else "does not carry over"
    reason = "not the reason" if ten_answers_no_reason else "perhaps a reason"
    return [
        f"1. SmolLM2 compares: PD {u['forward mean']:.3f} {forward}, where GPT-2's was {gpt2:.3f}; balanced "
        f"{u['balanced mean']:.2f} {balanced}. Heads {brings} bring the digit and MLPs {keys[0]} and {keys[1]} decide; "
        f"{circuit[0]} nodes keep {circuit[1]:.2f} on other nouns.",
        f"2. That few features beat few neurons {verdict}: of {len(contest)} comparisons features win {better} and "
        f"neurons {worse}. KL, features against neurons: {at(keys[0], 4)}; {at(keys[1], 4)}.",
        f"3. Why: the features that write most are neurons found again (likeness {likeness.iloc[0]:.2f} and "
        f"{likeness.iloc[1]:.2f}; {likeness.iloc[-1]:.2f} in the bundled model), and all features together still leave "
        f"a KL of {both('all')}. With that error given back 16 of them leave {both('features, error live')}, 16 "
        f"neurons {both('neurons')}. Having only ten answers is {reason}.",
    ]
