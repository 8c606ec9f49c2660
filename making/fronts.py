"""Measure the fronts, the ground truth and the seed variance that notebook 02b shows: slower than a notebook may be.

    python -m making.fronts --work WORK --run RUN --out data/fronts.json

WORK is the folder that `making.language_model prepare` wrote, RUN takes trained dictionaries and finished parts: the
same command goes on where it was stopped, `--most N` stops after N parts (one layer of one seed each).

Every dictionary sees the same tokens in the same order, with the same number of features, steps and learning rate, and
TopK (Gao et al. 2024), so that all kinds stand at the same L0. SAEs start with encoders along their decoders, which
helps them a little and transcoders not.
"""

import argparse
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import tclib as tc
from making.transcoders import held_out_rows, mixed_rows
from tclib import evaluation, targets, text, training
from tclib.activations import hook_in, hook_out, mlp_activations
from tclib.evaluation import baselines, fronts, ground_truth, matching, stats
from tclib.io.paths import write_whole

KINDS = {
    "transcoder": {},
    "skip transcoder": {"skip": True},
    "SAE on MLP input": {"kind": "sae_in", "tied": True},
    "SAE on MLP output": {"kind": "sae_out", "tied": True},
}
KS = [8, 24, 72]
MIDDLE = 24  # the k at which features are compared with labels and across seeds
PAIRS = [(ours, sae) for ours in list(KINDS)[:2] for sae in list(KINDS)[2:]]
REPLICATES = 100
PROMPT, ANSWERS = "The war lasted from the year 1743 to the year 17", ("71", "21")
TOP = 10  # sources of a small circuit


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m making.fronts", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder that prepare wrote")
    parser.add_argument("--run", type=Path, required=True, help="folder of this run")
    parser.add_argument("--out", type=Path, default=Path("data/fronts.json"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rows", type=int, default=8, help="rows of text per step")
    parser.add_argument("--d-features", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--measured-rows", type=int, default=32, help="rows of each held-out text")
    parser.add_argument("--most", type=int, default=1_000, help="stop after so many parts")
    options = parser.parse_args()

    model = tc.load_model(device="cpu")
    layers = list(range(model.cfg.n_layers))
    base = tc.TrainConfig(
        d_features=options.d_features, steps=options.steps, batch_rows=options.rows, lr=options.lr,
        activation="topk", k=MIDDLE, buffer=4, bfloat16=True,
    )  # fmt: skip
    parts = [(seed, layer) for seed in range(options.seeds) for layer in layers]
    todo = [part for part in parts if not part_file(options.run, *part).exists()]
    if todo:
        rows = mixed_rows(options.work, base.steps * base.batch_rows, model.cfg.n_ctx, model.cfg.bos_token_id, seed=0)
        cache = training.cache_activations(model, rows, layers, options.run / "activations")
        held_out = texts(model, options.work, options.measured_rows)
        for seed, layer in todo[: options.most]:
            learned = train(model, cache, layer, base.model_copy(update={"seed": seed}), options.run)
            result = measure(model, learned, rows, layer, seed, held_out)
            part_file(options.run, seed, layer).write_text(json.dumps(result), encoding="utf-8")
            print(f"seed {seed}, layer {layer} done", flush=True)
    if all(part_file(options.run, *part).exists() for part in parts):
        collect(model, options.run, options.out, base, parts, held_out_rows=options.measured_rows)


def part_file(run: Path, seed: int, layer: int) -> Path:
    return run / f"seed{seed}_layer{layer}.json"


def texts(model, work: Path, rows: int) -> dict[str, torch.Tensor]:
    return {
        "chronicle": text.chronicle(model, rows, seed=1).tokens,
        "real": held_out_rows(work, rows, model.cfg.n_ctx, model.cfg.bos_token_id),
    }


def train(model, cache, layer: int, base: tc.TrainConfig, run: Path) -> dict[tuple[str, int], tc.Transcoder]:
    """All kinds at every k, from one stream; saved, since seeds are compared at the end."""
    configs = {
        f"{kind}, k={k}": base.model_copy(update={**change, "k": k}) for kind, change in KINDS.items() for k in KS
    }
    folder = run / f"seed{base.seed}_layer{layer}"
    trained, _ = training.train_side_by_side(model, cache, [layer], configs, run=folder / "checkpoints")
    learned = {(kind, k): trained[f"{kind}, k={k}"][layer] for kind in KINDS for k in KS}
    for kind in KINDS:
        learned[kind, MIDDLE].save(folder / kind.replace(" ", "_"), dtype=torch.float32)
    return learned


@torch.no_grad()
def measure(model, learned, rows: torch.Tensor, layer: int, seed: int, held_out: dict) -> dict:
    """Points of the fronts, paired gaps with intervals over rows, and scores against the labels."""
    sample = rows[:128]
    acts = next(mlp_activations(model, sample, [layer], len(sample)))[layer]
    words = sample != model.cfg.bos_token_id
    x, y = acts.x[words], acts.y[words]
    d_features = learned["transcoder", MIDDLE].config.d_features
    mean = activations(model, sample, layer)["neurons"].mean(0)
    hooks = {("top-k neurons", k): baselines.top_neurons(model, layer, k, mean) for k in KS}
    dictionaries = learned | {
        ("random directions", k): baselines.random_directions(layer, x, y, k, d_features, seed) for k in KS
    }
    hooks |= {name: evaluation.replacement_hooks(layer, t) for name, t in dictionaries.items()}

    points, gaps = [], []
    for source, tokens in held_out.items():
        front = evaluation.faithfulness(model, tokens, hooks, replicates=REPLICATES)
        front = front[front["name"] != "original"]
        at = pd.DataFrame(front.pop("name").tolist(), columns=["name", "k"], index=front.index)
        front = pd.concat([at, front], axis=1)
        close = {
            name: evaluation.reconstruction(tc.ReplacementModel(model, {layer: t}), tokens).iloc[0]
            for name, t in dictionaries.items()
        }
        front["l0"] = [close[key].l0 if key in close else key[1] for key in zip(front["name"], front["k"], strict=True)]
        point = front[front["replicate"] == 0].drop(columns="replicate")
        point["fvu"] = [
            close[key].fvu if key in close else np.nan for key in zip(point["name"], point["k"], strict=True)
        ]
        points.append(point.assign(text=source, layer=layer, seed=seed))
        for ours, sae in PAIRS:
            gap = stats.over_rows(fronts.gap(front, ours, sae, ["replicate"]), [])
            gaps.append(gap.assign(text=source, layer=layer, seed=seed, ours=ours, other=sae))
    scores = scored_labels(model, dictionaries, layer, seed, d_features)
    return {
        "points": records(pd.concat(points)),
        "gaps": records(pd.concat(gaps).drop(columns="metric")),
        "labels": records(scores),
    }


def scored_labels(model, dictionaries, layer: int, seed: int, d_features: int) -> pd.DataFrame:
    """Every kind of unit against the generator's labels, at equal unit counts."""
    splits = [text.chronicle(model, 120, seed=s) for s in (101, 102)]
    truth = [ground_truth.truth(split) for split in splits]
    acts = [activations(model, split.tokens, layer) for split in splits]
    units = {
        name: [dictionaries[name, MIDDLE].encode(a["y" if name == "SAE on MLP output" else "x"]) for a in acts]
        for name in [*KINDS, "random directions"]
    }
    some = np.random.default_rng(seed).choice(model.cfg.d_mlp, d_features, replace=False)
    units["neurons"] = [a["neurons"][:, some] for a in acts]
    tables = []
    for name, (first, second) in units.items():
        summary = ground_truth.score(first.numpy(), truth[0], second.numpy(), truth[1]).summary()
        tables.append({"name": name, "layer": layer, "seed": seed, "units": d_features, **summary})
    return pd.DataFrame(tables)


@torch.no_grad()
def activations(model, tokens: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
    """MLP inputs ``x``, outputs ``y`` and ``neurons`` at every token but BOS."""
    names = {"x": hook_in(layer), "y": hook_out(layer), "neurons": baselines.neuron_hook(layer)}
    parts: dict[str, list] = {name: [] for name in names}
    for rows in tokens.split(16):
        _, cache = model.run_with_cache(rows, names_filter=list(names.values()), stop_at_layer=layer + 1)
        for name, hook in names.items():
            parts[name].append(cache[hook][rows != model.cfg.bos_token_id])
    return {name: torch.cat(part) for name, part in parts.items()}


def collect(model, run: Path, out: Path, base: tc.TrainConfig, parts: list, held_out_rows: int) -> None:
    done = [json.loads(part_file(run, *part).read_text(encoding="utf-8")) for part in parts]
    tables = {name: [row for part in done for row in part[name]] for name in ("points", "gaps", "labels")}
    result = {
        "command": "python -m making.fronts --work WORK --run RUN --out data/fronts.json",
        "about": {
            "training": base.model_dump(include={"d_features", "activation", "steps", "batch_rows", "lr"}),
            "training_tokens": base.steps * base.batch_rows * model.cfg.n_ctx,
            "k": KS,
            "k_of_labels_and_seeds": MIDDLE,
            "held_out_rows_per_text": held_out_rows,
            "replicates": REPLICATES,
            "prompt": PROMPT,
            "answers": ANSWERS,
        },
        **{name: compact(pd.DataFrame(rows)) for name, rows in tables.items()},
        **{name: compact(table) for name, table in seed_variance(model, run, parts).items()},
    }
    write_whole(out, (json.dumps(result) + "\n").encode())
    print(f"wrote {out}")


@torch.no_grad()
def seed_variance(model, run: Path, parts: list) -> dict[str, pd.DataFrame]:
    """Features matched between seeds by decoder cosine, and the largest sources of one logit difference."""
    load = {
        (kind, *part): tc.Transcoder.load(run / f"seed{part[0]}_layer{part[1]}" / kind.replace(" ", "_"), "cpu")
        for kind in KINDS
        for part in parts
    }
    seeds, layers = (sorted({part[i] for part in parts}) for i in (0, 1))
    tokens = text.chronicle(model, 100, seed=103).tokens
    live = {}
    for kind, seed in ((kind, seed) for kind in KINDS for seed in seeds):
        group = {layer: load[kind, seed, layer] for layer in layers}
        firing = evaluation.measure(tc.ReplacementModel(model, group), tokens, groups={}).firing
        live |= {(kind, seed, layer): rate > 1e-4 for layer, rate in firing.items()}
    features = []
    for kind, layer, (a, b) in ((k, i, pair) for k in KINDS for i in layers for pair in combinations(seeds, 2)):
        one, other = (kind, a, layer), (kind, b, layer)
        found = matching.match(load[one], load[other], live[one], live[other])
        control = matching.match(load[one], rotated(load[other]), live[one], live[other])
        record = {"name": kind, "layer": layer, "seed_a": a, "seed_b": b, "live": len(found)}
        record |= {"median_cosine": found.cosine.median(), "above_0.7": (found.cosine > 0.7).mean()}
        record |= {"rotated_median": control.cosine.median(), "rotated_above_0.7": (control.cosine > 0.7).mean()}
        features.append(record)
    return {"seed_features": pd.DataFrame(features), "seed_circuit": seed_circuit(model, load, seeds, layers)}


def rotated(transcoder: tc.Transcoder) -> tc.Transcoder:
    """The same decoder turned at random: equal geometry within, no relation to the original directions."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(transcoder.config.d_out, transcoder.config.d_out, generator=generator)).Q
    copy = tc.Transcoder(transcoder.config).requires_grad_(False)
    copy.load_state_dict(transcoder.state_dict() | {"W_dec": transcoder.W_dec @ turn})
    return copy


def seed_circuit(model, load: dict, seeds: list[int], layers: list[int]) -> pd.DataFrame:
    """The TOP features behind one logit difference in each seed, and how many have a counterpart among another's."""
    largest = {}
    for seed in seeds:
        replacement = tc.ReplacementModel(model, {layer: load["transcoder", seed, layer] for layer in layers})
        trace = tc.trace(replacement, PROMPT)
        table = tc.attribute(trace, targets.logit_difference(trace, *ANSWERS))
        table = table[table["kind"] == "feature"].head(TOP)
        largest[seed] = {(int(row.layer), int(row.feature)): float(row.contribution) for row in table.itertuples()}
    result = []
    for a, b in ((a, b) for a in seeds for b in seeds if a != b):
        shared = 0
        for layer, feature in largest[a]:
            found = matching.match(load["transcoder", a, layer], load["transcoder", b, layer]).loc[feature]
            shared += found.cosine > 0.7 and (layer, int(found.match)) in largest[b]
        result.append({"seed_a": a, "seed_b": b, "top": TOP, "shared": shared})
    return pd.DataFrame(result)


def records(table: pd.DataFrame) -> list[dict]:
    return json.loads(table.round(5).to_json(orient="records"))


def compact(table: pd.DataFrame) -> dict:
    return json.loads(table.round(5).to_json(orient="split", index=False))


if __name__ == "__main__":
    main()
