"""Train a cross-layer transcoder beside per-layer ones on three seeds, and measure what notebook 12 compares.

    python -m making.cross_layer --run RUN --out data/clt

RUN takes activations, trained sets and finished parts: the same command goes on where it was stopped. Every set sees
the same chronicle text in the same order, and TopK keeps as many features per token and layer in each, so that all
stand at the same L0; widths are chosen so that all have as many parameters. The sets of the first seed are shipped.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import tclib as tc
from tclib import evaluation, targets, text, training
from tclib.circuits import graph, pruning
from tclib.evaluation import ground_truth
from tclib.io.paths import write_whole
from tclib.tasks import greater_than as gt
from tclib.tasks import replaced

SEEDS, K = 3, 8
TEXT = 600  # rows of training text
KS = [1, 2, 4, 8, 16, 32, 64]
NOUNS, CENTURY = ["war", "reign"], 17
YEARS = [22, 48]  # of the prompts whose graphs are built
MOST = 12  # features of a prompt that are taken out, one at a time


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m making.cross_layer", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled", help="folder of the model")
    parser.add_argument("--run", type=Path, required=True, help="folder of this run")
    parser.add_argument("--out", type=Path, default=Path("data/clt"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=8, help="rows of text per step")
    parser.add_argument("--d-features", type=int, default=256, help="of each layer of the cross-layer transcoder")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()

    model = tc.load_model(options.model, device="cpu")
    layers = list(range(model.cfg.n_layers))
    configs = kinds(options.d_features, model.cfg.d_model, len(layers), options.steps, options.rows)
    parts = []
    for seed in range(options.seeds):
        part = options.run / f"seed_{seed}.json"
        if not part.exists():
            sets = train(model, layers, configs, options, seed)
            write_whole(part, json.dumps(measure(model, sets, seed)).encode())
            print(f"seed {seed} done", flush=True)
        parts += json.loads(part.read_text(encoding="utf-8"))
    for name in configs:
        target = options.out / re.sub(r"\W", "_", name)
        for layer, transcoder in tc.load_transcoders(options.run / f"seed_0/{name}", device="cpu").items():
            transcoder.save(target / f"layer_{layer}", dtype=torch.int8)
    about = {
        name: {key: getattr(c, key) for key in ("d_features", "k", "steps", "batch_rows")}
        for name, c in configs.items()
    }
    content = {"command": "python -m making.cross_layer --run RUN --out data/clt", "about": about, "seeds": parts}
    write_whole(options.out / "seeds.json", (json.dumps(content, indent=1) + "\n").encode())


def kinds(d_features: int, d: int, n: int, steps: int, rows: int) -> dict[str, tc.TrainConfig]:
    """Three kinds of the same number of parameters, the biases aside."""
    whole = d_features * d * (n + n * (n + 1) // 2)  # encoders, and a decoder for each pair of layers
    base = tc.TrainConfig(
        activation="topk", k=K, steps=steps, batch_rows=rows, buffer=8, lr=2e-3, tied=True, start_l0=64, clip=1.0,
        dead_after=50_000, bfloat16=True,
    )  # fmt: skip
    widths = {"per layer": whole // (2 * n * d), "skip": (whole - n * d * d) // (2 * n * d), "cross-layer": d_features}
    changes = {"per layer": {}, "skip": {"skip": True}, "cross-layer": {"kind": "cross_layer"}}
    return {name: base.model_copy(update={"d_features": widths[name]} | changes[name]) for name in widths}


def train(model, layers: list[int], configs: dict, options: argparse.Namespace, seed: int) -> dict[str, dict]:
    """All kinds side by side, from activations that are computed once."""
    rows = text.chronicle(model, TEXT, seed=100).tokens
    cache = training.cache_activations(model, rows, layers, options.run / "activations")
    seeded = {name: config.model_copy(update={"seed": seed}) for name, config in configs.items()}
    sets, history = training.train_side_by_side(model, cache, layers, seeded, run=options.run / f"training_{seed}")
    print(history.groupby(["name", "layer"])[["fvu", "l0", "dead"]].last().round(3), flush=True)
    for name, parts in sets.items():
        place = options.run / f"seed_{seed}/{name}"
        if not place.exists():
            tc.save_transcoders(parts, place)
    return sets


def measure(model, sets: dict[str, dict[int, tc.Transcoder]], seed: int) -> list[dict]:
    """One record per kind and number."""
    texts = [text.chronicle(model, 16, seed=s) for s in (7, 8)]
    prompts = gt.prompts(model.tokenizer, NOUNS, [CENTURY])
    late = int(np.argmax([gt.drop_if_ablated(model, prompts, layer) for layer in range(model.cfg.n_layers)]))
    records = []
    for name, parts in sets.items():
        numbers = fit(model, parts, texts[0].tokens) | labels(model, parts, texts) | graphs(model, parts)
        numbers |= computing(model, parts, prompts, late)
        records += [
            {"seed": seed, "name": name, "metric": metric, "value": float(value)} for metric, value in numbers.items()
        ]
        print(name, {metric: round(float(value), 3) for metric, value in numbers.items()}, flush=True)
    return records


def fit(model, parts: dict[int, tc.Transcoder], tokens: torch.Tensor) -> dict[str, float]:
    """Reconstruction, and all MLPs replaced at once."""
    found = evaluation.measure(tc.ReplacementModel(model, parts), tokens, groups={"all": list(parts)})
    table, together = found.layers, found.groups.iloc[0]
    numbers = {f"FVU of layer {layer}": value for layer, value in zip(table["layer"], table["fvu"], strict=True)}
    numbers |= {"mean FVU": table["fvu"].mean(), "L0 of a layer": table["l0"].mean()}
    numbers |= {"cross-entropy recovered": together["recovered"], "dead features": table["dead"].mean()}
    return numbers | {"parameters": float(sum(p.numel() for part in parts.values() for p in part.parameters()))}


def labels(model, parts: dict[int, tc.Transcoder], texts: list) -> dict[str, float]:
    """How well single features of any layer stand for the labels that made the text."""
    found = ground_truth.score_set(tc.ReplacementModel(model, parts), *texts).summary()
    names = {"f1": "F1 with the generator's labels", "covered": "labels covered", "split": "labels split"}
    return found[[*names, "absorbed"]].rename(names).to_dict()


def graphs(model, parts: dict[int, tc.Transcoder]) -> dict[str, float]:
    """Attribution graphs of a few prompts, and what their edges predict of features that are taken out."""
    rows, compared = [], []
    for noun in NOUNS:
        for year in YEARS:
            trace = tc.trace(tc.ReplacementModel(model, parts), gt.fill(gt.TEMPLATE, noun, CENTURY, year))
            answer = targets.logit_difference(trace, f"{year + 4:02d}", f"{year - 6:02d}")
            whole = graph.build_graph(trace, [(answer, 1.0)])
            scores = (pruning.path_length, pruning.replacement_score, pruning.completeness_score)
            rows.append([score(whole) for score in scores])
            compared.append(replaced.removals(trace, whole, answer, MOST))
    length, replacement, completeness = np.mean(rows, axis=0)
    table = pd.concat(compared)
    return {
        "path length": length, "replacement score": replacement, "completeness score": completeness,
        "prediction of removals, free": table["predicted"].corr(table["free"]),
        "prediction of removals, MLPs frozen": table["predicted"].corr(table["constrained"]),
    }  # fmt: skip


def computing(model, parts: dict[int, tc.Transcoder], prompts: gt.Prompts, late: int) -> dict[str, float]:
    """Does a set compute as the model does? With few features, and where something is ablated."""
    few = replaced.few_features(tc.ReplacementModel(model, parts), prompts, late, KS).set_index("k")["difference"]
    whole = gt.probability_difference(gt.run(model, prompts), prompts.years).mean().item()
    recovered = 1 - (whole - few) / gt.drop_if_ablated(model, prompts, late)  # 0: held at its mean over YY
    numbers = {f"greater-than with {k} features": value for k, value in recovered.items()}
    some = gt.prompts(model.tokenizer, NOUNS, [CENTURY], range(5, 96, 9))
    found = replaced.agreement(replaced.under_ablations(tc.ReplacementModel(model, parts), some))
    numbers |= {f"{name} under ablations": value for name, value in found.items()}
    missed, moved = 0.0, 1e-12
    for ablation in replaced.middle(model, some, late).values():
        change = replaced.answer_of_mlp(tc.ReplacementModel(model, parts), some, late, ablation)
        missed += (change["imitated"] - change["model"]).square().sum().item()
        moved += change["model"].square().sum().item()
    return numbers | {"unpredicted response of the late MLP": missed / moved}


if __name__ == "__main__":
    main()
