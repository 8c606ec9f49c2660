"""Is a transcoder any good? Sparsity, reconstruction, and what the model loses when its MLP is replaced."""

from __future__ import annotations

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.activations import mlp_activations
from tclib.intervene import Hook, ablate_mlp, replace_mlp, run
from tclib.transcoder import Transcoder


@torch.no_grad()
def reconstruction(
    model: TransformerBridge,
    transcoders: dict[int, Transcoder],
    tokens: Int[Tensor, "row pos"],
    batch_size: int = 16,
) -> pd.DataFrame:
    """L0, FVU and firing per layer, over all tokens but BOS, in one pass of constant memory.

    FVU = sum ||y - TC(x)||^2 / sum ||y - mean(y)||^2, the fraction of variance unexplained: 0 is perfect, 1 is no
    better than the mean.

    Returns:
        One row per layer: ``l0`` (active features per token), ``fvu``, ``dead`` (fraction of features that never
        fired on this text), ``dense`` (fraction that fired on more than 10% of tokens), ``tokens``.
    """
    bos = model.tokenizer.bos_token_id
    sums = {layer: _Sums(transcoder) for layer, transcoder in transcoders.items()}
    for rows, acts in zip(
        tokens.split(batch_size), mlp_activations(model, tokens, list(transcoders), batch_size), strict=True
    ):
        keep = (rows != bos).to(model.cfg.device)
        for layer, transcoder in transcoders.items():
            sums[layer].add(transcoder, acts[layer].x[keep], acts[layer].y[keep])
    return pd.DataFrame([{"layer": layer, **s.row()} for layer, s in sums.items()])


@torch.no_grad()
def replacement(
    model: TransformerBridge,
    transcoders: dict[int, Transcoder],
    tokens: Int[Tensor, "row pos"],
    batch_size: int = 16,
) -> pd.DataFrame:
    """Next-token cross-entropy in nats with each MLP in turn replaced by its transcoder, zero, or its mean output.

    ``recovered`` = (ce_zero - ce_replaced) / (ce_zero - ce): 1 means that nothing was lost. The last row, layer
    ``"all"``, replaces every layer that has a transcoder at once. BOS is read but never a prediction target.

    Raises:
        ValueError: no text, or a layer that the model does not have.
    """
    groups = {**{layer: [layer] for layer in transcoders}, "all": list(transcoders)}
    return _replace_groups(model, transcoders, tokens, batch_size, groups)


def _replace_groups(
    model: TransformerBridge,
    transcoders: dict[int, Transcoder],
    tokens: Int[Tensor, "row pos"],
    batch_size: int,
    groups: dict[int | str, list[int]],
) -> pd.DataFrame:
    """One row per group of layers that are replaced together."""
    means = _mean_outputs(model, list(transcoders), tokens, batch_size)
    ce = cross_entropy(model, tokens, [], batch_size)
    records = []
    for name, layers in groups.items():
        swaps = {
            "ce_replaced": [h for layer in layers for h in replace_mlp(layer, transcoders[layer])],
            "ce_zero": [h for layer in layers for h in ablate_mlp(layer)],
            "ce_mean": [h for layer in layers for h in ablate_mlp(layer, means[layer])],
        }
        row = {"layer": name, "ce": ce} | {k: cross_entropy(model, tokens, h, batch_size) for k, h in swaps.items()}
        row["recovered"] = (row["ce_zero"] - row["ce_replaced"]) / (row["ce_zero"] - ce)
        records.append(row)
    return pd.DataFrame(records)


def evaluate(
    model: TransformerBridge,
    transcoders: dict[int, Transcoder],
    tokens: Int[Tensor, "row pos"],
    batch_size: int = 16,
) -> pd.DataFrame:
    """One row per layer: the columns of `reconstruction` and of `replacement`.

    Raises:
        ValueError: no text, or a layer that the model does not have.
    """
    left = reconstruction(model, transcoders, tokens, batch_size)
    right = _replace_groups(model, transcoders, tokens, batch_size, {layer: [layer] for layer in transcoders})
    return left.merge(right, on="layer")


@torch.no_grad()
def cross_entropy(
    model: TransformerBridge, tokens: Int[Tensor, "row pos"], hooks: list[Hook], batch_size: int = 16
) -> float:
    """Mean next-token cross-entropy in nats under the interventions ``hooks``; BOS is never a target."""
    bos, total, count = model.tokenizer.bos_token_id, 0.0, 0
    for rows in tokens.split(batch_size):
        rows = rows.to(model.cfg.device)
        logits, targets = run(model, rows, hooks)[:, :-1], rows[:, 1:]
        keep = targets != bos
        total += torch.nn.functional.cross_entropy(logits[keep], targets[keep], reduction="sum").item()
        count += int(keep.sum())
    return total / count


class _Sums:
    """Running sums from which FVU, L0 and firing rates follow; float64, so that the order hardly matters."""

    def __init__(self, transcoder: Transcoder):
        self.n, self.error, self.square, self.active = 0, 0.0, 0.0, 0
        self.total = torch.zeros(transcoder.config.d_out, dtype=torch.float64)
        self.fired = torch.zeros(transcoder.config.d_features, dtype=torch.int64)

    def add(self, transcoder: Transcoder, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]) -> None:
        # An SAE reconstructs what it reads: its hooks are equal.
        c = transcoder.config
        source = {"ln2.hook_normalized": x, "hook_mlp_out": y}
        x, y = (source[hook.split(".", 2)[2]] for hook in (c.hook_in, c.hook_out))
        z = transcoder.encode(x)
        self.n += len(x)
        self.error += (y - transcoder.decode(z, x)).double().pow(2).sum().item()
        self.square += y.double().pow(2).sum().item()
        self.total += y.double().sum(0).cpu()
        fired = (z > 0).sum(0).cpu()
        self.fired += fired
        self.active += int(fired.sum())

    def row(self) -> dict:
        variance = self.square - (self.total @ self.total).item() / self.n
        rate = self.fired / self.n
        return {
            "tokens": self.n,
            "l0": self.active / self.n,
            "fvu": self.error / variance,
            "dead": (rate == 0).double().mean().item(),
            "dense": (rate > 0.1).double().mean().item(),
        }


def _mean_outputs(model: TransformerBridge, layers: list[int], tokens: Tensor, batch_size: int) -> dict[int, Tensor]:
    total, count = {layer: 0.0 for layer in layers}, 0
    for acts in mlp_activations(model, tokens, layers, batch_size):
        count += acts[layers[0]].y[..., 0].numel()
        for layer in layers:
            total[layer] = total[layer] + acts[layer].y.double().sum((0, 1))
    return {layer: (total[layer] / count).float() for layer in layers}
