"""Train transcoders for the late MLPs of SmolLM2-135M, and measure them.

    python -m making.smollm2 prepare --real FOLDER --work WORK          # ids of prose and of sentences with years
    python -m making.smollm2 train --work WORK --out OUT --device cuda  # goes on where it was interrupted
    python -m making.smollm2 report --work WORK --out OUT

All layers learn from one forward pass. OUT/late holds the layers that the bundle is made of; beside it lie the variants of
the key layers that a comparison needs: a skip path, a second seed, twice as many features, a tenth of the text.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

import tclib as tc
from making.training_text import HELD_OUT, chronicle_ids, clean, cut_into_documents, encode
from making.transcoders import held_out_rows
from tclib import training
from tclib.model import model_folder

LAYERS = tuple(range(20, 28))  # where the digit is decided, at the last token
KEY = (23, 24)
ROW = 128  # tokens
YEAR_SHARE = 1 / 8  # of the rows, cut from chronicle prose
CHRONICLE_TOKENS = 2_500_000
STEPS = 1_900
RECIPE = training.TrainConfig(
    d_features=4608, activation="topk", k=32, tied=True, rows=128, buffer=8, passes=2, steps=STEPS, lr=1e-3,
    decay=0.5, clip=1.0, dead_after=500_000,
)  # fmt: skip
RATES = (5e-4, 1e-3, 2e-3, 4e-3)  # tried on one key layer for RATE_STEPS
RATE_STEPS = 240
VARIANTS = {
    "skip": {"skip": True},
    "seed 1": {"seed": 1},
    "9,216 features": {"d_features": 9216},
}
EVALUATION_ROWS = 240


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m making.smollm2", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("prepare", "train", "report"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--real", type=Path, help="prepare: folder of .txt files")
    parser.add_argument("--out", type=Path, help="folder for the transcoders")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    if options.command == "prepare":
        prepare(options.real, options.work, options.model)
        return
    torch.set_float32_matmul_precision("high")  # TF32 where the device has it
    model = tc.load_model(options.model, device=options.device)
    if options.command == "train":
        train(model, options.work, options.out, options.steps)
    else:
        report = {name: measure(model, folder, options.work) for name, folder in sets(options.out)}
        (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(report, indent=1))


def prepare(real: Path, work: Path, name: str) -> None:
    """Write `real_train.npy`, `chronicle_train.npy` and `real_heldout_*.npy`, a separator before each document."""
    work.mkdir(parents=True, exist_ok=True)
    file = model_folder(name) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    works = {path.stem: clean(path.read_text(encoding="utf-8")) for path in sorted(real.glob("*.txt"))}
    train = [part for name, text in works.items() if name not in HELD_OUT for part in cut_into_documents(text)]
    np.save(work / "real_train.npy", encode(tokenizer, train))
    for name in HELD_OUT:
        np.save(work / f"real_heldout_{name}.npy", encode(tokenizer, list(cut_into_documents(works[name]))))
    np.save(work / "chronicle_train.npy", chronicle_ids(file, CHRONICLE_TOKENS))


def rows_of(work: Path, seed: int) -> Tensor:
    """All the prose once, in rows, and rows of chronicle among it; BOS takes the place of each row's first token."""
    real, chronicle = (np.load(work / f"{name}_train.npy") for name in ("real", "chronicle"))
    real = real[: len(real) // ROW * ROW].reshape(-1, ROW)
    count = min(round(len(real) * YEAR_SHARE / (1 - YEAR_SHARE)), len(chronicle) // ROW)
    rows = np.concatenate([real, chronicle[: count * ROW].reshape(-1, ROW)]).astype(np.int32)
    rows[:, 0] = chronicle[0]  # the separator
    return torch.from_numpy(np.random.default_rng(seed).permutation(rows))


def train(model, work: Path, out: Path, steps: int) -> None:
    rows = rows_of(work, RECIPE.seed)
    print(f"{rows.numel():,} distinct tokens, {steps * RECIPE.rows * ROW:,} seen", flush=True)
    rate = best_rate(model, rows, out, min(steps, RATE_STEPS))
    base = RECIPE.model_copy(update={"lr": rate, "steps": steps})
    short = base.model_copy(update={"steps": max(1, steps // 10), "passes": 1})
    configs = {name: base.model_copy(update=change) for name, change in VARIANTS.items() if "seed" not in change}
    runs = {
        "late": (LAYERS, {"late": base}),
        "variants": (KEY, configs),
        "seed": (KEY, {"seed 1": base.model_copy(update={"seed": 1})}),
        "short": (KEY, {"a tenth of the text": short}),
    }
    for run, (layers, its) in runs.items():
        trained, history = training.train_side_by_side(
            model, rows, layers, its, run=out / "runs" / run, progress=True, checkpoint_seconds=600
        )
        print(history[history.step == history.step.max()].to_string(), flush=True)
        for name, transcoders in trained.items():
            for layer, transcoder in transcoders.items():
                transcoder.config = transcoder.config.model_copy(update={"model_name": "smollm2"})
                transcoder.save(out / name.replace(" ", "_").replace(",", "") / f"layer_{layer}")


def best_rate(model, rows: Tensor, out: Path, steps: int) -> float:
    """The learning rate after whose short run the error is smallest."""
    configs = {str(rate): RECIPE.model_copy(update={"lr": rate, "steps": steps, "passes": 1}) for rate in RATES}
    _, history = training.train_side_by_side(model, rows, KEY[:1], configs)
    last = history[history.step >= 0.9 * (steps - 1)].groupby("name").fvu.mean()
    (out / "rates.json").parent.mkdir(parents=True, exist_ok=True)
    (out / "rates.json").write_text(last.to_json() + "\n", encoding="utf-8")
    print(last.to_string(), flush=True)
    return float(last.idxmin())


def sets(out: Path) -> Iterator[tuple[str, Path]]:
    for folder in sorted(out.iterdir()):
        if list(folder.glob("layer_*.safetensors")):
            yield folder.name, folder


def measure(model, folder: Path, work: Path) -> dict:
    """L0, FVU, dead features and cross-entropy of each layer on held-out prose and on unseen chronicle prose."""
    transcoders = tc.load_transcoders(folder, device=model.cfg.device)
    bos = model.tokenizer.bos_token_id
    texts = {"prose": held_out_rows(work, EVALUATION_ROWS, ROW, bos)}
    report = {}
    for name, tokens in texts.items():
        table = tc.evaluate(model, transcoders, tokens).set_index("layer").round(4)
        report[name] = json.loads(table.to_json(orient="index"))
    return report


if __name__ == "__main__":
    main()
