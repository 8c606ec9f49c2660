"""The frozen model: attention patterns, LayerNorm scales and MLP outputs stay at one prompt's values.

What is left is linear, which is why attribution can add up (paper, section 4.1). This module runs the model itself
with those values frozen, to check what `tclib.attribution` computes from weights: a freeze that silently does not hold
would give a plausible wrong answer.
"""

from __future__ import annotations

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tclib import interventions
from tclib.activations import hook_in, hook_out
from tclib.interventions import Hook, edited
from tclib.targets import Target
from tclib.tracing import Trace
from tclib.transcoder import imitation


class NotFrozenError(RuntimeError):
    """The frozen model is not linear, or disagrees with its weights: no table can be trusted."""


def freeze(trace: Trace) -> list[Hook]:
    """Hooks that freeze patterns, LayerNorm scales and MLP outputs at this prompt's values."""
    return interventions.freeze(trace.cache, ["patterns", "scales", "mlps"])


@torch.no_grad()
def propagate(trace: Trace, change: Float[Tensor, "pos d_model"]) -> dict[str, Float[Tensor, "pos d_model"]]:
    """How a change of the embeddings arrives at each transcoder's input and at ln_final, from the weights alone.

    Returns:
        The change of ``blocks.{layer}.ln2.hook_normalized`` for every layer and of ``ln_final.hook_normalized``.
    """
    arrives = {}
    for layer in range(trace.model.cfg.n_layers):
        block = trace.block(layer)
        read = trace.normalised("attn_in", layer, change) * trace.gain("attn_in", layer)[0]
        values = block.per_head(torch.einsum("sd,hde->hse", read, block.W_V))
        moved = torch.einsum("hts,hse->hte", trace.pattern(layer), values)
        after = change + torch.einsum("hte,hed->td", moved, block.W_O)
        arrives[hook_in(layer)] = trace.normalised("mlp_in", layer, change if trace.parallel else after)
        change = after
    arrives["ln_final.hook_normalized"] = trace.normalised("final", trace.model.cfg.n_layers, change)
    return arrives


@torch.no_grad()
def self_test(trace: Trace) -> float:
    """Push the embeddings in a random direction and compare what the frozen model does with what its weights say.

    Returns:
        The largest relative deviation over all places where a target can read.

    Raises:
        NotFrozenError: above 1e-3 in float32, 1e-8 in float64.
    """
    embed = trace.cache["hook_embed"]
    noise = torch.randn(embed.shape, generator=torch.Generator().manual_seed(0)).to(embed)
    change = noise * embed.norm() / noise.norm()
    predicted = propagate(trace, change)
    with edited(trace.model, [*freeze(trace), ("hook_embed", lambda value, hook: value + change)]):
        _, pushed = trace.model.run_with_cache(trace.tokens[None], names_filter=lambda n: n in predicted)
    worst = 0.0
    for name, expected in predicted.items():
        measured = pushed[name][0] - trace.cache[name]
        # A large input leaves its own rounding in the difference.
        size = expected.norm() + 1e-3 * trace.cache[name].norm()
        worst = max(worst, ((measured - expected).norm() / size).item())
    if not worst <= (1e-3 if embed.dtype == torch.float32 else 1e-8):
        raise NotFrozenError(
            f"with patterns and scales frozen, the model deviates by {worst:.1e} from what its weights say: "
            "is it a model of a supported family without other edits or hooks?"
        )
    return worst


def check(trace: Trace) -> None:
    """`self_test`, unless this trace has passed it with the model as it is now: the same hooks and the same weights.

    Raises:
        NotFrozenError: as `self_test`.
    """
    modules, weights = trace.model.modules(), trace.model.parameters()
    hooks = (number for module in modules for number in (*module._forward_pre_hooks, *module._forward_hooks))
    state = (*hooks, *((id(weight), weight._version) for weight in weights))  # hooks' numbers are never used again
    if state not in trace.tested:
        self_test(trace)
        trace.tested.add(state)


def by_autograd(trace: Trace, target: Target, table: pd.DataFrame) -> pd.Series:
    """The ``contribution`` column of a table of `tclib.attribution.attribute` by another route.

    Every row is what was written times the gradient of the target there, by autograd through the model itself with
    patterns and scales frozen, and with values and MLP outputs as constants, so that only the direct path is left. A
    head's row is the pattern times the gradient there: value heads serve several heads, patterns one.
    """
    slopes = _gradients(trace, target)
    contributions = [_by_gradient(trace, target, slopes, row) for row in table.itertuples()]
    return pd.Series(contributions, index=table.index, name="contribution", dtype=float)


def _by_gradient(trace: Trace, target: Target, slopes: dict[str, Tensor], row) -> float:
    if row.kind in ("target_bias", "norm_bias"):
        return target.bias if row.kind == "target_bias" else target.norm_bias(trace)
    if row.kind in ("embedding", "position"):
        write = trace.cache["hook_embed" if row.kind == "embedding" else "hook_pos_embed"][row.position]
        return (write @ slopes["hook_embed"][row.position]).item()
    block, weights = f"blocks.{row.layer}.attn", trace.block(row.layer)
    if row.kind in ("head", "value_bias"):
        pattern = trace.cache[f"{block}.hook_pattern"][row.head, target.position]
        bias = slopes[f"{block}.hook_z"][target.position, row.head] @ weights.b_V[row.head // weights.group] * pattern
        if row.kind == "value_bias":
            return bias.sum().item()
        whole = slopes[f"{block}.hook_pattern"][row.head, target.position] * pattern
        return (whole - bias)[row.position].item()
    if row.kind == "attention_bias":
        return (slopes[f"{block}.hook_out"][row.position] @ trace.model.blocks[row.layer].attn.b_O).item()
    at = row.written if row.kind == "feature" else row.layer
    written = _written(trace, at)
    slope, out = slopes[written][row.position], trace.cache[written][row.position]
    if row.kind == "mlp":
        return (slope @ out).item()
    transcoder, here = trace.transcoders[row.layer], {at: z[row.position] for at, z in trace.features.items()}
    x = trace.cache[hook_in(row.layer)][row.position]
    if row.kind == "feature":
        return (slope @ transcoder.rows(at - row.layer)[row.feature] * here[row.layer][row.feature]).item()
    return (slope @ {
        "skip": lambda: x @ transcoder.get_parameter("W_skip"),
        "transcoder_bias": lambda: transcoder.b_dec,
        "error": lambda: out - imitation(trace.transcoders, row.layer, here, x),
    }[row.kind]()).item()  # fmt: skip


def _written(trace: Trace, layer: int) -> str:
    """Where the model gives what a layer's transcoder imitates, or its whole MLP."""
    transcoder = trace.transcoders.get(layer)
    return hook_out(layer) if transcoder is None else transcoder.config.hook_out


def _gradients(trace: Trace, target: Target) -> dict[str, Tensor]:
    """Gradient of the target at everything that is added to the residual stream, and at attention's patterns."""
    place = {"attn_in": f"blocks.{target.layer}.ln1", "mlp_in": f"blocks.{target.layer}.ln2", "final": "ln_final"}
    read_at, seen = place[target.place] + ".hook_normalized", {}

    def leaf(name: str) -> Hook:  # hook.name is no key: an unprocessed model calls the same place by another name
        def constant(value: Tensor, hook) -> Tensor:
            seen[name] = value.detach().clone().requires_grad_(True)
            return seen[name]

        return name, constant

    def add_nothing(name: str) -> Hook:
        def add(value: Tensor, hook) -> Tensor:
            seen[name] = torch.zeros_like(value).requires_grad_(True)
            return value + seen[name]

        return name, add

    def keep(value: Tensor, hook) -> None:
        seen["read"] = value

    hooks = [(name, keep_it) for name, keep_it in freeze(trace) if not name.endswith(("hook_mlp_out", "mlp.hook_out"))]
    hooks += [leaf("hook_embed"), (read_at, keep)]
    for layer in range(trace.model.cfg.n_layers):
        hooks += [leaf(f"blocks.{layer}.attn.{name}") for name in ("hook_pattern", "hook_v")]
        hooks += [add_nothing(f"blocks.{layer}.attn.{name}") for name in ("hook_z", "hook_out")]
        hooks += [leaf(_written(trace, layer))]
    with torch.enable_grad(), edited(trace.model, hooks):
        trace.model(trace.tokens[None])
        read = seen.pop("read")[0, target.position]
        (read @ (target.reader * trace.gain(target.place, target.layer)[0])).backward()
    return {name: value.grad[0] for name, value in seen.items() if value.grad is not None}
