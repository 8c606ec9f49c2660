"""How few units of an MLP carry a task: features, neurons or directions, all kept from the same starting point.

At the last token a unit with activation a_i and writing vector w_i adds to its MLP's output, beyond its mean over the
compared number, the deviation (a_i - mean a_i) w_i. Keeping the units K gives

    y_K = mean y + sum over K of (a_i - mean a_i) w_i

With no unit it is the MLP at its mean, whatever the units are, so features and neurons start alike. All neurons are the
MLP itself; all features lack what the transcoder misses, its ``error``, which is held at its mean, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.activations import ACT2FN

from tclib.activations import hook_out
from tclib.tasks import greater_than as gt
from tclib.tasks.last_token import LastToken
from tclib.transcoder import Transcoder


@dataclass(frozen=True)
class Units:
    """Units of one MLP at the last token of each prompt.

    ``deviations`` are activations minus their mean over the compared number, ``rest`` is the MLP's output at that mean,
    and ``error`` what the output's own deviation has beyond all units (0 for neurons; a skip path is part of it).
    """

    layer: int
    activations: Float[Tensor, "prompt unit"]
    deviations: Float[Tensor, "prompt unit"]
    writes: Float[Tensor, "unit d_model"]
    rest: Float[Tensor, "prompt d_model"]
    error: Float[Tensor, "prompt d_model"]

    @classmethod
    def of(cls, last: LastToken, layer: int, transcoder: Transcoder | None = None) -> Units:
        """The features of a transcoder of ``hook_mlp_out``, or the neurons where none is given."""
        if transcoder is None:
            names, writes = [f"blocks.{layer}.mlp.hook_post"], last.model.W_out[layer].detach()
        elif transcoder.config.hook_out != hook_out(layer):
            raise ValueError(f"this transcoder writes to {transcoder.config.hook_out}, not to {hook_out(layer)}")
        elif transcoder.config.n_writes is not None:
            raise ValueError("a cross-layer transcoder has no features of one MLP alone: use replace_mlps")
        else:
            names, writes = [transcoder.config.hook_in], transcoder.W_dec.detach()
        read, out = last.activations(layer, [*names, hook_out(layer)])
        with torch.no_grad():
            return cls.made(last.prompts, layer, read if transcoder is None else transcoder.encode(read), writes, out)

    @classmethod
    def made(
        cls,
        prompts: gt.Prompts,
        layer: int,
        activations: Float[Tensor, "prompt unit"],
        writes: Float[Tensor, "unit d_model"],
        out: Float[Tensor, "prompt d_model"],
    ) -> Units:
        """Any units, from their activations, what they write, and the MLP's output."""
        deviations, rest = activations - gt.mean_over_years(activations, prompts), gt.mean_over_years(out, prompts)
        return cls(layer, activations, deviations, writes, rest, out - rest - deviations @ writes)

    def written(self) -> Float[Tensor, " unit"]:
        """Variance of what each unit writes over the compared number: the paper's order, in the units of the stream."""
        return self.deviations.square().mean(0) * self.writes.square().sum(1)

    def direct(self, unembedding: Float[Tensor, "d_model answer"]) -> Float[Tensor, " unit"]:
        """Variance of what each unit adds to the answers' logits straight through the unembedding."""
        centred = unembedding - unembedding.mean(1, keepdim=True)
        return self.deviations.square().mean(0) * (self.writes @ centred).square().sum(1)

    def output(self, kept: Int[Tensor, " kept"]) -> Float[Tensor, "prompt d_model"]:
        """y_K: what the MLP writes with these units live."""
        return self.rest + self.deviations[:, kept] @ self.writes[kept]

    def with_error(self) -> Units:
        """The same units with the error live whatever is kept."""
        return replace(self, rest=self.rest + self.error, error=torch.zeros_like(self.error))

    def unexplained(self) -> float:
        """Share of the output's deviation that all units together miss."""
        whole = self.error + self.deviations @ self.writes
        return (self.error.square().sum() / whole.square().sum()).item()

    def described(self, unit: int, prompts: gt.Prompts, unembedding: Float[Tensor, "d_model answer"]) -> str:
        """A name made from a unit's two curves: "on 5, 6: raises 7 and 8", or "negative on ..." where that is larger.

        It is on for the compared numbers at which it is over half as active as it ever is, and raises two answers most.
        """
        numbers = prompts.years.unique()
        curve = torch.stack([self.activations[prompts.years == n, unit].mean() for n in numbers])
        sign = curve[curve.abs().argmax()].sign()
        when = ", ".join(str(int(n)) for n in numbers[sign * curve > curve.abs().max() / 2])
        first, second = (sign * self.writes[unit] @ unembedding).topk(2).indices.sort().values.tolist()
        return f"{'negative ' * bool(sign < 0)}on {when}: raises {first} and {second}"

    def likeness(self, other: Units) -> Float[Tensor, "unit other"]:
        """Cosine of what two units write times cosine of how they move: 1 for copies, also with both signs turned."""
        unit = torch.nn.functional.normalize
        return (unit(self.writes) @ unit(other.writes).T) * (unit(self.deviations.T) @ unit(other.deviations.T).T)


def gated_controls(last: LastToken, layer: int) -> dict[str, Units]:
    """A gated MLP's neurons, what is left of them with one advantage taken away, and the best that any units could do.

    "only the gate moves" and "only the value moves" hold the other factor at its mean; "cut in two" counts a neuron's
    positive and negative part as two units; "principal directions" are those along which the output itself varies.

    Raises:
        ValueError: the MLP is not gated.
    """
    model, prompts = last.model, last.prompts
    if not model.cfg.gated_mlp:
        raise ValueError("these controls are for gated MLPs, whose neurons are products")
    names = ["mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post", "hook_mlp_out"]
    gate, value, post, out = last.activations(layer, [f"blocks.{layer}.{name}" for name in names])
    W, opened = model.W_out[layer].detach(), ACT2FN[model.cfg.hidden_act](gate)  # pyright: ignore[reportAttributeAccessIssue]

    def mean(values: Tensor) -> Tensor:
        return gt.mean_over_years(values, prompts)

    along = torch.linalg.svd(out - mean(out), full_matrices=False).Vh
    kinds = {
        "neurons": (post, W),
        "only the gate moves": (opened * mean(value), W),
        "only the value moves": (mean(opened) * value, W),
        "cut in two": (torch.cat([post.relu(), (-post).relu()], 1), torch.cat([W, -W])),
        "principal directions": (out @ along.T, along),
    }
    return {name: Units.made(prompts, layer, activations, writes, out) for name, (activations, writes) in kinds.items()}


def ranked(scores: Float[Tensor, " unit"]) -> Int[Tensor, " unit"]:
    """Units, the one with the largest score first."""
    return scores.argsort(descending=True)


def shuffled(units: Units, seed: int) -> Int[Tensor, " unit"]:
    """The units that vary at all, in random order."""
    varying = (units.written() > 1e-12).nonzero()[:, 0].cpu()
    return varying[torch.randperm(len(varying), generator=torch.Generator().manual_seed(seed))]


def kl_kept(
    last: LastToken, units: Units, order: Int[Tensor, " unit"], ks: Sequence[int]
) -> Float[np.ndarray, "k prompt"]:
    """KL from the model's answers to those with the first k units of an order live, in nats, for each k and prompt.

    Raises:
        ValueError: a k that is negative.
    """
    if not len(ks) or min(ks) < 0:
        raise ValueError(f"give numbers of units of at least 0, not {list(ks)}")
    whole, hook = last.answers(), hook_out(units.layer)
    return np.stack([gt.kl_to(whole, last.answers({hook: units.output(order[:k])})).numpy() for k in ks])


def duel(
    last: LastToken, layer: int, transcoder: Transcoder, ks: Sequence[int]
) -> tuple[dict[str, Float[np.ndarray, "k prompt"]], dict[str, Units]]:
    """`kl_kept` of features and of neurons, each in the order of what they write, and the two groups of units."""
    groups = {"features": Units.of(last, layer, transcoder), "neurons": Units.of(last, layer)}
    return {kind: kl_kept(last, group, ranked(group.written()), ks) for kind, group in groups.items()}, groups


def random_band(last: LastToken, units: Units, ks: Sequence[int], draws: int = 20, seed: int = 0) -> pd.DataFrame:
    """Mean KL with k random units live: ``low``, ``median`` and ``high`` over the draws, one row for each k."""
    means = np.stack([kl_kept(last, units, shuffled(units, seed + i), ks).mean(1) for i in range(draws)])
    return pd.DataFrame(
        {"low": means.min(0), "median": np.median(means, 0), "high": means.max(0)}, pd.Index(ks, name="k")
    )
