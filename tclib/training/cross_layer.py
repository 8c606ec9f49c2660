"""What steps on a batch of all layers: one layer's `Trainer`, or those of a cross-layer transcoder together.

A cross-layer transcoder takes all its layers in one step, because their features write to the same outputs:

    error_l = y_l - b_dec_l - sum_{k <= l} z_k W_dec[k -> l]          loss = sum_l ||error_l||^2 + sum_k penalty(z_k)

Outputs are scaled to unit variance, so all layers count alike. A feature's decoder rows to all its MLPs have length 1
together, and it pays its penalty once, wherever it writes (Ameisen et al. 2025). Each layer is a `Trainer`; all that is
not in these equations is theirs: initialisation, schedule, Adam, dead features, checkpoints. Where all of them would
skip inactive features (`tclib.training.fast.sparse_step`), so does the joint step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tclib.training import distributed
from tclib.training.architectures import activate
from tclib.training.fast.sparse_step import SparseTrainer
from tclib.training.trainer import Trainer
from tclib.transcoder import Transcoder

Batch = dict[int, tuple[Float[Tensor, "token d_in"], Float[Tensor, "token d_out"]]]
Sums = dict[int, tuple[Tensor, Tensor, Tensor]]


class SingleTrainer:
    """One layer's trainer, called as a `CrossTrainer` is."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.parts = trainer, {trainer.layer: trainer}

    def learn(self, batch: Batch, step: int) -> dict[int, dict[str, float]]:
        """`Trainer.step`, by layer."""
        return {layer: self.trainer.step(*batch[layer], step) for layer in self.parts}

    def try_out(self, batch: Batch) -> None:
        """Forward and backward, without learning."""
        self.trainer.gradients(*self.trainer.scaled(*batch[self.trainer.layer]))

    def finished(self) -> dict[int, Transcoder]:
        """`Trainer.finished`, by layer."""
        return {layer: self.trainer.finished() for layer in self.parts}


class CrossTrainer:
    """The layers of one cross-layer transcoder, in order."""

    def __init__(self, parts: Mapping[int, Trainer]):
        self.parts = dict(sorted(parts.items()))

    def learn(self, batch: Batch, step: int) -> dict[int, dict[str, float]]:
        """As `Trainer.step`, by layer; a layer's loss is its squared error and what its own features pay."""
        scaled = self.scaled(batch)
        scales = {layer: part.begin(step) for layer, part in self.parts.items()}
        sums, z = self.gradients(scaled, scales)
        return {
            layer: part.finish(sums[layer], z[layer], len(scaled[layer][0]), step) for layer, part in self.parts.items()
        }

    def try_out(self, batch: Batch) -> None:
        """Forward and backward, without learning."""
        self.gradients(self.scaled(batch), dict.fromkeys(self.parts, 1.0))

    def scaled(self, batch: Batch) -> Batch:
        """Inputs and outputs of every layer as `Trainer.scaled` makes them."""
        return {layer: part.scaled(*batch[layer]) for layer, part in self.parts.items()}

    def gradients(self, scaled: Batch, scales: Mapping[int, float]) -> tuple[Sums, dict[int, Tensor]]:
        """Fill ``grad`` of all layers; by layer, what `Trainer.gradients` gives."""
        skip = all(isinstance(part, SparseTrainer) and part.skips() for part in self.parts.values())
        sums, z = (self._sparse if skip else self._dense)(scaled, scales)
        for layer, part in self.parts.items():
            if isinstance(part, SparseTrainer):
                part.visited(z[layer] if skip else sums[layer][2], len(scaled[layer][0]))
        return sums, z

    def _dense(self, scaled: Batch, scales: Mapping[int, float]) -> tuple[Sums, dict[int, Tensor]]:
        pre, z = {}, {}
        missed = {layer: part.target(*scaled[layer]) for layer, part in self.parts.items()}
        for layer, part in self.parts.items():
            x, _ = scaled[layer]
            with torch.autocast(x.device.type, torch.bfloat16, enabled=part.config.bfloat16):
                pre[layer] = part.transcoder.pre_activations(x)
                z[layer] = activate(part.transcoder, pre[layer], part.config)
                written = z[layer] @ part.transcoder.W_dec.flatten(1)
            self._subtract(missed, layer, written)
        squared = {layer: error.pow(2).sum() for layer, error in missed.items()}
        paid = {
            layer: scales[layer] * part.penalty(z[layer], pre[layer])
            + part.revival(pre[layer], self._beside(missed, layer).detach())
            for layer, part in self.parts.items()
        }
        for part in self.parts.values():
            part.adam.zero_grad()
        tokens = len(x) * distributed.world()
        (torch.stack([squared[layer] + paid[layer] for layer in self.parts]).sum() / tokens).backward()
        for part in self.parts.values():
            for p in part.adam.param_groups[0]["params"]:
                distributed.total(p.grad)
        sums = {
            layer: ((error + paid[layer]).detach(), error.detach(), (z[layer] > 0).sum().to(error))
            for layer, error in squared.items()
        }
        return sums, {layer: value.detach() for layer, value in z.items()}

    @torch.no_grad()
    def _sparse(self, scaled: Batch, scales: Mapping[int, float]) -> tuple[Sums, dict[int, Any]]:
        parts = {layer: part for layer, part in self.parts.items() if isinstance(part, SparseTrainer)}
        missed = {layer: part.target(*scaled[layer]) for layer, part in parts.items()}
        found = {layer: part.forward(scaled[layer][0]) for layer, part in parts.items()}
        for layer in parts:
            self._subtract(missed, layer, found[layer].written)
        sums = {}
        for layer, part in parts.items():
            error = missed[layer].flatten()
            squared = error.dot(error)
            beside = self._beside(missed, layer)
            paid, count = part.backward(found[layer], scaled[layer][0], beside, scales[layer])
            sums[layer] = squared + paid, squared, count
        return sums, {layer: part.pairs for layer, part in found.items()}

    def _subtract(self, missed: dict[int, Tensor], layer: int, written: Float[Tensor, "token width"]) -> None:
        """Take what a layer's features write off the outputs that they write to."""
        reach = self.parts[layer].transcoder.reach
        for later, part in enumerate(written.chunk(reach, 1)):
            missed[layer + later] = missed[layer + later] - part.to(missed[layer + later].dtype)

    def _beside(self, missed: Mapping[int, Tensor], layer: int) -> Float[Tensor, "token width"]:
        """The errors of all outputs that a layer's features write to, side by side."""
        return torch.cat([missed[layer + later] for later in range(self.parts[layer].transcoder.reach)], 1)

    def finished(self) -> dict[int, Transcoder]:
        """The set, see `tclib.transcoder.imitation`."""
        scales = {layer: part.y_scale for layer, part in self.parts.items()}
        return {
            layer: part.finished([scales[later] for later in scales if later > layer])
            for layer, part in self.parts.items()
        }
