"""Reference solutions of the exercises whose answer the rest of a notebook uses, for as long as they are open.

The same lines are folded below each task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tclib.blind import rules
from tclib.blind.sealed import Seal
from tclib.tracing import Trace


def one_layer(
    trace: Trace, layer: int, position: int, direction: Float[Tensor, " d_model"]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Exercise 04.2: attribute, for one layer: features, error, bias, heads [head, source], output bias."""
    out = trace.cache[f"blocks.{layer}.hook_mlp_out"][position]  # [d_model]
    A = trace.cache[f"blocks.{layer}.attn.hook_pattern"][:, position]  # [head, source]
    v = trace.cache[f"blocks.{layer}.attn.hook_v"]
    v = v.repeat_interleave(trace.block(layer).group, 1)  # [source, head, d_head], shared values once for each head
    attn = trace.model.blocks[layer].attn
    W_O, b_O = attn.W_O, torch.zeros_like(direction) if attn.b_O is None else attn.b_O  # [head, d_head, d_model]
    t = trace.transcoders.get(layer)
    z = torch.zeros(1) if t is None else trace.features[layer][position]  # [d_features]
    W_dec, b_dec = (torch.zeros(1, len(out)), torch.zeros(len(out))) if t is None else (t.W_dec, t.b_dec)
    contributions = z * (W_dec @ direction)
    bias = b_dec @ direction
    error = out @ direction - contributions.sum() - bias
    brought = (v * (W_O @ direction)).sum(-1).T  # [head, source]
    return contributions, error, bias, A * brought, b_O @ direction


def path_search(
    sources: Callable[[Any], list[tuple]], root: Any, value: float, branches: int, steps: int
) -> list[list[tuple]]:
    """Exercise 04b.1: a path search: for each step its best paths as (names, contribution)."""
    paths, rounds = [((), value, root)], []
    for _ in range(steps):
        longer = [
            ((*names, name), contribution * share, onward)
            for names, contribution, node in paths
            if node is not None
            for name, share, onward in sources(node)
        ]
        paths = sorted(longer, key=lambda path: -abs(path[1]))[:branches]
        rounds.append([path[:2] for path in paths])
    return rounds


def attention_moves(A: Float[Tensor, " key"], g: Float[Tensor, " key"], S: int, delta: float) -> Tensor:
    """Exercise 04b.3: when one score changes, by how much the attended value does."""
    grown = A.clone()
    grown[S] = A[S] * torch.tensor(delta).exp()
    return grown @ g / grown.sum() - A @ g


def blind_rule(seal: Seal) -> rules.Rule:
    """Exercise 05.1: build a player for blind features."""
    rows = pd.concat([seal.reading(e) for e in range(len(seal.activations))])
    rows = rows.query("offset != 'start' and share > 0")
    if rows.empty:
        return rules.Tokens(*seal.de_embed(top=6))
    offset, prefers = rows.groupby(["offset", "prefers"])["share"].sum().idxmax()  # pyright: ignore[reportGeneralTypeIssues]
    return rules.Tokens(*prefers, offset=int(offset))


def ablation_value(
    live: Float[Tensor, "prompt unit"], group: Int[Tensor, " prompt"], how: str
) -> Float[Tensor, "prompt unit"]:
    """Exercise 06b.1: build the ablation harness: zero, mean or resample, within each group."""
    value = torch.zeros_like(live)
    for g in group.unique() if how != "zero" else ():
        rows = (group == g).nonzero()[:, 0]
        turned = rows.roll(int(torch.randint(1, len(rows), ())))
        value[rows] = live[rows].mean(0) if how == "mean" else live[turned]
    return value


def warmer(prob: Float[Tensor, " answer"], factor: float) -> Float[Tensor, " answer"]:
    """Exercise 06b.2: a decided answer without a better one."""
    raised = prob ** (1 / factor)
    return raised / raised.sum()


def balanced_share(kept: tuple[float, float], empty: tuple[float, float], whole: tuple[float, float]) -> float:
    """Exercise 06b.3: a share with an honest zero, of pairs of a forward and a backward score."""
    with_kept, nothing, everything = ((forward - backward) / 2 for forward, backward in (kept, empty, whole))
    return (with_kept - nothing) / (everything - nothing)


def fair_start(
    y: Float[Tensor, "prompt d_model"], a: Float[Tensor, "prompt unit"], W: Float[Tensor, "unit d_model"], kept: Any
) -> Float[Tensor, "prompt d_model"]:
    """Exercise 09.1: a fair start: the mean output, and the deviations of the units kept."""
    deviation = a - a.mean(0)
    return y.mean(0) + deviation[:, kept] @ W[kept]


def integrated(slope: Callable[[Tensor], Tensor], x: Tensor, base: Tensor, steps: int) -> Tensor:
    """Exercise 10.1: the way, not its end; all of one shape."""
    way = x - base
    mean = sum(slope(base + (i + 0.5) / steps * way) for i in range(steps)) / steps
    return way * mean


def visible_part(v: Float[Tensor, " d"], W: Float[Tensor, "d n"]) -> Float[Tensor, " d"]:
    """Exercise 10.2: what does anybody read of it?"""
    return W @ (torch.linalg.pinv(W) @ v)


def orthogonal_pursuit(y: Float[Tensor, " d"], D: Float[Tensor, "unit d"], k: int) -> Float[Tensor, " unit"]:
    """Exercise 11.1: look back after each pick."""
    picks, left, sizes = [], y, y[:0]
    for _ in range(k):
        picks.append(int((D @ left).abs().argmax()))
        sizes = torch.linalg.lstsq(D[picks].T, y).solution
        left = y - sizes @ D[picks]
    z = torch.zeros(len(D), dtype=y.dtype)
    z[picks] = sizes
    return z


def label_fvu(y: Float[Tensor, "token d"], kind: Int[Tensor, " token"]) -> Float[Tensor, ""]:
    """Exercise 11b.1: what labels can explain at best, as an FVU."""
    answer = torch.zeros_like(y)
    for one in kind.unique():
        answer[kind == one] = y[kind == one].mean(0)
    return (y - answer).pow(2).sum() / (y - y.mean(0)).pow(2).sum()


def imitated(
    z: Sequence[Float[Tensor, "token feature"]],
    W_dec: Sequence[Float[Tensor, "feature write d_model"]],
    b_dec: Sequence[Float[Tensor, " d_model"]],
    layer: int,
) -> Float[Tensor, "token d_model"]:
    """Exercise 12.1: one MLP from all layers."""
    out = b_dec[layer].clone()
    for k in range(layer + 1):
        out += z[k] @ W_dec[k][:, layer - k]
    return out


def equal_width(d_features: int, layers: int) -> float:
    """Exercise 12.2: equal parameters: the width of a per-layer set."""
    matrices = layers + layers * (layers + 1) / 2
    return d_features * matrices / (2 * layers)


def error_share(
    N: Float[Tensor, "node node"],
    weights: Float[Tensor, " node"],
    errors: Bool[Tensor, " node"],
    inputs: Bool[Tensor, " node"],
) -> float:
    """Exercise 13.1: how much of a graph is dark?"""
    reached, now = torch.zeros_like(weights), weights
    while now.any():
        now = now @ N
        reached = reached + now
    return (reached[errors].sum() / (reached[errors].sum() + reached[inputs].sum())).item()
