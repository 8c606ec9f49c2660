"""What each aid of the trainer is worth: remove it from the recipe, or add one that was left out.

    python -m making.ablations --work WORK --parts PARTS --layer 0 --seed 0    # and so on for layers 0 2, seeds 0 1 2
    python -m making.ablations --work WORK --parts PARTS --time                # where the time of a step goes
    python -m making.ablations --work WORK --parts PARTS --laptop              # the short run, on two threads
    python -m making.ablations --parts PARTS --out data/ablations.json

Each variant is compared with the recipe *at its own L0*: the recipe is trained with several coefficients, and its FVU
is read off that front by interpolation of logarithms. Aids that earned nothing live here, as subclasses, and not in
`tclib`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import tclib as tc
from making.transcoders import L1, held_out_rows, mixed_rows, recipe
from tclib import evaluation, text
from tclib.training import distributed
from tclib.training.stream import ModelSource, Stream
from tclib.training.trainer import Trainer

COEFFICIENTS = {0: 0.06, 2: 0.08}  # by layer; such that L0 is about that of the bundled transcoders
FRONT = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the coefficient
STEPS = 240
LAPTOP = {"steps": 1300, "passes": 6, "factor": 1.0}
SMALL = {"d_features": 512, "batch_rows": 4, "buffer": 16, "passes": 2, "dead_after": 15_000}


class Tangent(Trainer):
    """Drops the part of the decoder's gradient that only changes the length of its rows (Bricken et al. 2023)."""

    @torch.no_grad()
    def update(self) -> None:
        t = self.transcoder
        t.W_dec.grad -= (t.W_dec.grad * t.W_dec).sum(1, keepdim=True) * t.W_dec
        super().update()


class Unscaled(Trainer):
    """Trains on the model's own scales, with the penalty in the same units."""

    def measure_scales(self, x, y) -> None:
        super().measure_scales(x, y)
        self.size = self.y_scale
        self.x_mean, self.y_mean = torch.zeros_like(self.x_mean), torch.zeros_like(self.y_mean)
        self.x_scale, self.y_scale = torch.ones_like(self.x_scale), torch.ones_like(self.y_scale)

    def penalty(self, z, pre):
        return super().penalty(z, pre) * self.size


class Resampling(Trainer):
    """Gives dead features a badly imitated token to read and what was missing there to write (Bricken et al. 2023)."""

    EVERY = STEPS // 8

    def step(self, x, y, step):
        row = super().step(x, y, step)
        if step % self.EVERY == self.EVERY - 1 and step < 0.7 * self.config.steps:
            self.resample(*self.scaled(x, y), step)
        return row

    @torch.no_grad()
    def resample(self, x, y, step) -> None:
        t, dead = self.transcoder, self.dead().nonzero().flatten()
        if len(dead) == 0:
            return
        error, x = distributed.gathered(y - t(x)), distributed.gathered(x)
        weight = error.double().pow(2).sum(1).numpy()
        rng = np.random.default_rng([self.config.seed, 2, step])
        chosen = torch.from_numpy(rng.choice(len(weight), len(dead), p=weight / weight.sum()))
        alive = torch.ones_like(self.silent, dtype=torch.bool).index_fill(0, dead, False)
        reads = x[chosen] / x[chosen].norm(dim=1, keepdim=True) * 0.2 * t.W_enc[:, alive].norm(dim=0).mean()
        t.W_enc[:, dead] = reads.T
        t.b_enc[dead] = -0.5 * (reads * x[chosen]).sum(1)  # fires where x is at least half as much like this token
        t.W_dec[dead] = error[chosen] / error[chosen].norm(dim=1, keepdim=True)
        self.silent[dead] = 0
        for p, where in ((t.W_enc, (slice(None), dead)), (t.b_enc, dead), (t.W_dec, dead)):
            for moment in ("exp_avg", "exp_avg_sq"):
                self.adam.state[p][moment][where] = 0


class Ghost(Trainer):
    """Lets dead features explain the true residual through exp(pre): ghost gradients (Jermyn & Templeton 2024)."""

    def revival(self, pre, error):
        t, dead = self.transcoder, self.dead()
        if not dead.any():
            return 0.0
        ghost = pre[:, dead].exp() @ t.W_dec[dead]
        ghost = ghost * (error.norm(dim=1) / (2 * ghost.norm(dim=1) + 1e-6)).detach()[:, None]
        loss = (error - ghost).pow(2).sum()
        return loss * (error.pow(2).sum() / loss).detach()  # as large as the main loss


# name -> (what the table says, class, changes to the recipe)
TOPK = {"activation": "topk", "k": 16, "unit_norm": True, "dead_bias_lift": 0.0}
VARIANTS = {
    "no start": ("without: biases start at the quantile", Trainer, {"start_l0": None}),
    "no clip": ("without: gradients clipped", Trainer, {"clip": None}),
    "no tie": ("without: encoder starts along the decoder", Trainer, {"tied": False}),
    "no warm-up": ("without: warm-up of the learning rate", Trainer, {"warmup": 0.0}),
    "no decay": ("without: decay of the learning rate", Trainer, {"decay": 0.0}),
    "no sparsity warm-up": ("without: slow rise of the coefficient", Trainer, {"sparsity_warmup": 0.0}),
    "no scaling": ("without: scaled activations", Unscaled, {}),
    "no shuffling": ("without: shuffling buffer", Trainer, {"buffer": 1, "passes": 1}),
    "one pass": ("without: several passes over a buffer", Trainer, {"passes": 1}),
    "no lift": ("without: dead features lifted", Trainer, {"dead_bias_lift": 0.0}),
    "unit norm": ("with: decoder rows of unit length", Trainer, {"unit_norm": True}),
    "tangent": ("with: tangent gradients, against unit length alone", Tangent, {"unit_norm": True}),
    "resampling": ("with: resampling in place of the lift", Resampling, {"dead_bias_lift": 0.0}),
    "ghost": ("with: ghost gradients in place of the lift", Ghost, {"dead_bias_lift": 0.0}),
    "topk": ("with: TopK in place of ReLU", Trainer, TOPK),
    "topk no aux": ("with: TopK without aux-k, against TopK", Trainer, TOPK | {"aux": 0.0}),
}
AGAINST = {"tangent": "unit norm", "topk no aux": "topk"}  # all others: the recipe's front


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m making.ablations", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder that prepare wrote")
    parser.add_argument("--parts", type=Path, required=True, help="folder for the parts")
    parser.add_argument("--layer", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--time", action="store_true", help="measure where the time of a step goes")
    parser.add_argument("--laptop", action="store_true", help="time a short run of all layers on two threads")
    parser.add_argument("--out", type=Path, help="join the parts into this file")
    options = parser.parse_args()
    if options.out:
        parts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(options.parts.glob("part_*.json"))]
        times = json.loads((options.parts / "time.json").read_text(encoding="utf-8"))
        result = joined(pd.DataFrame(sum(parts, []))) | {"time": times}
        if (options.parts / "laptop.json").exists():
            result["laptop"] = json.loads((options.parts / "laptop.json").read_text(encoding="utf-8"))
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return
    options.parts.mkdir(parents=True, exist_ok=True)
    if options.time:
        (options.parts / "time.json").write_text(json.dumps(where_time_goes(options.work)), encoding="utf-8")
        return
    if options.laptop:
        (options.parts / "laptop.json").write_text(json.dumps(on_a_laptop(options.work)), encoding="utf-8")
        return
    rows = part(options.work, options.layer, options.seed)
    (options.parts / f"part_{options.layer}_{options.seed}.json").write_text(json.dumps(rows), encoding="utf-8")


def part(work: Path, layer: int, seed: int) -> list[dict]:
    """Train all variants on one layer with one seed; L0, FVU, dead features and seconds of each."""
    model = tc.load_model(device="cpu")
    base = recipe(COEFFICIENTS[layer], STEPS, **SMALL, seed=seed)
    variants = {f"recipe x{f}": ("", Trainer, {"l1_coefficient": COEFFICIENTS[layer] * f}) for f in FRONT} | VARIANTS
    configs = {name: base.model_copy(update=changes) for name, (_, _, changes) in variants.items()}
    count = STEPS * base.batch_rows
    train_rows = mixed_rows(work, count, model.cfg.n_ctx, model.cfg.bos_token_id, seed)
    source, streams, trainers = ModelSource(model, train_rows, [layer]), {}, {}
    for name, (_, kind, _) in variants.items():
        c = configs[name]
        stream = streams.setdefault((c.buffer, c.passes), Stream(source, c))
        trainers[name] = kind(layer, *stream.sample()[layer], c)
    seconds = dict.fromkeys([*trainers, *streams], 0.0)
    for step in range(STEPS):
        batches = {}
        for key, stream in streams.items():
            start = time.process_time()
            batches[key] = stream.batch(step)[layer]
            seconds[key] += time.process_time() - start
        for name, trainer in trainers.items():
            start = time.process_time()
            trainer.step(*batches[configs[name].buffer, configs[name].passes], step)
            seconds[name] += time.process_time() - start
    bos = model.cfg.bos_token_id
    tokens = torch.cat(
        [text.chronicle(model, 30, seed=1).tokens, held_out_rows(work, 30, model.cfg.n_ctx, bos)]
    )  # as the training text, half chronicle and half real prose
    records = []
    for name, trainer in trainers.items():
        row = evaluation.reconstruction(tc.ReplacementModel(model, {layer: trainer.finished()}), tokens).iloc[0]
        total = seconds[name] + seconds[configs[name].buffer, configs[name].passes]
        records.append(
            {"layer": layer, "seed": seed, "name": name, "seconds": total}
            | {column: float(row[column]) for column in ("l0", "fvu", "dead")}
        )
    return records


def where_time_goes(work: Path, repeats: int = 5) -> list[dict]:
    """CPU milliseconds of one step of the bundled transcoders' recipe: all layers, 2,048 tokens, one thread."""
    model = tc.load_model(device="cpu")
    config = recipe(0.01, STEPS, batch_rows=16, buffer=16)
    layers = list(range(model.cfg.n_layers))
    tokens = mixed_rows(work, config.batch_rows * config.buffer, model.cfg.n_ctx, model.cfg.bos_token_id, 0)
    stream = Stream(ModelSource(model, tokens, layers), config)
    sample, fill = clocked(stream.sample)
    trainers = [Trainer(layer, *sample[layer], config) for layer in layers]
    spent = dict.fromkeys(TIMES, 0.0)
    for step in range(-3, repeats):  # the first three warm up
        batch, dealt = clocked(stream.batch, max(step, 0) + 1)
        took = {"shuffling": dealt} | dict.fromkeys(list(TIMES)[2:], 0.0)
        for layer, trainer in enumerate(trainers):
            x, y = trainer.scaled(*batch[layer])
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                z, encoding = clocked(trainer.transcoder.encode, x)
                _, decoding = clocked(trainer.transcoder.decode, z, x)
            _, both = clocked(trainer.gradients, x, y)
            _, update = clocked(trainer.update)
            parts = {"encoder": encoding, "decoder": decoding, "update": update}
            for name, value in (parts | {"backward": both - encoding - decoding}).items():
                took[name] += value
        if step >= 0:
            spent = {name: spent[name] + took.get(name, 0.0) / repeats for name in TIMES}
    spent["model"] = fill / (config.buffer * config.passes)
    return [{"what": TIMES[name], "milliseconds": round(1000 * value, 2)} for name, value in spent.items()]


def on_a_laptop(work: Path) -> dict:
    """Minutes for all layers of the bundled model on two threads, and how good they are beside the bundled ones."""
    torch.set_num_threads(2)
    model = tc.load_model(device="cpu")
    changes = {"passes": LAPTOP["passes"], "bfloat16": False}  # in full precision, steps are sparse
    configs = {i: recipe(l1 * LAPTOP["factor"], LAPTOP["steps"], **changes) for i, l1 in enumerate(L1)}
    count = LAPTOP["steps"] * 16 // LAPTOP["passes"] + 256
    tokens = mixed_rows(work, count, model.cfg.n_ctx, model.cfg.bos_token_id, 0)
    start, cpu = time.monotonic(), time.process_time()
    trained, _ = tc.train(model, tokens, list(configs), configs)
    minutes, cpu_minutes = (time.monotonic() - start) / 60, (time.process_time() - cpu) / 60
    texts = {
        "chronicle": text.chronicle(model, 150, seed=1).tokens,
        "real": held_out_rows(work, 150, model.cfg.n_ctx, model.cfg.bos_token_id),
    }
    rows = []
    for name, measured in texts.items():
        for who, transcoders in {"laptop": trained, "bundled": tc.load_transcoders(device="cpu")}.items():
            table = evaluation.reconstruction(tc.ReplacementModel(model, transcoders), measured).assign(
                text=name, who=who
            )
            rows += table[["text", "who", "layer", "l0", "fvu", "dead"]].round(4).to_dict("records")
    return {"minutes": round(minutes, 2), "cpu_minutes": round(cpu_minutes, 2), "threads": 2, "rows": rows} | LAPTOP


TIMES = {
    "model": "the model's forward pass, shared by all layers and passes",
    "shuffling": "dealing a batch out of the buffer",
    "encoder": "encoder",
    "decoder": "decoder",
    "backward": "loss and backward pass",
    "update": "clipping, Adam, unit rows",
}


def clocked(work, *arguments):
    start = time.process_time()
    return work(*arguments), time.process_time() - start


def joined(table: pd.DataFrame) -> dict:
    """Every run, and per variant its effect against the recipe at the same L0, mean and deviation over seeds."""
    effects = []
    for (layer, seed), runs in table.groupby(["layer", "seed"]):
        runs = runs.set_index("name")
        front = runs[runs.index.str.startswith("recipe")].sort_values("l0")
        for name, (words, _, _) in VARIANTS.items():
            run = runs.loc[name]
            against = runs.loc[AGAINST.get(name, "recipe x1.0")]
            fvu, dead = against[["fvu", "dead"]] if name in AGAINST else read_off(front, run["l0"])
            effects.append(
                {"name": name, "what": words, "layer": int(layer), "seed": int(seed), "l0": run["l0"]}
                | {"fvu_change": run["fvu"] / fvu - 1, "dead_change": run["dead"] - dead}
                | {"time_change": run["seconds"] / against["seconds"] - 1}
            )
    effects = pd.DataFrame(effects)
    columns = ["l0", "fvu_change", "dead_change", "time_change"]
    grouped = effects.groupby(["name", "what", "layer"], sort=False)[columns]
    summary = grouped.mean().join(grouped.std()["fvu_change"].rename("fvu_deviation")).reset_index()
    return {
        "steps": STEPS,
        "seeds": sorted({int(s) for s in table["seed"]}),
        "effects": summary.round(4).to_dict("records"),
        "runs": table.round(4).to_dict("records"),
    }


def read_off(front: pd.DataFrame, l0: float) -> tuple[float, float]:
    """FVU and dead features of the recipe at an L0: straight lines between logarithms, continued at the ends."""
    x, at = np.log(front["l0"].to_numpy()), np.log(max(l0, 0.1))
    i = int(np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2))
    share = (at - x[i]) / (x[i + 1] - x[i])
    fvu, dead = np.log(front["fvu"].to_numpy()), front["dead"].to_numpy()
    return float(np.exp(fvu[i] + share * (fvu[i + 1] - fvu[i]))), float(dead[i] + share * (dead[i + 1] - dead[i]))


if __name__ == "__main__":
    main()
