"""Measure how well a model does greater-than, which MLP carries it, and whether few features do what many neurons do.

    python -m making.measure --model data/model --transcoders data/transcoders --out data/model/metrics.json
    python -m making.measure --model RUN --nouns selection --out RUN/metrics.json   # to choose among runs

Nouns that the model was trained on are always measured, then the nouns kept for choosing (``selection``), and only
with ``--nouns report`` those that nothing was chosen on. ``--real-work`` is the folder that
``making.language_model prepare`` wrote: it adds bits per character on the held-out works.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from making.export import held_out_bits
from tclib.checkpoints import load_transcoders
from tclib.chronicle import BACKWARD, HELD_OUT_CENTURY, NOUNS, SPANS, grammar, words
from tclib.interventions import Hook, keep_features
from tclib.io.paths import write_whole
from tclib.model import load_model
from tclib.tasks import greater_than as gt
from tclib.tasks import unit_sweep
from tclib.transcoder import Transcoder

TRAIN_SAMPLE = 12  # nouns known to the model
FEW = 4  # nouns of each set, and every fourth YY, where every measurement runs the model many times
FEATURES = 16
SEEDS = {"selection": 1, "report": 2}
NEURON_KS = [1, 2, 4, 8, *range(12, 65, 4), *range(80, 257, 16), *range(320, 1025, 64)]
FEATURE_KS = [1, 2, 4, 8, 16, 32, 64, 128]

# The rule by which a model is chosen and judged, written before any candidate was measured: name -> (least value, where
# it stands in the metrics). APART stands for the nouns kept apart: those for choosing, or those of the report.
APART = "nouns_kept_apart"
REQUIRED = {
    "probability difference, known nouns": (0.88, ("by_nouns", "train", "probability_difference")),
    "key MLP zeroed": (0.2, ("key_mlp", APART, "zero_last")),
    "key MLP zeroed, LayerNorm's scale held": (0.2, ("key_mlp", APART, "zero_last_scale_held")),
    "key MLP at its mean over YY": (0.2, ("key_mlp", APART, "mean_last")),
    "key MLP at its mean over YY, LayerNorm's scale held": (0.2, ("key_mlp", APART, "mean_last_scale_held")),
    "balanced difference, known nouns": (0.7, ("by_nouns", "train", "balanced_difference")),
    "balanced difference, unseen nouns": (0.5, ("by_nouns", APART, "balanced_difference")),
    "probability difference, unseen templates and nouns": (0.5, ("heldout_templates", APART, "probability_difference")),
}
MOST_BITS = 1.6
# Of the transcoder of the key MLP, with LayerNorm's scale held; as shares of the MLP's part.
LEAST_FEATURES, MOST_NEURONS = 0.8, 0.4


def main(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    model = load_model(str(options.model))
    transcoders = load_transcoders(options.transcoders, device=model.cfg.device) if options.transcoders else {}
    metrics = measure(model, transcoders, options.nouns)
    if options.real_work:
        bits = held_out_bits(lambda ids: model(ids.to(model.cfg.device)).cpu(), options.real_work)
        metrics["bits_per_char"] = bits.pop("all")
        metrics["bits_per_char_by_work"] = bits
    text = json.dumps(rounded(metrics), indent=2)
    out = options.out or options.model / "metrics.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, (text + "\n").encode())
    print(text)
    print("\n".join(verdicts(metrics)))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m making.measure", description=__doc__)
    top.formatter_class = argparse.RawDescriptionHelpFormatter
    top.add_argument("--model", type=Path, required=True, help="folder of a GPT-2-style model")
    top.add_argument("--transcoders", type=Path, help="folder of its transcoders")
    top.add_argument("--nouns", choices=list(SEEDS), default="report")
    top.add_argument("--real-work", type=Path, help="folder with text.json and real_heldout_*.npy")
    top.add_argument("--out", type=Path, help="default: metrics.json in the model's folder")
    return top


def measure(model: TransformerBridge, transcoders: dict[int, Transcoder], nouns: str = "report") -> dict:
    """All metrics but the bits per character, as one nested dictionary of plain numbers."""
    sets = {"train": spread(NOUNS["train"], TRAIN_SAMPLE), "selection": NOUNS["selection"]}
    if nouns == "report":
        sets["report"] = NOUNS["report"]
    few = {name: spread(sets[name], FEW) for name in ("train", nouns)}
    main_prompts = {name: gt.prompts(model.tokenizer, of_set, years=gt.YEARS[::4]) for name, of_set in few.items()}

    by_nouns = {name: timed(f"{name} nouns", on_nouns, model, of_set) for name, of_set in sets.items()}
    drops = {name: timed(f"MLPs, {name} nouns", mlp_drops, model, p) for name, p in main_prompts.items()}
    # Known nouns choose the layer, so that nothing is chosen on the others.
    layer = max(drops["train"], key=lambda row: row["mean_last"])["layer"]
    key = {"layer": layer} | {name: rows[layer] for name, rows in drops.items()}
    metrics = {
        "nouns_kept_apart": nouns,
        "centuries": [gt.CENTURIES[0], gt.CENTURIES[-1]],
        "years": [gt.YEARS[0], gt.YEARS[-1]],
        "template": gt.TEMPLATE,
        "backward_template": gt.BACKWARD_TEMPLATE,
        **{name: by_nouns["train"][name] for name in ("probability_difference", "balanced_difference", "sharpness")},
        "war": on_nouns(model, ["war"]),
        "century_never_seen": on_nouns(model, sets["train"], [HELD_OUT_CENTURY]),
        "by_nouns": by_nouns,
        "heldout_templates": {
            name: timed(f"templates, {name} nouns", on_templates, model, of_set, SEEDS[nouns])
            for name, of_set in few.items()
        },
        "key_mlp": key,
        "mlp_drops": drops,
    }
    transcoder = transcoders.get(layer)
    if transcoder is not None:
        metrics["features_vs_neurons"] = {
            name: timed(f"units kept, {name} nouns", features_vs_neurons, model, prompts, layer, transcoder)
            for name, prompts in main_prompts.items()
        }
    return metrics


def on_nouns(model: TransformerBridge, nouns: list[str], centuries: Sequence[int] | None = None) -> dict:
    """Main template forward and backward, averaged over nouns, centuries and years, and per century."""
    centuries = centuries or gt.CENTURIES
    forward = gt.prompts(model.tokenizer, nouns, centuries)
    backward = gt.prompts(model.tokenizer, nouns, centuries, template=gt.BACKWARD_TEMPLATE)
    probs = gt.run(model, forward)
    ahead = gt.probability_difference(probs, forward.years)
    behind = gt.probability_difference(gt.run(model, backward), backward.years)
    by_century = pd.Series(ahead.numpy()).groupby(forward.frame["century"].to_numpy()).mean()
    by_noun = pd.Series(ahead.numpy()).groupby(forward.frame["noun"].to_numpy()).mean()
    return {
        "nouns": list(nouns),
        "prompts": len(forward.frame),
        "probability_difference": ahead.mean().item(),
        "probability_difference_backward": behind.mean().item(),
        "balanced_difference": (ahead.mean() - behind.mean()).item() / 2,  # a constant answer has about 0
        "sharpness": gt.sharpness(probs, forward.years).mean().item(),
        "by_century": {str(century): float(value) for century, value in by_century.items()},
        "by_noun": {str(noun): float(value) for noun, value in by_noun.items()},
    }


def on_templates(model: TransformerBridge, nouns: list[str], seed: int) -> dict:
    """Templates that never occur in training, forward and backward, with the difference in each."""
    rng = random.Random(seed)
    ahead = {prompt: mean_difference(model, nouns, prompt) for prompt in cut(SPANS["heldout"], "end", rng)}
    behind = {prompt: mean_difference(model, nouns, prompt) for prompt in cut(BACKWARD["heldout"], "start", rng)}
    means = [sum(group.values()) / len(group) for group in (ahead, behind)]
    return {
        "nouns": list(nouns),
        "probability_difference": means[0],
        "balanced_difference": (means[0] - means[1]) / 2,
        "forward": ahead,
        "backward": behind,
    }


def mean_difference(model: TransformerBridge, nouns: list[str], template: str) -> float:
    prompts = gt.prompts(model.tokenizer, nouns, template=template)
    return gt.probability_difference(gt.run(model, prompts), prompts.years).mean().item()


def cut(templates: tuple[str, ...], answer: str, rng: random.Random) -> list[str]:
    """Chronicle templates as prompts: up to the century of the year ``answer``, other fields filled in."""

    def fill(slot: re.Match) -> str:
        name = slot[1]
        if name in ("noun", "start", "end"):
            return slot[0]
        return rng.choice(grammar.FIELDS.get(name) or getattr(words, f"{name.upper()}S"))

    other = "{start}" if answer == "end" else "{end}"
    starts = [re.sub(r"\{(\w+)\}", fill, template.split(f"{{{answer}}}")[0]) for template in templates]
    return [start.replace("{noun}", "NOUN").replace(other, "XXYY") + "XX" for start in starts]


def mlp_drops(model: TransformerBridge, prompts: gt.Prompts) -> list[dict]:
    """For each layer the probability difference lost without its MLP."""
    return [
        {
            "layer": layer,
            "zero_last": gt.drop_if_ablated(model, prompts, layer, "zero", "last"),
            "mean_last": gt.drop_if_ablated(model, prompts, layer, "mean", "last"),
            "zero_last_scale_held": gt.drop_if_ablated(model, prompts, layer, "zero", "last", freeze_scales=True),
            "mean_last_scale_held": gt.drop_if_ablated(model, prompts, layer, "mean", "last", freeze_scales=True),
            "zero_all": gt.drop_if_ablated(model, prompts, layer, "zero", "all"),
        }
        for layer in range(model.cfg.n_layers)
    ]


def features_vs_neurons(model: TransformerBridge, prompts: gt.Prompts, layer: int, transcoder: Transcoder) -> dict:
    """What the k highest-variance units keep of the behaviour, for the transcoder's features and the MLP's neurons."""
    k = FEATURES
    feature_ks = [n for n in FEATURE_KS if n <= transcoder.W_dec.shape[0]]
    neuron_ks = [n for n in NEURON_KS if n <= model.cfg.d_mlp]
    features = unit_sweep.sweep(model, prompts, layer, feature_ks, transcoder)
    neurons = unit_sweep.sweep(model, prompts, layer, neuron_ks)
    chance = [unit_sweep.sweep(model, prompts, layer, [k], transcoder, "random", seed=seed) for seed in range(5)]
    difference = {n: unit_sweep.curve(table) for n, table in (("f", features), ("n", neurons))}
    enough = difference["n"].index[difference["n"] >= difference["f"][k]]
    share = pd.Series({n: unit_sweep.recovered(neurons, n) for n in difference["n"].index})
    same_share = share.index[share >= unit_sweep.recovered(features, k)]
    return {
        "layer": layer,
        f"recovered_by_{k}_features": unit_sweep.recovered(features, k),
        f"recovered_by_{k}_neurons": unit_sweep.recovered(neurons, k),
        f"recovered_by_{k}_features_scale_held": recovered_with_frozen_scales(model, prompts, layer, k, transcoder),
        f"recovered_by_{k}_neurons_scale_held": recovered_with_frozen_scales(model, prompts, layer, k),
        f"recovered_by_{k}_random_features": sum(unit_sweep.recovered(table, k) for table in chance) / len(chance),
        f"neurons_with_the_difference_of_{k}_features": int(enough[0]) if len(enough) else None,
        f"neurons_with_the_recovery_of_{k}_features": int(same_share[0]) if len(same_share) else None,
        "features": {str(n): float(value) for n, value in difference["f"].items()},
        "neurons": {str(n): float(value) for n, value in difference["n"].items()},
    }


def recovered_with_frozen_scales(
    model: TransformerBridge, prompts: gt.Prompts, layer: int, k: int, transcoder: Transcoder | None = None
) -> float:
    """(m_k - m_0) / (m_model - m_0) with LayerNorm's scales held: the share of the MLP's part that k units keep.

    Unlike in a `sweep`, 1 is the model itself, so that the transcoder's error counts.
    """
    ranked = unit_sweep.rank_units(model, prompts, layer, transcoder)
    units = unit_sweep.units_at_last_token(model, prompts, layer, transcoder)
    mean = gt.mean_over_years(units, prompts)
    held = gt.frozen_scales(model, prompts, layer)

    def difference(kept: Tensor) -> float:
        def hooks(rows: slice) -> list[Hook]:
            if transcoder is not None:
                return [*held(rows), *keep_features(layer, transcoder, kept, mean[rows], -1)]

            def keep(post: Tensor, hook) -> Tensor:
                post = post.clone()
                others = torch.ones(post.shape[-1], dtype=torch.bool).index_fill(0, kept, False)
                post[:, -1, others] = mean[rows][:, others]
                return post

            return [*held(rows), (f"blocks.{layer}.mlp.hook_post", keep)]

        return gt.probability_difference(gt.run(model, prompts, hooks), prompts.years).mean().item()

    whole = gt.probability_difference(gt.run(model, prompts), prompts.years).mean().item()
    none = difference(ranked[:0])
    return (difference(ranked[:k]) - none) / (whole - none)


def verdicts(metrics: dict) -> list[str]:
    """One line for each number that is required: met or missed."""
    return [f"{name}: {value:.3f} ({limit}) {'met' if met else 'MISSED'}" for name, value, limit, met in judge(metrics)]


def judge(metrics: dict) -> list[tuple[str, float, str, bool]]:
    """Name, value, limit and whether it is met, for each number of the rule."""
    apart = metrics[APART]
    lines = []
    for name, (least, where) in REQUIRED.items():
        value = metrics
        for key in where:
            value = value[apart if key == APART else key]
        lines.append((name, value, f"at least {least}", value >= least))
    layer = metrics["key_mlp"]["layer"]
    lines.append(("layer of the key MLP", layer, "not 0", layer > 0))
    if "bits_per_char" in metrics:
        bits = metrics["bits_per_char"]
        lines.append(("bits per character", bits, f"at most {MOST_BITS}", bits <= MOST_BITS))
    kept = metrics.get("features_vs_neurons", {}).get(apart)
    if kept:
        features, neurons = (kept[f"recovered_by_{FEATURES}_{units}_scale_held"] for units in ("features", "neurons"))
        lines.append(
            (f"recovered by {FEATURES} features", features, f"at least {LEAST_FEATURES}", features >= LEAST_FEATURES)
        )
        lines.append((f"recovered by {FEATURES} neurons", neurons, f"less than {MOST_NEURONS}", neurons < MOST_NEURONS))
    return lines


def smallest_drop(metrics: dict) -> float:
    """What a choice between candidates that meet equally many of the targets is made by."""
    drops = metrics["key_mlp"][metrics[APART]]
    return min(drops[f"{how}_last{held}"] for how in ("zero", "mean") for held in ("", "_scale_held"))


def spread(items: tuple[str, ...] | list[str], n: int) -> list[str]:
    """``n`` of the items, evenly picked."""
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


def rounded(value):
    """The same nested value with numbers to five places: as many as another processor repeats."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 5) if isinstance(value, float) else value


def timed(name: str, function, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
