"""Train transcoders for the late MLPs of SmolLM2-135M, and measure them.

    python -m making.smollm2 prepare --real FOLDER --work WORK          # ids of prose and of sentences with years
    python -m making.smollm2 train --work WORK --out OUT --device cuda  # goes on where it was interrupted
    python -m making.smollm2 less --work WORK --out OUT                 # two seeds on a sixteenth of the tokens
    python -m making.smollm2 ship --work WORK --out OUT                 # rounds into data/smollm2 and measures

All layers learn from one forward pass. Beside them OUT holds variants of the key layers, for comparison: with a skip
path, with twice as many features, and one layer from two seeds on less text.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import tclib as tc
from making.training_text import HELD_OUT, chronicle_ids, clean, cut_into_documents, encode
from making.transcoders import held_out_rows
from tclib import evaluation, training
from tclib.io.paths import data_path
from tclib.model import model_folder

LAYERS = tuple(range(20, 28))  # where the digit is decided, at the last token
KEY = (23, 24)
ROW = 128  # tokens
YEAR_SHARE = 1 / 8  # of the rows, cut from chronicle prose
CHRONICLE_TOKENS = 2_500_000
STEPS = 1_143  # what six minutes of one H200 allowed
RECIPE = training.TrainConfig(
    d_features=4608, activation="topk", k=32, tied=True, batch_rows=128, buffer=8, passes=2, steps=STEPS, lr=1e-3,
    decay=0.5, clip=1.0, dead_after=500_000,
)  # fmt: skip
RATES = (5e-4, 1e-3, 2e-3, 4e-3)  # tried on one key layer for RATE_STEPS
RATE_STEPS = 200
RUNS = {
    "plain": (LAYERS, {"plain": {}}),
    "variants": (KEY, {"skip": {"skip": True}, "wide": {"d_features": 9216}}),
}
# As many steps of a sixteenth of the size: two shared cores train one layer from two seeds within an hour. The rate is
# the best of 1.25e-4, 2.5e-4, 5e-4 and 1e-3 after 400 steps; with that of the large batches, half of the 32 places stay
# empty.
LESS = RECIPE.model_copy(update={"batch_rows": 8, "buffer": 64, "dead_after": 50_000, "lr": 5e-4})
LESS_SETS = {"less_seed0": 0, "less_seed1": 1}
SHIPPED = ("plain", "skip")
EVALUATION_ROWS = 24


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m making.smollm2", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("prepare", "train", "less", "ship"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--real", type=Path, help="prepare: folder of .txt files")
    parser.add_argument("--out", type=Path, help="folder for the transcoders")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device")
    options = parser.parse_args()
    if options.command == "prepare":
        prepare(options.real, options.work, options.model)
        return
    torch.set_float32_matmul_precision("high")  # TF32 where the device has it
    model = tc.load_model(options.model, device=options.device)
    if options.command == "train":
        train(model, options.work, options.out)
    elif options.command == "less":
        train_on_less(model, options.work, options.out)
    else:
        ship(model, options.work, options.out, data_path("smollm2"))


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


def train(model: TransformerBridge, work: Path, out: Path) -> None:
    rows = rows_of(work, RECIPE.seed)
    print(f"{rows.numel():,} distinct tokens, {STEPS * RECIPE.batch_rows * ROW:,} seen", flush=True)
    base = RECIPE.model_copy(update={"lr": best_rate(model, rows, out)})
    for run, (layers, changes) in RUNS.items():
        configs = {name: base.model_copy(update=change) for name, change in changes.items()}
        trained, history = training.train_side_by_side(
            model, rows, layers, configs, run=out / "runs" / run, progress=True, checkpoint_seconds=600
        )
        print(history[history.step == history.step.max()].to_string(), flush=True)
        for name, transcoders in trained.items():
            save(transcoders, out / name)


def train_on_less(model: TransformerBridge, work: Path, out: Path) -> None:
    """One key layer from two seeds on the first part of the same text: what the seed does, and what the text does."""
    rows = rows_of(work, RECIPE.seed)
    rows = rows[: STEPS * LESS.batch_rows // LESS.passes + LESS.batch_rows * LESS.buffer]
    print(f"{rows.numel():,} distinct tokens", flush=True)
    stored = training.cache_activations(model, rows, KEY[1:], out / "runs" / "activations")
    for name, seed in LESS_SETS.items():
        config = LESS.model_copy(update={"seed": seed})
        transcoders, history = tc.train(model, stored, KEY[1:], config, run=out / "runs" / name, progress=True)
        print(history.tail(1).to_string(), flush=True)
        save(transcoders, out / name)


def save(transcoders: dict[int, tc.Transcoder], folder: Path) -> None:
    for layer, transcoder in transcoders.items():
        transcoder.config = transcoder.config.model_copy(update={"model_name": "smollm2"})
        transcoder.save(folder / f"layer_{layer}")


def best_rate(model: TransformerBridge, rows: Tensor, out: Path) -> float:
    """The learning rate after whose short run the error is smallest."""
    file = out / "rates.json"
    if not file.exists():
        changes = {str(rate): {"lr": rate, "steps": RATE_STEPS, "passes": 1} for rate in RATES}
        configs = {name: RECIPE.model_copy(update=change) for name, change in changes.items()}
        _, history = training.train_side_by_side(model, rows, KEY[:1], configs)
        last = history[history.step >= 0.95 * RATE_STEPS].groupby("name").fvu.mean()
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(last.to_json() + "\n", encoding="utf-8")
    tried = json.loads(file.read_text(encoding="utf-8"))
    return float(min(tried, key=tried.get))


def ship(model: TransformerBridge, work: Path, out: Path, folder: Path) -> None:
    """Round to int8, and write how good each layer is on held-out prose, before and after that where it is shipped."""
    bos = model.tokenizer.bos_token_id
    tokens = held_out_rows(work, EVALUATION_ROWS, ROW, bos)
    report = {}
    for name in (*SHIPPED, *LESS_SETS):
        exact = tc.load_transcoders(out / name, device=model.cfg.device)
        kept = exact
        if name in SHIPPED:
            for layer, transcoder in exact.items():
                transcoder.save(folder / name / f"layer_{layer}", dtype=torch.int8)
            kept = tc.load_transcoders(folder / name, device=model.cfg.device)
        before = evaluation.reconstruction(tc.ReplacementModel(model, exact), tokens).set_index("layer")
        table = tc.evaluate(tc.ReplacementModel(model, kept), tokens).set_index("layer")
        table = table.assign(fvu_float16=before["fvu"])
        report[name] = json.loads(table.round(4).to_json(orient="index"))
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(report, tokens.numel()), encoding="utf-8")


def card(report: dict, tokens: int) -> str:
    """The recipe and what was measured, for those who load the files."""
    columns = ["l0", "fvu", "fvu_float16", "dead", "recovered"]
    rows = [
        [name, layer, *(f"{values[column]:.3f}" for column in columns)]
        for name, layers in report.items()
        for layer, values in layers.items()
    ]
    head = ["set", "layer", "L0", "FVU", "FVU in float16", "dead", "cross-entropy recovered"]
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    return CARD.format(seen=STEPS * RECIPE.batch_rows * ROW / 1e6, tokens=tokens, table="\n".join(lines))


CARD = """# Transcoders of SmolLM2-135M

TopK transcoders (32 of 4,608 features) of the MLPs of layers 20 to 27, `tc.load_transcoders("smollm2")`, and of layers
23 and 24 with a skip path, `tc.load_transcoders("smollm2-skip")`. They belong to the model that `python -m tclib
smollm2` installs, whose weights are rounded to about six bits. Encoders and decoders are stored in int8, one scale for
each feature.

Made by `python -m making.smollm2`: {seen:.1f} million tokens (16.7 million distinct ones: public-domain prose, and one
row in eight of chronicle prose with its years), rows of 128 tokens behind `<|endoftext|>`, all layers from one forward
pass, on one H200. The learning rate is the best of four after a short run on layer 23.

`less_seed0` and `less_seed1` are not shipped. They are layer 24 from two seeds, trained by `python -m making.smollm2
less` in as many steps of a sixteenth of the size: 1.2 million tokens, 0.65 million distinct ones.

On {tokens:,} tokens of three works that neither was trained on (dead: fires on none of them):

{table}

The target was an FVU of .20 at an L0 of about 32 in layers 23 and 24.
"""


if __name__ == "__main__":
    main()
