"""Trains in forked children that are really killed, interrupted, or short of disk or memory.

    python -m tests.crash_worker CASE FOLDER [ARCHITECTURE ...]

A process of its own, because children may only be forked before torch has started its threads.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

import tclib as tc
from tests.tiny import make_model

CONFIGS = {
    "relu": {"start_l0": 20.0, "clip": 1.0, "tied": True, "unit_norm": False, "dead_bias_lift": 1.0, "dead_after": 800},
    "topk": {"activation": "topk", "k": 4, "dead_after": 800},
    "batchtopk": {"activation": "batchtopk", "k": 4},
    "jumprelu": {"activation": "jumprelu"},
}


def text() -> torch.Tensor:
    rows = torch.randint(0, 40, (64, 16), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = 40
    return rows


def config(name: str, **more) -> tc.TrainConfig:
    return tc.TrainConfig(
        d_features=64, steps=120, batch_rows=4, buffer=4, passes=2, lr=3e-3, **(CONFIGS[name] | more)
    )  # fmt: skip


def child(work: Callable[[], None]) -> int:
    """Fork; the child works and exits with 0, or with 1 after printing what went wrong."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
    return pid


def finish(pid: int) -> int:
    return os.waitpid(pid, 0)[1]


def trained(model, out: Path, name: str, run: Path | None, **more) -> Callable[[], None]:
    def work() -> None:
        transcoders, history = tc.train(model, text(), [0, 1], config(name), run=run, checkpoint_seconds=0, **more)
        for layer, transcoder in transcoders.items():
            transcoder.save(out / f"layer_{layer}", dtype=torch.float32)
        history.to_json(out / "history.json")

    return work


def same(a: Path, b: Path) -> bool:
    files = [load_file(folder / f"layer_{i}.safetensors") for i in (0, 1) for folder in (a, b)]
    weights = all(torch.equal(x[k], y[k]) for x, y in (files[:2], files[2:]) for k in x)
    return weights and (a / "history.json").read_bytes() == (b / "history.json").read_bytes()


def newest(run: Path) -> int:
    steps = [int(p.stem.removeprefix("step_")) for p in run.glob("step_*.safetensors")]
    return max(steps, default=-1)


def stopped(model, folder: Path, name: str, number: int, times: int, rng: random.Random) -> list[int]:
    """Send a signal at random moments of a run, then let it end; the steps it had reached."""
    run, reached = folder / "run", []
    for _ in range(times):
        least = newest(run) + rng.randint(1, 20)
        pid = child(trained(model, folder / "b", name, run))
        while newest(run) < least and os.waitpid(pid, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        os.kill(pid, number)
        finish(pid)
        reached.append(newest(run))
    assert finish(child(trained(model, folder / "b", name, run))) == 0
    assert newest(run) == 120 and len(list(run.glob("step_*"))) == 2
    assert len((run / "log.jsonl").read_text(encoding="utf-8").splitlines()) == 240
    return reached


def case_kill(model, folder: Path, *names: str) -> None:
    rng = random.Random(0)
    for name in names:
        here = folder / name
        assert finish(child(trained(model, here / "a", name, None))) == 0
        print(name, "killed at", stopped(model, here, name, signal.SIGKILL, 3, rng), flush=True)
        print(name, "identical" if same(here / "a", here / "b") else "DIFFERENT", flush=True)


def case_interrupt(model, folder: Path) -> None:
    assert finish(child(trained(model, folder / "a", "relu", None))) == 0
    stopped(model, folder, "relu", signal.SIGINT, 2, random.Random(1))
    print("identical" if same(folder / "a", folder / "b") else "DIFFERENT", flush=True)


def case_full_before(model, folder: Path) -> None:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # one checkpoint fits, later ones do not
        trained(model, folder / "a", "relu", folder / "run")()

    finish(child(work))


def case_full_during(model, folder: Path) -> None:
    def fill(records: list[dict]) -> None:
        limit = 10_000 if 30 <= records[0]["step"] < 60 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def work() -> None:
        warnings.showwarning = lambda message, *rest: print("warning:", message, flush=True)
        warnings.simplefilter("always")
        trained(model, folder / "b", "relu", folder / "run", watch=fill)()

    assert finish(child(trained(model, folder / "a", "relu", None))) == 0
    assert finish(child(work)) == 0
    print("identical" if same(folder / "a", folder / "b") else "DIFFERENT", flush=True)


def case_memory(model, folder: Path) -> None:
    def work() -> None:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        limit = pages * resource.getpagesize() + 400_000_000
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        tc.train(model, text(), [0], tc.TrainConfig(d_features=40_000, batch_rows=64, steps=2))

    finish(child(work))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    globals()[f"case_{sys.argv[1]}"](make_model(folder / "model"), folder, *sys.argv[3:])
