"""Make the bundled transcoders, one per layer, and the report of how good they are.

    python -m making.transcoders --work WORK --out data/transcoders --layers 0 --l1 0.05
    python -m making.transcoders --work WORK --out data/transcoders --layers 1 2 --l1 0.08

WORK is the folder that `making.language_model prepare` wrote: the transcoders see the same mix of real and chronicle
prose as the model did, and are measured on works and documents that neither saw.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import tclib as tc
from tclib import text

REAL_FRACTION = 0.4  # as in the model's own training
EVALUATION_ROWS = 400


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m making.transcoders", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled", help="folder of the model")
    parser.add_argument("--work", type=Path, required=True, help="folder that prepare wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rows", type=int, default=16, help="rows of text per step")
    parser.add_argument("--d-features", type=int, default=2048)
    parser.add_argument("--l1", type=float, default=0.08)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--layers", type=int, nargs="*", help="all by default")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    model = tc.load_model(options.model, device="cpu")
    layers = options.layers or list(range(model.cfg.n_layers))
    rows = mixed_rows(options.work, options.steps * options.rows, model.cfg.n_ctx, model.cfg.bos_token_id, options.seed)
    config = tc.TrainConfig(
        d_features=options.d_features, l1=options.l1, lr=options.lr, steps=options.steps, rows=options.rows,
        bfloat16=True, seed=options.seed,
    )  # fmt: skip
    transcoders, _ = tc.train(model, rows, layers, config, progress=True)
    for layer, transcoder in transcoders.items():
        transcoder.save(options.out / f"layer_{layer}")
    # Measured as they will be read: from the fp16 files.
    report = measure(model, tc.load_transcoders(options.out), options.work)
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


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
    bos = model.cfg.bos_token_id
    texts = {
        "chronicle": text.chronicle(model, EVALUATION_ROWS, seed=1).tokens,
        "real": held_out_rows(work, EVALUATION_ROWS, model.cfg.n_ctx, bos),
    }
    report = {}
    for name, tokens in texts.items():
        table = tc.evaluate(model, transcoders, tokens).set_index("layer").round(4)
        report[name] = json.loads(table.to_json(orient="index"))
    return report


if __name__ == "__main__":
    main()
