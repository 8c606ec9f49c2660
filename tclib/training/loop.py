"""The loop: batches from the stream, one step per trainer, checkpoints, and what is said when something goes wrong."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from tclib.inputs import check_layers, check_tokens
from tclib.training import distributed
from tclib.training.cache import ActivationCache
from tclib.training.config import STREAM, TrainConfig
from tclib.training.cross_layer import CrossTrainer, SingleTrainer
from tclib.training.fast.sparse_step import make_trainer
from tclib.training.run_folder import RunFolder
from tclib.training.stream import Acts, ModelSource, Stream, both
from tclib.training.trainer import Trainer
from tclib.transcoder import Transcoder

Text = Int[Tensor, "row pos"] | ActivationCache
Settings = TrainConfig | Mapping[int, TrainConfig]  # one for all layers, or one per layer
Learner = SingleTrainer | CrossTrainer
Watch = Callable[[list[dict]], None]
DIVERGED = 1e4  # FVU; always answering with the mean scores 1
RECORDS = 100  # about so many per run


def train(
    model: TransformerBridge,
    tokens: Text,
    layers: Sequence[int],
    config: Settings,
    progress: bool = False,
    run: str | Path | None = None,
    watch: Watch | None = None,
    checkpoint_seconds: float = 60.0,
) -> tuple[dict[int, Transcoder], pd.DataFrame]:
    """Train one transcoder (or SAE) per layer on the same stream of text, or a cross-layer one that spans them.

    Minimises ``||y - TC(x)||^2 / Var(y) + penalty`` (equation 2 for ReLU; `TrainConfig` lists the others), with the
    target scaled to unit variance and decoder rows of unit length, so that z measures what is written.

    Args:
        model: a processed model; only its activations are read.
        tokens: text, or an `ActivationCache`; rows are drawn in a seeded random order, again and again if the steps
            outlast them.
        layers: which MLPs.
        config: architecture, sizes, penalty, schedule, seed; one for all layers, or a dictionary by layer.
        progress: show a bar.
        run: a folder for checkpoints and log. The same call with the same folder goes on where it was interrupted, and
            ends with the same weights, bit for bit on the same CPU, as if it had not been. Ctrl-C ends the current
            step, writes a checkpoint and raises KeyboardInterrupt.
        watch: called with the records of a step about 100 times, see `tclib.training.monitor`.
        checkpoint_seconds: time between checkpoints.

    Returns:
        The transcoders by layer, and a table (step, layer, loss, fvu, l0, dead) with about 100 rows per layer.

    Raises:
        ValueError: text, layers or folder that do not fit; activations that are not finite, or a training that
            diverges (step, cause and last checkpoint are named); too little memory (the number of rows that fits is
            named).
    """
    transcoders, history = train_side_by_side(
        model, tokens, layers, {"": config}, progress, run, watch, checkpoint_seconds
    )
    return transcoders[""], history.drop(columns="name")


def train_side_by_side(
    model: TransformerBridge,
    tokens: Text,
    layers: Sequence[int],
    configs: Mapping[str, Settings],
    progress: bool = False,
    run: str | Path | None = None,
    watch: Watch | None = None,
    checkpoint_seconds: float = 60.0,
) -> tuple[dict[str, dict[int, Transcoder]], pd.DataFrame]:
    """Several training runs on one stream, for comparisons: each sees the same text in the same order.

    Returns:
        The transcoders by name and layer, and the table of `train` with the name in front.

    Raises:
        ValueError: as `train`; configurations that differ in steps, batch_rows, buffer, passes or seed; or a
            cross-layer transcoder with other kinds or gaps among its layers.
    """
    check_layers(model, layers)
    source = tokens if isinstance(tokens, ActivationCache) else ModelSource(model, check_tokens(model, tokens), layers)
    if not set(layers) <= set(source.layers):
        raise ValueError(f"the cache holds layers {source.layers}, not all of {list(layers)}")
    settings = {(n, i): _of_layer(c, i) for n, c in configs.items() for i in layers}
    config = _shared(settings.values())
    stream = Stream(source, config)
    sample = stream.sample()
    _check_finite(sample, "in the first rows")
    trainers = {
        (name, i): make_trainer(i, *sample[i], c, max(layers) - i + 1 if c.kind == "cross_layer" else None)
        for (name, i), c in settings.items()
    }
    learners = _learners(trainers, configs, layers)
    named = {f"{name}/{layer}": trainer for (name, layer), trainer in trainers.items()}
    folder = RunFolder(run, _about(source.text, layers, settings), checkpoint_seconds) if run else None
    first, records = 0, []
    if folder:
        first = folder.restore(named)
        records = folder.records(first)
        folder.start(named)
    every, started = max(1, config.steps // RECORDS), time.monotonic()
    quiet = not progress or distributed.rank() > 0
    bar = tqdm(range(first, config.steps), "training", config.steps, disable=quiet, unit="step", initial=first)
    with _interruption(folder) as interrupted:
        for step in bar:
            batch = stream.batch(step)
            rows = []
            for name, learner in learners:
                for layer, row in _step(learner, batch, step, folder).items():
                    rows.append({"name": name, "step": step, "layer": layer, **row})
            if step % every == 0 or step == config.steps - 1:
                done = (step + 1 - first) * config.batch_rows * stream.source.row_length
                rows = [row | {"speed": done / (time.monotonic() - started)} for row in rows]
                records += rows
                if folder:
                    for row in rows:
                        folder.log(row)
                if watch and distributed.rank() == 0:
                    watch(rows)
            stop = interrupted()
            if folder and (stop or folder.due() or step == config.steps - 1):
                folder.save(step + 1, named)
            if stop and folder:
                raise KeyboardInterrupt(f"stopped after step {step}: the same call goes on from {folder.last()}")
    finished: dict[str, dict[int, Transcoder]] = {name: {} for name in configs}
    for name, learner in learners:
        finished[name] |= learner.finished()
    columns = ["name", "step", "layer", "loss", "fvu", "l0", "dead"]
    return finished, pd.DataFrame(records, columns=columns)


def _learners(
    trainers: Mapping[tuple[str, int], Trainer], configs: Mapping[str, Settings], layers: Sequence[int]
) -> list[tuple[str, Learner]]:
    """Group the trainers that step together: one for each layer, or all of a cross-layer transcoder."""
    learners: list[tuple[str, Learner]] = []
    for name in configs:
        own = {layer: trainers[name, layer] for layer in layers}
        crosses = {trainer.config.kind == "cross_layer" for trainer in own.values()}
        if crosses == {False}:
            learners += [(name, SingleTrainer(trainer)) for trainer in own.values()]
            continue
        if crosses == {True, False}:
            raise ValueError("a cross-layer transcoder spans all layers that are trained: give them all that kind")
        if sorted(layers) != list(range(min(layers), max(layers) + 1)):
            raise ValueError(f"a cross-layer transcoder spans layers without gaps, and these are {sorted(layers)}")
        learners.append((name, CrossTrainer(own)))
    return learners


def _step(learner: Learner, batch: Acts, step: int, folder: RunFolder | None) -> dict[int, dict[str, float]]:
    try:
        rows = learner.learn(batch, step)
    except (RuntimeError, MemoryError) as error:
        if not _is_memory(error):
            raise
        raise ValueError(_rows_that_fit(learner, batch)) from error
    for layer, row in rows.items():
        if not row["fvu"] < DIVERGED or not row["loss"] < float("inf"):
            _check_finite(batch, f"at step {step}")
            saved = f"; the last good checkpoint is {folder.last()}" if folder else ""
            lr = learner.parts[layer].config.lr
            raise ValueError(f"training diverged at step {step} in layer {layer}: lower lr ({lr}) or set clip{saved}")
    return rows


def _shared(settings: Collection[TrainConfig]) -> TrainConfig:
    """One configuration of those that read the same stream."""
    if len({tuple(getattr(c, field) for field in STREAM) for c in settings}) != 1:
        raise ValueError("training runs side by side must agree in " + ", ".join(STREAM[:-1]) + f" and {STREAM[-1]}")
    return next(iter(settings))


def _of_layer(config: Settings, layer: int) -> TrainConfig:
    if isinstance(config, TrainConfig):
        return config
    if layer not in config:
        raise ValueError(f"layer {layer} has no configuration: there are some for layers {sorted(config)}")
    return config[layer]


def _check_finite(acts: Acts, when: str) -> None:
    for layer, pair in acts.items():
        if not all(torch.isfinite(t).all() for t in pair):
            raise ValueError(
                f"the activations of layer {layer} are not finite {when}: look at the model's weights and precision"
            )


def _about(text: str, layers: Sequence[int], settings: Mapping[tuple[str, int], TrainConfig]) -> dict:
    shown = {f"{name} layer {i}".strip(): c.model_dump() for (name, i), c in settings.items()}
    return {"layers": list(layers), "text": text, "settings": shown}


def _is_memory(error: Exception) -> bool:
    says = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(s in str(error).lower() for s in says)


def _rows_that_fit(learner: Learner, batch: Acts) -> str:
    """Try halves of the batch until forward and backward fit."""
    for part in learner.parts.values():
        part.adam.zero_grad()
    config = next(iter(learner.parts.values())).config
    rows = config.batch_rows
    while rows > 1:
        rows //= 2
        some = {
            at: both(lambda t, rows=rows: t[: len(t) * rows // config.batch_rows], pair) for at, pair in batch.items()
        }
        try:
            learner.try_out(some)
        except (RuntimeError, MemoryError) as error:
            if not _is_memory(error):
                raise
            continue
        return f"batch_rows = {config.batch_rows} does not fit into memory, but batch_rows = {rows} does: lower it"
    return f"not even one row fits into memory with {config.d_features} features: train fewer at a time"


@contextmanager
def _interruption(folder: RunFolder | None) -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether someone asked to stop, in any process. A second request stops at once."""
    if folder is None or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = []
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(number, frame):
        asked.append(number)
        signal.signal(number, before[number])

    def check() -> bool:
        if distributed.world() == 1:
            return bool(asked)
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        return bool(distributed.total(torch.tensor(len(asked), device=device)))

    for number in before:
        signal.signal(number, ask)
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
