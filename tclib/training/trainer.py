"""The plain training step: dense, by autograd, with nothing clever in it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tclib.activations import hook_in, hook_out
from tclib.training import distributed
from tclib.training.architectures import activate, auxiliary, batch_threshold, penalty
from tclib.training.config import TrainConfig
from tclib.transcoder import Transcoder, TranscoderConfig

SMOOTHING = 0.9  # of the running mean that becomes BatchTopK's threshold


def rates(config: TrainConfig, step: int) -> tuple[float, float]:
    """Learning rate and sparsity coefficient at a step, as fractions of their full values."""
    done = step / config.steps
    lr = min(1.0, (done + 1 / config.steps) / max(config.warmup, 1e-9), (1 - done) / max(config.decay, 1e-9))
    return lr, min(1.0, done / max(config.sparsity_warmup, 1e-9))


class Trainer:
    """One transcoder in training, in scaled space: inputs of unit variance per coordinate, outputs of unit norm.

    Its precision and device are those of the activations. Under several processes each sees its share of a batch, and
    sums of gradients, counts and norms run over all of them. With ``n_writes`` it is one layer of a cross-layer
    transcoder, see `tclib.training.cross_layer`.
    """

    def __init__(
        self,
        layer: int,
        x: Float[Tensor, "token d_in"],
        y: Float[Tensor, "token d_out"],
        config: TrainConfig,
        n_writes: int | None = None,
    ):
        x, y = self._pair(x, y, config)
        self.layer, self.config = layer, config
        self.measure_scales(x, y)
        own = hook_in(layer), hook_out(layer)
        hooks = {"sae_in": own[:1] * 2, "sae_out": own[1:] * 2}.get(config.kind, own)
        self.transcoder = Transcoder(
            TranscoderConfig(
                d_in=x.shape[-1],
                d_out=y.shape[-1],
                d_features=config.d_features,
                hook_in=hooks[0],
                hook_out=hooks[1],
                activation=config.activation,
                k=config.k,
                skip=config.skip,
                n_writes=n_writes,
                training=config.model_dump(),
            )
        ).to(x)
        self.silent = torch.zeros(config.d_features, dtype=torch.int64, device=x.device)  # tokens since a feature fired
        self.initialise((x - self.x_mean) / self.x_scale)
        learning = [p for p in self.transcoder.parameters() if p.requires_grad]
        self.adam = torch.optim.Adam(learning, lr=config.lr, fused=True)

    def measure_scales(self, x: Tensor, y: Tensor) -> None:
        self.x_mean, self.y_mean = x.mean(0), y.mean(0)
        self.x_scale = (x - self.x_mean).pow(2).mean().sqrt()
        self.y_scale = (y - self.y_mean).pow(2).sum(-1).mean().sqrt()

    @torch.no_grad()
    def initialise(self, x: Float[Tensor, "token d_in"]) -> None:
        t, c = self.transcoder, self.config
        generator = torch.Generator().manual_seed(c.seed)
        t.W_dec.copy_(torch.randn(t.W_dec.shape, generator=generator))
        t.W_dec.flatten(1).div_(lengths(t)[:, None])
        t.W_enc.copy_(torch.randn(t.W_enc.shape, generator=generator) / math.sqrt(x.shape[-1] * c.d_features))
        if c.tied:
            t.W_enc.copy_(t.rows().T / math.sqrt(c.d_features))
        if c.start_l0 is not None:
            x = x[:4096]
            rank = max(1, round(len(x) * (1 - c.start_l0 / c.d_features)))
            for some in torch.arange(c.d_features).split(4096):
                some = slice(int(some[0]), int(some[-1]) + 1)
                t.b_enc[some] -= (x @ t.W_enc[:, some] + t.b_enc[some]).kthvalue(rank, dim=0).values
        if t.threshold is not None:
            if c.activation == "jumprelu":
                t.threshold.fill_(c.bandwidth)
            else:  # batchtopk's follows the batches
                t.threshold.requires_grad_(False)

    def step(self, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"], step: int) -> dict[str, float]:
        """Learn from this process's share of a batch; loss, FVU, L0 and dead fraction of the whole batch."""
        x, y = self.scaled(x, y)
        return self.finish(*self.gradients(x, y, self.begin(step)), len(x), step)

    def begin(self, step: int) -> float:
        """Set a step's learning rate and return its share of the sparsity coefficient."""
        lr, sparsity_scale = rates(self.config, step)
        self.adam.param_groups[0]["lr"] = self.config.lr * lr
        return sparsity_scale

    def finish(self, sums: tuple[Tensor, ...], z: Tensor, tokens: int, step: int) -> dict[str, float]:
        """After `gradients`: new weights and thresholds, and what the batch was like."""
        t, c, n = self.transcoder, self.config, tokens * distributed.world()
        with torch.no_grad():
            self.update()
            if t.threshold is not None and c.activation == "batchtopk":
                smallest = self.smallest(z, tokens).to(t.threshold)
                t.threshold.lerp_(smallest, 1.0 if step == 0 else 1 - SMOOTHING)
            fired = distributed.total(self.fired(z).to(torch.int64)) > 0
            self.silent = torch.where(fired, 0, self.silent + n)
            loss, error, active = (distributed.total(torch.stack(sums).detach()) / n).tolist()
        return {"loss": loss, "fvu": error, "l0": active, "dead": self.dead().double().mean().item()}

    def gradients(
        self, x: Tensor, y: Tensor, sparsity_scale: float = 1.0
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Fill ``grad`` with the gradients of the mean loss over the scaled tokens of all processes.

        Returns:
            Loss, squared error and active features, each summed over this process's tokens; and the activations.
        """
        t, c = self.transcoder, self.config
        with torch.autocast(x.device.type, torch.bfloat16, enabled=c.bfloat16):
            pre = t.pre_activations(x)
            z = activate(t, pre, c)
            error = y - t.decode(z, x).to(y.dtype)
        squared = error.pow(2).sum()
        loss = squared + sparsity_scale * self.penalty(z, pre) + self.revival(pre, error.detach())
        self.adam.zero_grad()
        (loss / (len(x) * distributed.world())).backward()
        for p in self.adam.param_groups[0]["params"]:
            distributed.total(p.grad)
        return (loss.detach(), squared.detach(), (z > 0).sum().to(y.dtype)), z.detach()

    def target(self, x: Tensor, y: Tensor) -> Float[Tensor, "token d_out"]:
        """What the features are to write: the output without its bias and skip path."""
        t = self.transcoder
        return y - t.b_dec if t.W_skip is None else y - t.b_dec - (x @ t.W_skip).to(y.dtype)

    def fired(self, z: Tensor) -> Bool[Tensor, " d_features"]:
        """Which features are active on any token."""
        return (z > 0).any(0)

    def smallest(self, z: Tensor, tokens: int) -> Float[Tensor, ""]:
        """BatchTopK's threshold in this batch."""
        assert self.config.k is not None
        return batch_threshold(z, self.config.k, tokens)

    def penalty(self, z: Tensor, pre: Tensor) -> Float[Tensor, ""]:
        """What the architecture charges at the full coefficient, summed over tokens."""
        if self.config.activation == "relu" and not self.config.unit_norm:
            z = z * lengths(self.transcoder)
        return penalty(z, pre, self.transcoder, self.config)

    def revival(self, pre: Tensor, error: Tensor) -> Float[Tensor, ""] | float:
        """What brings dead features back: aux-k for TopK and BatchTopK, nothing for the others."""
        c, dead = self.config, self.dead()
        if c.activation not in ("topk", "batchtopk") or not c.aux or not dead.any():
            return 0.0
        return c.aux * auxiliary(self.transcoder, pre, error, dead)

    @torch.no_grad()
    def update(self) -> None:
        """Update the weights from their gradients."""
        learning = self.adam.param_groups[0]["params"]
        if self.config.clip is not None:
            torch.nn.utils.clip_grad_norm_(learning, self.config.clip)
        self.adam.step()
        self.constrain()

    def constrain(self) -> None:
        """Decoder rows of unit length, so that z measures what is written; thresholds of at least 0; dead features
        pulled up until they fire and have a gradient again (after Conerly et al. 2025)."""
        t, c = self.transcoder, self.config
        if c.unit_norm:
            t.W_dec.flatten(1).div_(lengths(t)[:, None])
        if t.threshold is not None and c.activation == "jumprelu":
            t.threshold.clamp_(min=0)
        if c.dead_bias_lift:
            t.b_enc += c.dead_bias_lift * self.adam.param_groups[0]["lr"] * self.dead()

    def dead(self) -> Bool[Tensor, " d_features"]:
        """Features that have not fired for `TrainConfig.dead_after` tokens."""
        return self.silent >= self.config.dead_after

    def _pair(self, x: Tensor, y: Tensor, config: TrainConfig) -> tuple[Tensor, Tensor]:
        return {"sae_in": (x, x), "sae_out": (y, y)}.get(config.kind, (x, y))

    def scaled(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self._pair(x, y, self.config)
        return (x - self.x_mean).div_(self.x_scale), (y - self.y_mean).div_(self.y_scale)

    @torch.no_grad()
    def finished(self, later: Sequence[Tensor] = ()) -> Transcoder:
        """Fold scaling and row lengths into the weights: the result reads and writes the model's own activations.

        Args:
            later: the scales of the outputs of the later MLPs that it writes to.
        """
        t = self.transcoder
        t.W_dec.view(len(t.b_enc), 1 + len(later), -1).mul_(torch.stack([self.y_scale, *later])[:, None])
        length = self.y_scale.expand(len(t.b_enc)) if t.config.activation == "topk" else lengths(t)  # keeps the order
        for reads in (t.W_enc, t.b_enc) if t.threshold is None else (t.W_enc, t.b_enc, t.threshold):
            reads *= length
        t.W_dec.flatten(1).div_(length[:, None])
        t.W_enc /= self.x_scale
        t.b_enc -= self.x_mean @ t.W_enc
        t.b_dec.copy_(t.b_dec * self.y_scale + self.y_mean)
        if t.W_skip is not None:
            t.W_skip *= self.y_scale / self.x_scale
            t.b_dec -= self.x_mean @ t.W_skip
        return t.eval().requires_grad_(False)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name."""
        tensors = {f"weight.{name}": p.detach() for name, p in self.transcoder.named_parameters()}
        for name, p in self.transcoder.named_parameters():
            tensors |= {f"adam.{name}.{key}": value for key, value in self.adam.state.get(p, {}).items()}
        return tensors | {f"scale.{name}": getattr(self, name) for name in SCALES} | {"silent": self.silent}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for name, p in self.transcoder.named_parameters():
            p.copy_(tensors[f"weight.{name}"])
            prefix = f"adam.{name}."
            state = {k.removeprefix(prefix): v.clone() for k, v in tensors.items() if k.startswith(prefix)}
            if state:
                self.adam.state[p] = {k: v if k == "step" else v.to(p.device, p.dtype) for k, v in state.items()}
        for name in SCALES:
            setattr(self, name, tensors[f"scale.{name}"].to(self.x_mean))
        self.silent = tensors["silent"].to(self.silent)


def lengths(transcoder: Transcoder) -> Float[Tensor, " d_features"]:
    """The lengths of decoder rows, those to several MLPs taken together."""
    return transcoder.W_dec.flatten(1).norm(dim=1)


SCALES = ("x_mean", "y_mean", "x_scale", "y_scale")
