"""What does an index of all features of a layer cost, and how fast is it read?

The shape is GPT2-small's: 12 layers of width 768, a transcoder of 24,576 features for MLP 8 with about 50 active per
token, rows of 128 tokens; weights and text are random. Timed beside it, on the same batches:

* the model's forward pass: up to and with layer 8, and whole with logits;
* the paper's code's way for the dashboard of ONE feature, written anew and plainly: a forward pass up to layer 8, the
  whole transcoder at every token, and the feature's column kept; and its raw variant, the one encoder column alone.

Reading is timed on an index of 1.6 million tokens with log-normal firing rates, random features and the densest.

    OMP_NUM_THREADS=1 python benchmarks/index.py [--rows 32] [--rounds 2]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from setting import gpt2_sized, processor
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.activations import hook_in, hook_out
from tclib.features import FeatureActivations, Index, build_index
from tclib.features import index as store
from tclib.features.build import BATCH_ROWS
from tclib.replacement_model import ReplacementModel
from tclib.transcoder import Transcoder, TranscoderConfig

LAYER, FEATURES, WIDTH, ACTIVE = 8, 24_576, 128, 50
READ_ROWS = 12_800


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    model = gpt2_sized()
    tokens = torch.randint(0, 50_000, (options.rows, WIDTH))
    tokens[:, 0] = model.tokenizer.bos_token_id
    transcoder = sparse_transcoder(model, tokens[:16])
    print(f"CPU: {processor()}, {torch.get_num_threads()} thread(s) of {os.cpu_count()}")
    with tempfile.TemporaryDirectory() as folder:
        times = building(model, transcoder, tokens, options.rounds, Path(folder))
        reading(Path(folder))
    upto, whole, index = (times[name] for name in ("forward", "whole forward", "index"))
    one, raw = times["one feature"], times["one feature, raw"]
    print(
        f"beside the forward pass up to layer {LAYER}: {index / upto:.2f}; beside the whole pass: {index / whole:.2f}"
    )
    print(f"one feature the plain way: {one / index:.2f} times all of ours; its raw variant {raw / index:.2f}")
    verdict = "at most 1.1: met" if index / upto <= 1.1 else "at most 1.1 asked: MISSED"
    met = "less" if index < one else "MORE"
    print(
        f"index of all {FEATURES} features of a layer: {index / upto:.2f}x the model's forward pass ({verdict}), "
        f"{met} than the plain way spends on one feature"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    return parser.parse_args()


@torch.no_grad()
def building(
    model: TransformerBridge, transcoder: Transcoder, tokens: Tensor, rounds: int, folder: Path
) -> dict[str, float]:
    """CPU seconds of each way, the best of alternating rounds."""
    found = {}

    def forward(stop: int | None) -> None:
        for rows in tokens.split(BATCH_ROWS):
            model(rows, stop_at_layer=stop)

    def index() -> None:
        shutil.rmtree(folder / "index", ignore_errors=True)
        found["index"] = build_index(ReplacementModel(model, {LAYER: transcoder}), tokens, folder / "index")

    ways = {
        "forward": lambda: forward(LAYER + 1),
        "index": index,
        "one feature": lambda: found.update(scores=one_feature(model, transcoder, tokens, 7)),
        "one feature, raw": lambda: one_feature(model, transcoder, tokens, 7, raw=True),
        "whole forward": lambda: forward(None),
    }
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            times[name].append(time.process_time() - start)
    entries = len(found["index"].flat(LAYER)[0])
    counted = found["index"].n_tokens
    print(f"{tokens.numel()} tokens, {entries / counted:.1f} features active at each")
    for name, seconds in times.items():
        print(f"{name:18} {min(seconds):6.2f} CPU-s (median {statistics.median(seconds):.2f})")
    check(found["index"], found["scores"])
    return {name: min(seconds) for name, seconds in times.items()}


def one_feature(model: TransformerBridge, transcoder: Transcoder, tokens: Tensor, feature: int, raw: bool = False):
    """Scores of one feature at every token, as float16 (the paper's code, `get_feature_scores`)."""
    scores = []
    for rows in tokens.split(BATCH_ROWS):
        _, cache = model.run_with_cache(rows, names_filter=[hook_in(LAYER)], stop_at_layer=LAYER + 1)
        x = cache[hook_in(LAYER)]
        if raw:
            scores.append(torch.relu(x @ transcoder.W_enc[:, feature] + transcoder.b_enc[feature]).half())
        else:
            z = transcoder.encode(x)
            transcoder.decode(z)  # its module returns the reconstruction too
            scores.append(z[..., feature].half())
    return torch.cat(scores)


def check(index: Index, scores: Tensor) -> None:
    """The index holds what the plain way found: to one unit in the last place of float16."""
    dense = np.zeros(scores.numel(), np.float16)
    positions, values = index.entries(LAYER, 7)
    dense[positions] = values
    expected = scores.flatten().numpy() * index.kept
    assert np.allclose(dense.astype(np.float32), expected.astype(np.float32), rtol=2e-3, atol=2e-5), "the values differ"


def read(index: Index, feature: int, what: str) -> None:
    found = getattr(FeatureActivations(index, 0, feature), what)
    found() if callable(found) else found


def reading(folder: Path) -> None:
    index = large_index(folder / "large")
    counts = np.diff(index.layer_offsets(0))
    drawn = np.random.default_rng(0).choice(np.flatnonzero(counts), 200, replace=False)
    print(f"reading from {index.n_tokens:,} tokens, {counts.sum():,} activations, milliseconds per call:")
    densest = int(counts.argmax())
    for name in ("count", "histogram", "top", "bands", "top_tokens"):
        each = [best_of(lambda f=feature, n=name: read(index, int(f), n), 3) for feature in drawn]
        worst = best_of(lambda n=name: read(index, densest, n), 5)
        print(f"{name:11} median {1e3 * statistics.median(each):.3f}, slowest of 200 {1e3 * max(each):.3f}, "
              f"densest feature ({counts[densest] / index.n_tokens:.0%} of tokens) {1e3 * worst:.3f}")  # fmt: skip


def best_of(call, n: int) -> float:
    best = float("inf")
    for _ in range(n):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def large_index(folder: Path) -> Index:
    """Made without a model: positions and activations at random."""
    rng = np.random.default_rng(0)
    tokens = rng.zipf(1.3, (READ_ROWS, WIDTH)).clip(1, 50_000).astype("<i4")
    tokens[:, 0] = 0
    rate = np.exp(1.5 * rng.standard_normal(FEATURES))
    rate = np.minimum(rate * ACTIVE / rate.sum(), 0.2)
    counts = rng.binomial(tokens.size, rate)
    offsets = np.concatenate([[0], counts.cumsum()])
    about = {"format": store.FORMAT, "model": "random", "text": "random", "rows": [0, READ_ROWS], "width": WIDTH}
    about |= {"bos": 0, "batch_rows": BATCH_ROWS, "layers": {"0": {"weights": "random", "features": FEATURES}}}
    with store.new_folder(folder) as part:
        np.save(part / "tokens.npy", tokens)
        np.save(part / "layer_0.offsets.npy", offsets)
        np.save(part / "layer_0.scale.npy", np.ones(tokens.size, "<f4"))
        files = {n: store.ArrayFile(part / f"layer_0.{n}.npy", store.DTYPES[n], offsets[-1]) for n in store.FLAT}
        for count in counts:
            files["positions"].write(np.sort(rng.integers(0, tokens.size, count)))
            files["values"].write(rng.exponential(1.0, count))
        for file in files.values():
            file.close()
        store.finish(part, about)
    return Index(folder)


@torch.no_grad()
def sparse_transcoder(model: TransformerBridge, tokens: Tensor) -> Transcoder:
    """Random directions; each feature's bias lets it fire on `ACTIVE` / `FEATURES` of these tokens."""
    config = TranscoderConfig(
        d_in=768, d_out=768, d_features=FEATURES, hook_in=hook_in(LAYER), hook_out=hook_out(LAYER)
    )
    transcoder = Transcoder(config).requires_grad_(False)
    transcoder.W_enc.normal_().div_(transcoder.W_enc.norm(dim=0))
    transcoder.W_dec.normal_().div_(transcoder.W_dec.norm(dim=1, keepdim=True))
    _, cache = model.run_with_cache(tokens, names_filter=[hook_in(LAYER)], stop_at_layer=LAYER + 1)
    x = cache[hook_in(LAYER)][:, 1:].flatten(0, 1)
    transcoder.b_enc.copy_(-torch.quantile(x @ transcoder.W_enc, 1 - ACTIVE / FEATURES, dim=0))
    return transcoder


if __name__ == "__main__":
    main()
