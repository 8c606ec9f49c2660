"""Opening twelve transcoders of GPT2-small's size, in the paper's files, beside the paper's way of loading them.

    PYTHONPATH=. python benchmarks/loading.py [--folder FOLDER] [--rounds 5]

The paper's loader makes each module with Kaiming-initialised weights, unpickles the file and copies its tensors
(`sae_training/sparse_autoencoder.py`, `load_from_pretrained`); a plain re-implementation of these steps stands in here,
reading with ``weights_only``, which does not make it slower. Page cache warm, one thread. The last line is the ratio.
"""

from __future__ import annotations

import argparse
import gc
import re
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import tclib as tc
from tclib.io import safe_files
from tests import foreign
from tests.full_scale import FEATURES, LAYERS, RARE, WIDTH

GOAL = 500


class AsTheOriginal(nn.Module):
    """The original's modules, initialised as it does before a checkpoint is copied into them."""

    def __init__(self, d_in: int, d_features: int) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(d_in, d_features)))
        self.b_enc = nn.Parameter(torch.zeros(d_features))
        self.W_dec = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(d_features, d_in)))
        self.b_dec, self.b_dec_out = nn.Parameter(torch.zeros(d_in)), nn.Parameter(torch.zeros(d_in))
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)


def state_of(path: Path, mmap: bool = False) -> dict[str, torch.Tensor]:
    """The file's tensors."""
    with torch.serialization.safe_globals([(safe_files.ConfigStub, safe_files.CONFIG_CLASS)]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)["state_dict"]


def original(folder: Path) -> list[nn.Module]:
    """Read, make, copy."""
    modules = []
    for path in sorted(folder.glob("*_24576.pt")):
        state = state_of(path)
        modules.append(AsTheOriginal(*state["W_enc"].shape))
        modules[-1].load_state_dict(state)
    return modules


def private_bytes() -> int:
    """This process's memory that belongs to no file (Linux)."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1]) * 1024


def measured(load, folder: Path, rounds: int) -> tuple[float, float]:
    """CPU seconds, best of the rounds, and GB of private memory taken."""
    best, taken = float("inf"), 0.0
    for _ in range(rounds):
        gc.collect()
        before, start = private_bytes(), time.process_time()
        loaded = load(folder)
        best, taken = min(best, time.process_time() - start), (private_bytes() - before) / 1e9
        del loaded
    return best, taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="the twelve .pt files; random ones are written without it")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or write(Path(place))
        ours = measured(lambda f: tc.load_transcoders(f, device="cpu"), folder, options.rounds)
        theirs = measured(original, folder, max(1, options.rounds // 2))
        layers = tc.load_transcoders(folder, device="cpu")
        before, start = private_bytes(), time.process_time()
        every = list(layers.values())
        first, grown = time.process_time() - start, (private_bytes() - before) / 1e9
        x = torch.randn(10, WIDTH)
        states = [state_of(layer.path, mmap=True) for layer in layers.stored.values()]
        same = max((t(x) - dense(w, x)).abs().max().item() for t, w in zip(every, states, strict=True))
    print(f"paper's way: {theirs[0]:.2f} s, {theirs[1]:.2f} GB of private memory")
    print(
        f"ours: {1000 * ours[0]:.1f} ms, {ours[1]:.3f} GB; all layers' first use: {1000 * first:.0f} ms, {grown:.3f} GB"
    )
    print(f"largest difference of outputs: {same:.1e}")
    print(f"ratio: {theirs[0] / ours[0]:.0f} ({GOAL} asked)")


def dense(w: dict, x: torch.Tensor) -> torch.Tensor:
    """The paper's equation on the file's own tensors."""
    return torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) @ w["W_dec"] + w["b_dec_out"]


def write(folder: Path) -> Path:
    """Twelve random files of the published shapes."""
    for layer in range(LAYERS):
        w = foreign.weights(layer, WIDTH, FEATURES)
        foreign.original(folder, layer, layer, WIDTH, FEATURES, b_enc=w["b_enc"] + RARE)
    return folder


if __name__ == "__main__":
    main()
