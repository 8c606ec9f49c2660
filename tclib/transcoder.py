"""The transcoder: a wide, sparsely active imitation of an MLP.

    z(x)  = activation(x W_enc + b_enc)         z in R^d_features
    TC(x) = z(x) W_dec + b_dec  [+ x W_skip]

(paper, section 3.1). A sparse autoencoder is the same object with ``hook_in == hook_out``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tclib import thin
from tclib.model import pick_device
from tclib.paths import data_path

Activation = Literal["relu", "topk", "batchtopk", "jumprelu"]


class TranscoderConfig(BaseModel):
    """What the weights alone do not say. Saved beside them as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    d_in: PositiveInt
    d_out: PositiveInt
    d_features: PositiveInt
    hook_in: str
    hook_out: str
    activation: Activation = "relu"
    k: PositiveInt | None = None
    skip: bool = False
    model_name: str = "bundled"
    training: dict = {}

    @model_validator(mode="after")
    def _k_fits(self) -> TranscoderConfig:
        if self.activation == "topk" and self.k is None:
            raise ValueError("a topk transcoder needs k")
        if self.k is not None and self.k > self.d_features:
            raise ValueError(f"k = {self.k} is more than the {self.d_features} features")
        return self


class Transcoder(nn.Module):
    """Encoder, decoder and optional affine skip of one layer; weights in float32.

    ``W_enc [d_in, d_features]``, ``b_enc [d_features]``, ``W_dec [d_features, d_out]``, ``b_dec [d_out]``,
    and where the kind has them ``W_skip [d_in, d_out]`` and ``threshold [d_features]`` (jumprelu; batchtopk uses one
    value for all, fixed after training).
    """

    def __init__(self, config: TranscoderConfig):
        super().__init__()
        self.config = config
        c = config
        self.W_enc = nn.Parameter(torch.zeros(c.d_in, c.d_features))
        self.b_enc = nn.Parameter(torch.zeros(c.d_features))
        self.W_dec = nn.Parameter(torch.zeros(c.d_features, c.d_out))
        self.b_dec = nn.Parameter(torch.zeros(c.d_out))
        self.W_skip = nn.Parameter(torch.zeros(c.d_in, c.d_out)) if c.skip else None
        has_threshold = c.activation in ("jumprelu", "batchtopk")
        self.threshold = nn.Parameter(torch.zeros(c.d_features)) if has_threshold else None

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_features"]:
        """``x W_enc + b_enc``."""
        if x.shape[-1] != self.config.d_in:
            raise ValueError(f"the input has width {x.shape[-1]}, but this transcoder reads {self.config.d_in}")
        return thin.product(x, self.W_enc) + self.b_enc

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_features"]:
        """Feature activations z, all >= 0 (equation 1; TopK: Gao et al. 2024; JumpReLU: Rajamanoharan et al. 2024)."""
        return self.activate(self.pre_activations(x))

    def activate(self, pre: Float[Tensor, "*batch d_features"]) -> Float[Tensor, "*batch d_features"]:
        """The nonlinearity alone: which pre-activations become activations."""
        z = torch.relu(pre)
        if self.config.activation == "topk":
            values, index = z.topk(self.config.k, dim=-1)
            return torch.zeros_like(z).scatter(-1, index, values)
        if self.threshold is not None:
            return z * (pre > self.threshold)
        return z

    def decode(
        self, z: Float[Tensor, "*batch d_features"], x: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """The output that activations z stand for; a skip transcoder needs its input x as well."""
        out = z @ self.W_dec + self.b_dec
        if self.W_skip is None:
            return out
        if x is None:
            raise ValueError("a skip transcoder decodes z together with its input: call decode(z, x)")
        return out + x @ self.W_skip

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The imitation TC(x) of the MLP's output."""
        return self.decode(self.encode(x), x)

    @torch.no_grad()
    def save(self, stem: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write ``stem.safetensors`` and ``stem.json``; each file appears whole or not at all."""
        stem = Path(stem)
        stem.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().to(dtype).contiguous().cpu() for name, t in self.state_dict().items()}
        part = stem.with_suffix(".part")
        save_file(tensors, part)
        part.replace(stem.with_suffix(".safetensors"))
        part.write_text(self.config.model_dump_json(indent=2) + "\n")
        part.replace(stem.with_suffix(".json"))

    @classmethod
    def load(cls, stem: str | Path, device: str | torch.device = "cpu") -> Transcoder:
        """Read what `save` wrote.

        Raises:
            ValueError: a file is missing or corrupt, or the tensors do not fit the configuration (they are named).
        """
        stem = Path(stem)
        try:
            config = TranscoderConfig(**json.loads(stem.with_suffix(".json").read_text()))
            tensors = load_file(stem.with_suffix(".safetensors"))
        except FileNotFoundError as error:
            raise ValueError(f"no transcoder at {stem}: {Path(error.filename).name} is missing") from None
        except (json.JSONDecodeError, TypeError, ValidationError, SafetensorError) as error:
            raise ValueError(f"the transcoder at {stem} is damaged: {str(error).splitlines()[0]}") from error
        transcoder = cls(config)
        expected = {name: tuple(t.shape) for name, t in transcoder.state_dict().items()}
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        if found != expected:
            wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
            raise ValueError(
                f"the transcoder at {stem} does not fit its configuration: "
                + ", ".join(f"{n} is {found.get(n)}, not {expected.get(n)}" for n in wrong)
            )
        transcoder.load_state_dict({name: t.float() for name, t in tensors.items()})
        return transcoder.to(device).eval().requires_grad_(False)


def load_transcoders(where: str | Path = "bundled", device: str | torch.device | None = None) -> dict[int, Transcoder]:
    """All transcoders of a folder of ``layer_0.safetensors`` + ``layer_0.json``, ..., by layer.

    Args:
        where: ``"bundled"`` or a folder.
        device: the best one present by default, as for `tclib.model.load_model`.

    Raises:
        ValueError: the folder holds none, or one is damaged.
    """
    folder = data_path("transcoders") if where == "bundled" else Path(where)
    stems = {int(p.stem.removeprefix("layer_")): p.with_suffix("") for p in folder.glob("layer_*.safetensors")}
    if not stems:
        raise ValueError(f"no transcoders in {folder}: expected layer_0.safetensors, layer_1.safetensors, ...")
    place = device if isinstance(device, torch.device) else pick_device(device)
    return {layer: Transcoder.load(stems[layer], place) for layer in sorted(stems)}
