"""How fast does a transcoder train? `tclib.training` beside the paper's dense step and sparsify's TopK step.

    OMP_NUM_THREADS=1 python benchmarks/training.py [--sparsify-python PATH] [--quick]

One layer of GPT2-small's shape: 768 -> 24,576 features, about 50 active per token, feature frequencies log-normal,
random weights and data. Every contender is a process of its own; the processes step in turn, and medians of CPU time
are compared, so other work on the machine disturbs all alike. A step is everything that happens between two batches:
forward, backward, Adam, decoder norms, bookkeeping. The contenders:

* ``paper``: the paper's step as its public code does it, written again here in plain torch: dense, float32, ghost
  gradients armed but no feature dead, its best case
* ``sparsify``: EleutherAI's TopK transcoder with Adam, by its own code (with the other Python)
* ``plain relu``, ``sparse relu``, ...: `tclib`'s two steps
* ``bfloat16 limit``, ``float32 limit``: the encoder product alone, what no exact step can do without

Then: time to quality from scratch on the bundled model, three seeds; and all 12 layers from one forward pass. The last
line is the headline.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from setting import gpt2_sized, processor

WIDTH, FEATURES, L0 = 768, 24_576, 50
BATCHES = (512, 2048, 4096)
LR = 1e-6  # so small that L0 stays where it is
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
CONTENDERS = ("paper", "plain relu", "sparse relu", "sparse topk", "sparse batchtopk", "sparse jumprelu",
              "bfloat16 limit", "float32 limit")  # fmt: skip
Step = Callable[[], float]  # one step; gives L0


def data(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(batch, WIDTH, generator=draw), torch.randn(batch, WIDTH, generator=draw)


def weights() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit encoder columns with biases that give each feature its frequency, and unit decoder rows."""
    draw = torch.Generator().manual_seed(1)
    W_enc = torch.randn(WIDTH, FEATURES, generator=draw)
    W_enc /= W_enc.norm(dim=0)
    frequency = (1.5 * torch.randn(FEATURES, generator=draw)).exp()
    frequency = (frequency * L0 / frequency.sum()).clamp(max=0.5)
    W_dec = torch.randn(FEATURES, WIDTH, generator=draw)
    return W_enc, -torch.special.ndtri(1 - frequency), W_dec / W_dec.norm(dim=1, keepdim=True)


class Paper:
    """The paper's training step (Dunefsky et al. 2024: equation 2; the rest after the public code)."""

    def __init__(self, W_enc, b_enc, W_dec, b_dec, b_out, l1, lr, window=1000):
        self.parameters = [p.clone().requires_grad_() for p in (W_enc, b_enc, W_dec, b_dec, b_out)]
        self.l1, self.window = l1, window
        self.adam = torch.optim.Adam(self.parameters, lr=lr)
        self.silent, self.fired = torch.zeros(2, W_enc.shape[1])  # steps since a feature fired; how often it fired

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        W_enc, b_enc, W_dec, b_dec, b_out = self.parameters
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)
        self.adam.zero_grad()
        if (self.silent > self.window).any():  # here ghost gradients would cost more
            self.silent.zero_()
        z = torch.relu((x - b_dec) @ W_enc + b_enc)
        error = z @ W_dec + b_out - y
        loss = error.pow(2).sum(1).mean() + self.l1 * z.abs().sum(1).mean()
        with torch.no_grad():
            self.silent += 1
            self.silent[(z > 0).float().sum(0) > 0] = 0
            self.fired += (z.abs() > 0).float().sum(0)
        loss.backward()
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        self.adam.step()
        return (z.detach() > 0).float().sum(1).mean().item()

    @torch.no_grad()
    def measure(self, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
        """FVU and L0."""
        W_enc, b_enc, W_dec, b_dec, b_out = self.parameters
        z = torch.relu((x - b_dec) @ W_enc + b_enc)
        return fvu(y, z @ W_dec + b_out), (z > 0).sum(1).double().mean().item()


def fvu(y: torch.Tensor, out: torch.Tensor) -> float:
    return ((y - out).pow(2).sum() / (y - y.mean(0)).pow(2).sum()).item()


# --- one step, each contender in a process of its own


def paper(batch: int) -> Step:
    x, y = data(batch)
    zero = torch.zeros(WIDTH)
    step = Paper(*weights(), zero, zero, l1=1e-3, lr=LR).step
    return lambda: step(x, y)


def ours(name: str, batch: int) -> Step:
    from tclib.training.config import TrainConfig
    from tclib.training.fast.sparse_step import SparseTrainer
    from tclib.training.trainer import Trainer

    way, kind = name.split()
    config = TrainConfig(
        d_features=FEATURES,
        activation=kind,
        k=L0 if kind.endswith("topk") else None,
        l1_coefficient=1e-3,
        lr=LR,
        start_l0=L0,
    )
    x, y = data(batch)
    trainer = (Trainer if way == "plain" else SparseTrainer)(0, x, y, config)
    with torch.no_grad():
        for name, value in zip(("W_enc", "b_enc", "W_dec"), weights(), strict=True):
            getattr(trainer.transcoder, name).copy_(value)
        if kind == "jumprelu":
            trainer.transcoder.b_enc += config.bandwidth  # the thresholds
    return lambda: trainer.step(x, y, 0)["l0"]


def sparsify(batch: int) -> Step:
    """As its Trainer.fit does it."""
    from sparsify.config import TranscoderConfig
    from sparsify.sparse_coder import SparseCoder

    torch.set_float32_matmul_precision("high")
    x, y = data(batch)
    coder = SparseCoder(WIDTH, TranscoderConfig(num_latents=FEATURES, k=L0), dtype=torch.float32)
    with torch.no_grad():
        W_enc, b_enc, W_dec = weights()
        coder.encoder.weight.copy_(W_enc.T)
        coder.encoder.bias.copy_(b_enc)
        coder.W_dec.copy_(W_dec)
    adam = torch.optim.Adam(coder.parameters(), lr=LR)
    silent, fired = torch.zeros(FEATURES), torch.zeros(FEATURES, dtype=torch.bool)

    def step() -> float:
        out = coder(x=x, y=y, dead_mask=None, total_variance=(y - y.mean(0)).pow(2).sum())
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            silent.add_(batch)
            silent[fired] = 0
            fired.zero_()
        return (out.latent_acts > 0).sum(1).double().mean().item()

    return step


def limit(name: str, batch: int) -> Step:
    kind = getattr(torch, name.split()[0])
    x, W = data(batch)[0].to(kind), weights()[0].T.contiguous().to(kind)
    out = torch.empty(FEATURES, 256, dtype=kind)

    def step() -> float:
        for part in x.split(256):
            torch.mm(W, part.T, out=out)
        return L0

    return step


def work(name: str, batch: int) -> None:
    """Answer each line with a step, timed; the last word is the peak memory, without that of the imports."""
    torch.set_num_threads(1)
    libraries = {"sparsify": "sparsify.sparse_coder", "plain": "tclib.training", "sparse": "tclib.training"}
    importlib.import_module(libraries.get(name.split()[0], "torch"))
    imports = peak()
    makers = {"paper": paper, "sparsify": sparsify}
    step = makers[name](batch) if name in makers else (limit if "limit" in name else ours)(name, batch)
    step()
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        l0 = step()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        print(json.dumps({"cpu": cpu, "wall": wall, "l0": l0}), flush=True)
    print(json.dumps({"peak": peak(), "net": peak() - imports}), flush=True)


def peak() -> float:
    """Largest memory so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def race(batch: int, rounds: int, peer: str | None) -> dict[str, dict]:
    """All contenders in turn, ``rounds`` times: lists of seconds, L0 and memory by name."""
    pythons = dict.fromkeys(CONTENDERS, sys.executable) | ({"sparsify": peer} if peer else {})
    workers = {}
    for name, python in pythons.items():
        command = [python, __file__, "--worker", name, "--batch", str(batch)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
        pipes["env"] = os.environ | ONE_THREAD
        workers[name] = subprocess.Popen(command, **pipes)
        answer(workers[name])  # ready, after a first step
    seen = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            print(file=worker.stdin, flush=True)
            seen[name].append(answer(worker))
    result = {}
    for name, worker in workers.items():
        worker.stdin.close()
        result[name] = answer(worker) | {key: [one[key] for one in seen[name]] for key in ("cpu", "wall", "l0")}
        worker.wait()
    return result


def answer(worker: subprocess.Popen):
    """The next line that is ours: libraries print, too."""
    for line in worker.stdout:
        if line.startswith(("{", '"ready"')):
            return json.loads(line)
    raise RuntimeError(f"{worker.args} ended without an answer")


def show(batch: int, result: dict[str, dict]) -> dict[str, float]:
    """Print the table of one batch size; median CPU seconds by name."""
    median = {name: statistics.median(r["cpu"]) for name, r in result.items()}
    print(f"\nbatch {batch}: median CPU s per step [least, most], tokens per CPU second, ratios of medians")
    print(
        f"{'':18}{'CPU s':>24}{'wall s':>9}{'tokens/s':>10}{'L0':>6}{'x paper':>9}{'% limit':>9}{'GB':>7}{'net GB':>8}"
    )
    for name, r in result.items():
        spread = f"{median[name]:.3f} [{min(r['cpu']):.3f}, {max(r['cpu']):.3f}]"
        print(f"{name:18}{spread:>24}{statistics.median(r['wall']):9.3f}{batch / median[name]:10,.0f}"
              f"{statistics.median(r['l0']):6.0f}{median['paper'] / median[name]:9.2f}"
              f"{100 * median['bfloat16 limit'] / median[name]:9.0f}{r['peak']:7.2f}{r['net']:8.2f}")  # fmt: skip
    return median


# --- a whole training from scratch


QUALITY = {
    "d_features": 4096,
    "batch_rows": 8,
    "buffer": 8,
    "passes": 4,
    "lr": 1e-3,
    "warmup": 0.2,
    "decay": 0.0,
    "sparsity_warmup": 0.0,
}


NOISE = 0.02  # of FVU and L0 between equal trainings


def quality(seed: int, steps: int, l1: float, layer: int) -> dict[str, dict]:
    """CPU seconds, held-out FVU and L0 along a training, by contender, all on the same batches of real activations.

    ``paper`` and ``sparse`` begin as the paper does, with biases of 0 and half of all features active, so the sparse
    trainer is dense for its first steps; ``low start`` begins with low biases.
    """
    import tclib as tc
    from tclib import text
    from tclib.activations import mlp_activations
    from tclib.training.fast.sparse_step import SparseTrainer
    from tclib.training.stream import ModelSource, Stream
    from tclib.training.trainer import rates

    model = tc.load_model(device="cpu")
    config = tc.TrainConfig(l1_coefficient=l1, steps=steps, seed=seed, **QUALITY)
    count = config.batch_rows * max(config.buffer, config.steps // config.passes)
    stream = Stream(ModelSource(model, text.chronicle(model, count, seed=seed).tokens[:count], [layer]), config)
    sample = stream.sample()[layer]
    trainers = {
        "sparse": SparseTrainer(layer, *sample, config),
        "low start": SparseTrainer(layer, *sample, config.model_copy(update={"start_l0": 64.0})),
    }
    scaled, t = trainers["sparse"].scaled, trainers["sparse"].transcoder
    zero = torch.zeros(t.config.d_in)
    first = Paper(t.W_enc.detach().contiguous(), t.b_enc.detach(), t.W_dec.detach(), zero, zero, l1, config.lr)
    held = next(mlp_activations(model, text.chronicle(model, 16, seed=1000).tokens, [layer], 16))[layer]
    held = scaled(held.x.flatten(0, 1), held.y.flatten(0, 1))
    seen = {name: {"cpu": [], "fvu": [], "l0": [], "dense": 0} for name in ("paper", *trainers)}
    spent = dict.fromkeys(seen, 0.0)
    for step in range(config.steps):
        x, y = stream.batch(step)[layer]
        measuring = (step + 1) % max(1, steps // 40) == 0
        for name, record in seen.items():
            start = time.process_time()
            if name == "paper":
                first.adam.param_groups[0]["lr"] = config.lr * rates(config, step)[0]
                first.step(*scaled(x, y))
            else:
                record["dense"] += bool(trainers[name].density >= config.sparse_below)
                trainers[name].step(x, y, step)
            spent[name] += time.process_time() - start
            if measuring:
                measured = first.measure(*held) if name == "paper" else _measured(trainers[name].transcoder, *held)
                for key, value in zip(("cpu", "fvu", "l0"), (spent[name], *measured), strict=True):
                    record[key].append(value)
    return seen


@torch.no_grad()
def _measured(transcoder, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    z = transcoder.encode(x)
    return fvu(y, transcoder.decode(z, x)), (z > 0).sum(1).double().mean().item()


def reached(record: dict, target: float, l0: float) -> float:
    """CPU seconds until neither FVU nor L0 is above the target, but for `NOISE`; infinite if that never happens."""
    together = zip(record["cpu"], record["fvu"], record["l0"], strict=True)
    return next((cpu for cpu, f, n in together if max(f / target, n / l0) <= 1 + NOISE), float("inf"))


def show_quality(seeds: int, steps: int, l1: float, layer: int) -> dict[str, float]:
    """Print times to the quality that the paper's step ends with; medians over seeds of the ratios."""
    print(f"\ntime to quality: bundled model, layer {layer}, 4096 features; {steps} of the paper's steps, 1,024 tokens "
          f"each; CPU s until neither held-out FVU nor L0 is over {NOISE:.0%} above the paper's last")  # fmt: skip
    ratios = {"sparse": [], "low start": []}
    for seed in range(seeds):
        seen = quality(seed, steps, l1, layer)
        target, l0, whole = (seen["paper"][key][-1] for key in ("fvu", "l0", "cpu"))
        print(f"seed {seed}: paper {whole:6.1f} s, FVU {target:.4f} at L0 {l0:.1f}")
        for name, found in ratios.items():
            r, needed = seen[name], reached(seen[name], target, l0)
            found.append(whole / needed)
            soon = f"{needed:7.1f} s ({whole / needed:5.1f}x)" if needed < float("inf") else "never"
            print(f"  {name:10}{soon:>17}; all its steps ({r['dense']} dense) "
                  f"{r['cpu'][-1]:.1f} s, FVU {r['fvu'][-1]:.4f} at L0 {r['l0'][-1]:.1f}",
                  flush=True)  # fmt: skip
    return {name: statistics.median(found) for name, found in ratios.items()}


# --- twelve layers from one forward pass


def suite(steps: int) -> float:
    """All layers of a random model of GPT2-small's shape on 4,096 tokens per step, against 12 runs of the paper's."""
    import tclib as tc
    from tclib.activations import mlp_activations
    from tclib.training.fast.sparse_step import SparseTrainer
    from tclib.training.stream import ModelSource, Stream

    model = gpt2_sized()
    layers = list(range(model.cfg.n_layers))
    tokens = torch.randint(50_000, (32, 128), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = model.tokenizer.bos_token_id
    config = tc.TrainConfig(d_features=FEATURES, start_l0=L0, batch_rows=32, lr=LR, l1_coefficient=1e-3)
    stream = Stream(ModelSource(model, tokens, layers), config)
    sample = stream.sample()
    trainers = {layer: SparseTrainer(layer, *sample[layer], config) for layer in layers}
    spent, forward = [], []
    for _ in range(steps + 1):
        start = time.process_time()
        stream.loaded = None  # each step reads new text, as a long run does
        batch = stream.batch(0)
        forward.append(time.process_time() - start)
        rows = [trainers[layer].step(*batch[layer], 0) for layer in layers]
        spent.append(time.process_time() - start)
    partial = []
    for layer in layers:
        start = time.process_time()
        list(mlp_activations(model, tokens[:8], [layer], 8))
        partial.append((time.process_time() - start) * len(tokens) / 8)
    del trainers, sample, batch
    step = paper(len(tokens) * tokens.shape[1])
    step()
    start = time.process_time()
    step()
    paper_step = time.process_time() - start
    mine, theirs = statistics.median(spent[1:]), sum(partial) + len(layers) * paper_step
    l0 = statistics.mean(row["l0"] for row in rows)
    print(
        f"\n12 layers from one forward pass, 4,096 tokens: {mine:.1f} CPU s, {statistics.median(forward):.1f} s of it "
        f"the model; L0 {l0:.0f}; {4096 / mine:,.0f} tokens/s for all layers, {peak():.1f} GB"
    )
    print(f"12 runs of the paper's: "
          f"{len(layers)} x {paper_step:.2f} s and {sum(partial):.1f} s of forward passes, each up to its layer: "
          f"{theirs:.1f} s ({theirs / mine:.1f}x)")  # fmt: skip
    return theirs / mine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsify-python", default=os.environ.get("SPARSIFY_PYTHON"))
    parser.add_argument("--batches", type=int, nargs="*", default=BATCHES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seeds", type=int, default=3, help="trainings from scratch")
    parser.add_argument("--parts", nargs="*", default=["step", "quality", "suite"], help="which parts to run")
    parser.add_argument("--quick", action="store_true", help="batch 512 and short trainings: to see that it works")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.batch)
        return
    print(f"processor: {processor()}, torch {torch.__version__}, one thread per contender")
    batches, rounds = ([512], 3) if options.quick else (options.batches, options.rounds)
    said = []
    if "step" in options.parts:
        for batch in batches:
            result = race(batch, rounds, options.sparsify_python)
            median = show(batch, result)
        relu, topk = median["sparse relu"], median["sparse topk"]
        said.append(f"batch {batch}: {median['paper'] / relu:.1f}x the paper's dense step (ReLU)")
        if "sparsify" in median:
            said.append(f"{median['sparsify'] / topk:.1f}x sparsify (TopK)")
        said.append(f"{100 * median['bfloat16 limit'] / relu:.0f}% of the bfloat16 limit")
        said.append(f"{100 * result['sparse relu']['net'] / result['paper']['net']:.0f}% of the paper's memory")
    if "quality" in options.parts:
        median = show_quality(1 if options.quick else options.seeds, 80 if options.quick else 400, 0.06, 1)
        said.append(f"the paper's quality {median['low start']:.1f}x sooner")
    if "suite" in options.parts and not options.quick:
        said.append(f"12 layers {suite(3):.1f}x")
    print("headline: " + ", ".join(said))


if __name__ == "__main__":
    main()
