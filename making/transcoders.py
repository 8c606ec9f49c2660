"""Make the bundled transcoders, one per layer, and the report of how good they are.

    python -m making.transcoders --work WORK --out data/transcoders
    torchrun --nproc-per-node 2 -m making.transcoders --work WORK --out OUT    # the same weights, up to rounding
    python -m making.transcoders --work WORK --out data/transcoders --compare  # widths and the skip path, at equal L0
    python -m making.transcoders --work WORK --out data/transcoders --by-row   # what is lost in each row of real prose

WORK is the folder that `making.language_model prepare` wrote: the transcoders see the same mix of real and chronicle
prose as the model did, and are measured on works and documents that neither saw. An interrupted run goes on if --run
names the same folder.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import tclib as tc
from tclib import evaluation, interventions, text, training
from tclib.activations import forward
from tclib.training import distributed

REAL_FRACTION = 0.4  # as in the model's own training
EVALUATION_ROWS = 400
ROWS_ALONE = 126  # of real prose, each measured alone: 42 of each of three works
L1 = (0.055, 0.08, 0.1)  # by layer
COMPARED = {
    "512 features": {},
    "2,048 features": {"d_features": 2048},
    "4,096 features": {"d_features": 4096},
    "2,048 features and a skip path": {"d_features": 2048, "skip": True},
}
COMPARED_K = 12
COMPARED_STEPS = 200


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m making.transcoders", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled", help="folder of the model")
    parser.add_argument("--work", type=Path, required=True, help="folder that prepare wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run", type=Path, help="folder for checkpoints")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rows", type=int, default=16, help="rows of text per step")
    parser.add_argument("--passes", type=int, default=3, help="how often each token is used")
    parser.add_argument("--d-features", type=int, default=2048)
    parser.add_argument("--l1", type=float, nargs="*", default=L1, help="one per layer")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="write comparison.json instead")
    parser.add_argument(
        "--by-row", action="store_true", help="write real_rows.json of the transcoders in --out instead"
    )
    options = parser.parse_args()
    with distributed.processes() as device:
        (compare if options.compare else by_row if options.by_row else make)(options, device)


def recipe(l1: float, steps: int, **changes) -> tc.TrainConfig:
    """What `making.ablations` found worth its place."""
    settings = dict(
        d_features=2048,
        lr=2e-3,
        batch_rows=16,
        buffer=16,
        passes=3,
        clip=1.0,
        start_l0=64,
        tied=True,
        unit_norm=False,
        dead_bias_lift=1.0,
        dead_after=50_000,
        bfloat16=True,
    )
    return tc.TrainConfig(l1_coefficient=l1, steps=steps, **(settings | changes))


def make(options: argparse.Namespace, device: str) -> None:
    """Train, save and measure."""
    model = tc.load_model(options.model, device=device)
    common = {name: getattr(options, name) for name in ("steps", "rows", "passes", "d_features", "lr", "seed")}
    configs = {layer: recipe(l1, **common) for layer, l1 in enumerate(options.l1)}
    shared = configs[0]
    count = shared.steps * shared.batch_rows // shared.passes + shared.batch_rows * shared.buffer  # no row twice
    rows = mixed_rows(options.work, count, model.cfg.n_ctx, model.cfg.bos_token_id, options.seed)
    transcoders, _ = tc.train(model, rows, list(configs), configs, progress=True, run=options.run)
    if distributed.rank() > 0:
        return
    for layer, transcoder in transcoders.items():
        transcoder.save(options.out / f"layer_{layer}")
    # Measured as they will be read: from the fp16 files.
    report = measure(model, tc.load_transcoders(options.out), options.work)
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


def compare(options: argparse.Namespace, device: str) -> None:
    """Write FVU of several widths, plain and skip, at the same k of TopK, after a short training run."""
    model = tc.load_model(options.model, device=device)
    layers = list(range(model.cfg.n_layers))
    base = tc.TrainConfig(
        d_features=512, steps=COMPARED_STEPS, batch_rows=options.rows, lr=options.lr, activation="topk", k=COMPARED_K,
        buffer=4, dead_after=50_000, bfloat16=True, seed=options.seed,
    )  # fmt: skip
    rows = mixed_rows(
        options.work, COMPARED_STEPS * base.batch_rows, model.cfg.n_ctx, model.cfg.bos_token_id, options.seed
    )
    configs = {name: base.model_copy(update=change) for name, change in COMPARED.items()}
    trained, _ = training.train_side_by_side(model, rows, layers, configs, progress=True)
    table = []
    for name, transcoders in trained.items():
        for source, tokens in evaluation_texts(model, options.work).items():
            measured = evaluation.reconstruction(tc.ReplacementModel(model, transcoders), tokens)[
                ["layer", "l0", "fvu", "dead"]
            ]
            table += measured.assign(name=name, text=source, tokens=rows.numel()).to_dict("records")
    (options.out / "comparison.json").write_text(json.dumps(table, indent=0) + "\n", encoding="utf-8")


def by_row(options: argparse.Namespace, device: str) -> None:
    """Write cross-entropy and KL of each row of real prose alone, with MLPs replaced, at their mean, and at zero."""
    model, transcoders = tc.load_model(options.model, device=device), tc.load_transcoders(options.out)
    tokens = held_out_rows(options.work, ROWS_ALONE, model.cfg.n_ctx, model.cfg.bos_token_id)
    layers = sorted(transcoders)
    parts = [{layer: acts.y.sum((0, 1)) for layer, acts in part.items()} for part in forward(model, tokens, layers, 16)]
    mean = {layer: sum(part[layer] for part in parts) / tokens.numel() for layer in layers}
    ways = {
        "replaced": lambda layer: evaluation.replacement_hooks(layer, transcoders[layer]),
        "mean": lambda layer: interventions.ablate_mlp(layer, mean[layer]),
        "zero": interventions.ablate_mlp,
    }
    groups = {str(name): inside for name, inside in evaluation.cumulative(layers).items()}
    hooks = {
        (way, g): [h for i in inside for h in edit(i)] for way, edit in ways.items() for g, inside in groups.items()
    }
    tables = [evaluation.faithfulness(model, row[None], hooks).set_index("name") for row in tokens]
    numbers = {m: pd.concat([t[m] for t in tables], axis=1, ignore_index=True).T.round(4) for m in ("ce", "kl")}
    works = [path.stem.removeprefix("real_heldout_") for path in sorted(options.work.glob("real_heldout_*.npy"))]
    result = {
        "command": "python -m making.transcoders --work WORK --out data/transcoders --by-row",
        "works": works,
        "work": [int(i) for i in np.repeat(np.arange(len(works)), len(tokens) // len(works))],
        "ce": numbers["ce"]["original"].tolist(),
        **{
            f"{metric}_{way}": {g: numbers[metric][way, g].tolist() for g in groups}
            for metric in ("ce", "kl")
            for way in ways
            if metric == "ce" or way == "replaced"
        },
    }
    (options.out / "real_rows.json").write_text(json.dumps(result) + "\n", encoding="utf-8")


def mixed_rows(work: Path, count: int, width: int, bos: int, seed: int) -> Tensor:
    """Rows of training text, each cut at random from the real or the chronicle ids, with BOS in front."""
    rng = np.random.default_rng([seed, 1])
    sources = [np.load(work / f"{name}_train.npy", mmap_mode="r") for name in ("chronicle", "real")]
    rows = np.full((count, width), bos, dtype=np.int64)
    for row in rows:
        ids = sources[int(rng.random() < REAL_FRACTION)]
        start = rng.integers(len(ids) - width)
        row[1:] = ids[start + 1 : start + width]
    return torch.from_numpy(rows)


def held_out_rows(work: Path, count: int, width: int, bos: int) -> Tensor:
    """Rows spread evenly over the held-out works."""
    works = [np.load(path) for path in sorted(work.glob("real_heldout_*.npy"))]
    rows = []
    for ids in works:
        for start in np.linspace(0, len(ids) - width, count // len(works)).astype(int):
            rows.append(np.concatenate([[bos], ids[start + 1 : start + width]]).astype(np.int64))
    return torch.from_numpy(np.stack(rows))


def measure(model, transcoders: dict[int, tc.Transcoder], work: Path) -> dict:
    """L0, FVU, dead features and cross-entropy per layer, on unseen chronicle and on held-out real prose."""
    report = {}
    for name, tokens in evaluation_texts(model, work).items():
        table = tc.evaluate(tc.ReplacementModel(model, transcoders), tokens).set_index("layer").round(4)
        report[name] = json.loads(table.to_json(orient="index"))
    return report


def evaluation_texts(model, work: Path) -> dict[str, Tensor]:
    return {
        "chronicle": text.chronicle(model, EVALUATION_ROWS, seed=1).tokens,
        "real": held_out_rows(work, EVALUATION_ROWS, model.cfg.n_ctx, model.cfg.bos_token_id),
    }


if __name__ == "__main__":
    main()
