"""A plain trainer: ReLU transcoders or SAEs of several layers from one stream of forward passes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from tclib.activations import check_layers, hook_in, hook_out, mlp_activations
from tclib.transcoder import Transcoder, TranscoderConfig

Kind = Literal["transcoder", "sae_in", "sae_out"]


class TrainConfig(BaseModel):
    """How to train. The penalty weight acts on targets scaled to unit variance, so one value suits all layers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind = "transcoder"
    d_features: PositiveInt = 4096
    l1: NonNegativeFloat = 0.02  # lambda_1 of the paper, in units of the target's total standard deviation
    steps: PositiveInt = 1000
    rows: PositiveInt = 16  # rows of text per step
    lr: PositiveFloat = 1e-3
    warmup: float = Field(0.05, ge=0, le=1)  # fraction of the steps over which lr rises
    decay: float = Field(0.3, ge=0, le=1)  # fraction of the steps, at the end, over which lr falls to 0
    ramp: float = Field(0.5, ge=0, le=1)  # fraction of the steps over which l1 rises
    bfloat16: bool = False  # matrix products in bfloat16: about twice as fast on processors that have it
    seed: NonNegativeInt = 0


def train(
    model: TransformerBridge,
    tokens: Int[Tensor, "row pos"],
    layers: Sequence[int],
    config: TrainConfig,
    progress: bool = False,
) -> tuple[dict[int, Transcoder], pd.DataFrame]:
    """Train one transcoder (or SAE) per layer on the same stream of text.

    Minimises ``||y - TC(x)||^2 / Var(y) + l1 ||z||_1`` (equation 2, with the target scaled to unit variance and
    decoder rows of unit length, so that ||z||_1 measures what is written).

    Args:
        model: a processed model; only its activations are read.
        tokens: text; rows are drawn in a seeded random order, again and again if the steps outlast them.
        layers: which MLPs.
        config: sizes, penalty, schedule, seed.
        progress: show a bar.

    Returns:
        The transcoders by layer, and a table (step, layer, loss, fvu, l0) with about 100 rows per layer.

    Raises:
        ValueError: a layer that the model does not have, or activations that are not finite (the step is named).
    """
    transcoders, history = train_side_by_side(model, tokens, layers, {"": config}, progress)
    return transcoders[""], history.drop(columns="name")


def train_side_by_side(
    model: TransformerBridge,
    tokens: Int[Tensor, "row pos"],
    layers: Sequence[int],
    configs: Mapping[str, TrainConfig],
    progress: bool = False,
) -> tuple[dict[str, dict[int, Transcoder]], pd.DataFrame]:
    """Several trainings on one stream, for comparisons: each sees the same text in the same order.

    Returns:
        The transcoders by name and layer, and the table of `train` with the name in front.

    Raises:
        ValueError: as `train`; or configurations that differ in steps, rows or seed.
    """
    check_layers(model, layers)
    config = next(iter(configs.values()))
    if len({(c.steps, c.rows, c.seed) for c in configs.values()}) > 1:
        raise ValueError("trainings side by side must agree in steps, rows and seed")
    first = next(mlp_activations(model, tokens[: config.rows], layers))
    students = {(n, i): _Student(model, i, _pair(first[i], c.kind), c) for n, c in configs.items() for i in layers}
    every, records = max(1, config.steps // 100), []
    stream = _stream(model, tokens, layers, config)
    for step in tqdm(range(config.steps), disable=not progress, desc="training", unit="step"):
        batch = next(stream)
        for (name, layer), student in students.items():
            x, y = _pair(batch[layer], student.config.kind)
            loss, fvu, l0 = student.step(x, y, step)
            if not math.isfinite(loss):
                lower = f"lower lr ({config.lr}) or l1"
                raise ValueError(f"training diverged at step {step} in layer {layer}: {lower}")
            if step % every == 0 or step == config.steps - 1:
                records.append({"name": name, "step": step, "layer": layer, "loss": loss, "fvu": fvu, "l0": l0})
    finished = {name: {layer: students[name, layer].finished() for layer in layers} for name in configs}
    return finished, pd.DataFrame(records)


class _Student:
    """One transcoder in training, in scaled space: inputs of unit variance per coordinate, outputs of unit norm."""

    def __init__(self, model: TransformerBridge, layer: int, sample: tuple[Tensor, Tensor], config: TrainConfig):
        x, y = sample
        hooks = {
            "transcoder": (hook_in(layer), hook_out(layer)),
            "sae_in": (hook_in(layer),) * 2,
            "sae_out": (hook_out(layer),) * 2,
        }[config.kind]
        self.config = config
        self.x_mean, self.y_mean = x.mean(0), y.mean(0)
        self.x_scale = (x - self.x_mean).pow(2).mean().sqrt()
        self.y_scale = (y - self.y_mean).pow(2).sum(-1).mean().sqrt()
        self.transcoder = Transcoder(
            TranscoderConfig(
                d_in=x.shape[-1],
                d_out=y.shape[-1],
                d_features=config.d_features,
                hook_in=hooks[0],
                hook_out=hooks[1],
                training=config.model_dump(),
            )
        ).to(x.device)
        generator = torch.Generator().manual_seed(config.seed)
        with torch.no_grad():
            t = self.transcoder
            t.W_dec.copy_(torch.randn(t.W_dec.shape, generator=generator))
            t.W_dec /= t.W_dec.norm(dim=1, keepdim=True)
            t.W_enc.copy_(torch.randn(t.W_enc.shape, generator=generator) / math.sqrt(x.shape[-1] * config.d_features))
        self.adam = torch.optim.Adam(self.transcoder.parameters(), lr=config.lr, fused=True)

    def step(self, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"], step: int) -> tuple[float, ...]:
        config, done = self.config, step / self.config.steps
        lr = min(1.0, (done + 1 / config.steps) / max(config.warmup, 1e-9), (1 - done) / max(config.decay, 1e-9))
        self.adam.param_groups[0]["lr"] = config.lr * lr
        l1 = config.l1 * min(1.0, done / max(config.ramp, 1e-9))

        x, y = (x - self.x_mean) / self.x_scale, (y - self.y_mean) / self.y_scale
        with torch.autocast(x.device.type, torch.bfloat16, enabled=config.bfloat16):
            z = self.transcoder.encode(x)
            imitation = self.transcoder.decode(z, x)
        fvu = (y - imitation.float()).pow(2).sum(-1).mean()
        loss = fvu + l1 * z.float().sum(-1).mean()
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        with torch.no_grad():
            self.transcoder.W_dec /= self.transcoder.W_dec.norm(dim=1, keepdim=True)
            l0 = (z > 0).sum(-1).float().mean()
        return loss.item(), fvu.item(), l0.item()

    @torch.no_grad()
    def finished(self) -> Transcoder:
        """Fold the scaling into the weights: the result reads and writes the model's own activations."""
        t = self.transcoder
        t.W_enc *= self.y_scale / self.x_scale
        t.b_enc.copy_(t.b_enc * self.y_scale - self.x_mean @ t.W_enc)
        t.b_dec.copy_(t.b_dec * self.y_scale + self.y_mean)
        return t.eval().requires_grad_(False)


def _pair(acts, kind: Kind) -> tuple[Float[Tensor, "token d_in"], Float[Tensor, "token d_out"]]:
    x, y = acts.x.flatten(0, 1), acts.y.flatten(0, 1)
    return {"transcoder": (x, y), "sae_in": (x, x), "sae_out": (y, y)}[kind]


def _stream(model: TransformerBridge, tokens: Tensor, layers: Sequence[int], config: TrainConfig) -> Iterator[dict]:
    generator = torch.Generator().manual_seed(config.seed)
    while True:
        order = torch.randperm(len(tokens), generator=generator)
        yield from mlp_activations(model, tokens[order], layers, batch_size=config.rows)
