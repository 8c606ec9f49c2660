"""The transcoder: a wide, sparsely active imitation of an MLP.

    z(x)  = activation(x W_enc + b_enc)         z in R^d_features
    TC(x) = z(x) W_dec + b_dec  [+ x W_skip]

(paper, section 3.1). A sparse autoencoder is the same object with ``hook_in == hook_out``.

The features of a cross-layer transcoder (Ameisen et al. 2025) read one MLP's input and write to that and later MLPs'
outputs, with decoder rows of their own for each. It is a set with one `Transcoder` for each layer that it reads at,
which only together imitate an MLP (see `imitation`):

    y_l  =  sum_{k <= l}  z_k W_dec[k -> l]  +  b_dec_l
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from tclib import onednn_matmul
from tclib.io import safe_files

Activation = Literal["relu", "topk", "batchtopk", "jumprelu"]
ROUNDED = {"W_enc": 1, "W_dec": 0}  # in int8 files, and which of their dimensions counts the features


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
    n_writes: PositiveInt | None = None  # cross-layer: how many MLPs are written to, from the one that is read on
    model_name: str = "bundled"
    training: dict = {}

    @model_validator(mode="after")
    def _k_fits(self) -> TranscoderConfig:
        if self.activation == "topk" and self.k is None:
            raise ValueError("a topk transcoder needs k")
        if self.k is not None and self.k > self.d_features:
            raise ValueError(f"k = {self.k} is more than the {self.d_features} features")
        if self.n_writes is not None and self.hook_in == self.hook_out:
            raise ValueError("an SAE writes where it reads, so it has no n_writes")
        return self


class Transcoder(nn.Module):
    """Encoder, decoder and optional affine skip of one layer.

    Some kinds alone have ``W_skip`` and ``threshold`` (jumprelu; batchtopk uses one value for all, fixed after
    training). ``W_dec`` is ``[d_features, n_writes, d_out]`` in a cross-layer transcoder.
    """

    W_enc: Float[Tensor, "d_in d_features"]
    b_enc: Float[Tensor, " d_features"]
    W_dec: Float[Tensor, "d_features *n_writes d_out"]
    b_dec: Float[Tensor, " d_out"]
    W_skip: Float[Tensor, "d_in d_out"] | None
    threshold: Float[Tensor, " d_features"] | None

    def __init__(self, config: TranscoderConfig):
        super().__init__()
        self.config, shapes = config, expected_shapes(config)
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "threshold"):
            self.register_parameter(name, nn.Parameter(torch.zeros(shapes[name])) if name in shapes else None)

    @property
    def reach(self) -> int:
        """How many MLPs the features write to, from the one that they read on: 1 unless they are cross-layer."""
        return self.config.n_writes or 1

    def rows(self, later: int = 0) -> Float[Tensor, "d_features d_out"]:
        """The decoder rows for the MLP so many layers after the one that is read."""
        return self.W_dec if self.config.n_writes is None else self.W_dec[:, later]

    def written(self, within: int | None = None) -> Float[Tensor, "d_features d_out"]:
        """What a feature writes in all, per unit of activation, or to the first ``within`` MLPs alone."""
        return self.W_dec if self.config.n_writes is None else self.W_dec[:, :within].sum(1)

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_features"]:
        """``x W_enc + b_enc``.

        Raises:
            ValueError: an input of another width.
        """
        if x.shape[-1] != self.config.d_in:
            raise ValueError(f"the input has width {x.shape[-1]}, but this transcoder reads {self.config.d_in}")
        return onednn_matmul.product(x, self.W_enc) + self.b_enc

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_features"]:
        """Feature activations z, all >= 0 (equation 1; TopK: Gao et al. 2024; JumpReLU: Rajamanoharan et al. 2024).

        Raises:
            ValueError: an input of another width or precision.
        """
        if x.dtype != self.W_enc.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"the input is in {x.dtype}, but this transcoder is in {self.W_enc.dtype}: convert one, for example by "
                f"load_transcoders(..., dtype={x.dtype})"
            )
        return self.activate(self.pre_activations(x))

    def activate(self, pre: Float[Tensor, "*batch d_features"]) -> Float[Tensor, "*batch d_features"]:
        """The nonlinearity alone: which pre-activations become activations."""
        z = torch.relu(pre)
        if self.config.activation == "topk":
            values, index = z.topk(self.config.k or 0, dim=-1)
            return torch.zeros_like(z).scatter(-1, index, values)
        if self.threshold is not None:
            return z * (pre > self.threshold)
        return z

    def decode(
        self, z: Float[Tensor, "*batch d_features"], x: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """The output that activations z stand for; a skip transcoder needs its input x as well.

        Raises:
            ValueError: a skip transcoder without x; a cross-layer one, whose layers decode together (`imitation`).
        """
        if self.config.n_writes is not None:
            raise ValueError(
                "the layers of a cross-layer transcoder imitate an MLP together: call "
                "tclib.transcoder.imitation(transcoders, layer, z, x)"
            )
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
        """Write ``stem.safetensors`` and ``stem.json``; each file appears whole or not at all.

        With ``torch.int8``, W_enc and W_dec are rounded to 255 levels between plus and minus the largest weight of each
        feature, and the rest is kept in float16.

        Weights never stand beside a missing configuration or that of other weights, wherever saving is interrupted.
        """
        files = _files(stem)
        files[0].parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu() for name, t in self.state_dict().items()}
        of_int8 = ROUNDED if dtype == torch.int8 else {}
        rounded = {name: _rounded(tensors.pop(name), counts) for name, counts in of_int8.items()}
        dtype = torch.float16 if of_int8 else dtype
        tensors = {name: t.to(dtype).contiguous() for name, t in tensors.items()}
        for name, (levels, scale) in rounded.items():
            tensors |= {name: levels, f"{name}.scale": scale}
        parts = [file.with_name(file.name + ".part") for file in files]
        try:
            save_file(tensors, parts[0])
            parts[1].write_text(self.config.model_dump_json(indent=2) + "\n", encoding="utf-8")
            files[0].unlink(missing_ok=True)
            parts[1].replace(files[1])
            parts[0].replace(files[0])
        finally:
            for part in parts:
                part.unlink(missing_ok=True)

    @classmethod
    def load(cls, stem: str | Path, device: str | torch.device = "cpu") -> Transcoder:
        """Read what `save` wrote, in float32.

        Raises:
            ValueError: a file is missing or corrupt, or the tensors do not fit the configuration (they are named).
        """
        return cls.of(*read_weights(_files(stem)[0]), device, torch.float32)

    @classmethod
    def of(
        cls, config: TranscoderConfig, tensors: Mapping[str, Tensor], device: str | torch.device, dtype: torch.dtype
    ) -> Transcoder:
        """A transcoder around these tensors, which are copied only where device or dtype differ."""
        with torch.device("meta"):
            transcoder = cls(config)
        moved = {name: t.to(device=device, dtype=dtype) for name, t in tensors.items()}
        transcoder.load_state_dict(moved, assign=True)
        return transcoder.eval().requires_grad_(False)


def writers(transcoders: Mapping[int, Transcoder], layer: int) -> dict[int, Float[Tensor, "d_features d_out"]]:
    """Whose features write to one MLP's output, by layer, and with which decoder rows: those of that layer, and in a
    cross-layer transcoder those of earlier ones."""
    return {at: t.rows(layer - at) for at, t in transcoders.items() if at <= layer < at + t.reach}


def imitation(
    transcoders: Mapping[int, Transcoder],
    layer: int,
    z: Mapping[int, Float[Tensor, "*batch d_features"]],
    x: Float[Tensor, "*batch d_in"],
) -> Float[Tensor, "*batch d_out"]:
    """What a set of transcoders puts in place of an MLP's output, from the activations z of all its layers.

    Args:
        x: the input of that MLP, for a skip path.
    """
    own = transcoders[layer]
    out = own.b_dec if own.W_skip is None else own.b_dec + x @ own.W_skip
    for at, rows in writers(transcoders, layer).items():
        out = out + z[at] @ rows
    return out


def is_cross_layer(transcoders: Mapping[int, Transcoder]) -> bool:
    """Whether features write to the outputs of other MLPs than their own; refuses a set with layers missing.

    Raises:
        ValueError: features write to an MLP of which the set has no transcoder, or only some layers are cross-layer.
    """
    cross = {at: t.reach for at, t in transcoders.items() if t.config.n_writes is not None}
    for at, reach in cross.items():
        for layer in range(at, at + reach):
            if layer not in cross:
                raise ValueError(
                    f"the cross-layer transcoder of layer {at} writes to layers {at} to {at + reach - 1}, and the set "
                    f"has no part for layer {layer}: give all of them"
                )
    if cross and len(cross) < len(transcoders):
        single = sorted(transcoders.keys() - cross.keys())
        raise ValueError(f"layer {single[0]} has a transcoder of its own beside a cross-layer one: give one kind")
    return bool(cross)


def expected_shapes(config: TranscoderConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a transcoder's tensors, without making one."""
    c = config
    W_dec = (c.d_features, c.d_out) if c.n_writes is None else (c.d_features, c.n_writes, c.d_out)
    shapes = {"W_enc": (c.d_in, c.d_features), "b_enc": (c.d_features,), "W_dec": W_dec}
    shapes |= {"b_dec": (c.d_out,)} | ({"W_skip": (c.d_in, c.d_out)} if c.skip else {})
    return shapes | ({"threshold": (c.d_features,)} if c.activation in ("jumprelu", "batchtopk") else {})


def read_config(weights: Path) -> TranscoderConfig:
    """The configuration beside a file of weights, once the sizes in the file's header have been found to fit it."""
    config = safe_files.parsed(weights, TranscoderConfig, safe_files.read_json(_files(weights)[1]))
    found = safe_files.safetensors_shapes(weights)
    scales = {f"{name}.scale": (config.d_features,) for name in ROUNDED}
    safe_files.check_shapes(weights, found, expected_shapes(config) | (scales if scales.keys() & found.keys() else {}))
    return config


def read_weights(weights: Path) -> tuple[TranscoderConfig, dict[str, Tensor]]:
    """What `Transcoder.save` wrote: views of the file, or float32 where the file holds rounded weights."""
    config = read_config(weights)
    tensors = safe_files.read_safetensors(weights, {name: name for name in safe_files.safetensors_shapes(weights)})
    for name, counts in ROUNDED.items():
        if (scale := tensors.pop(f"{name}.scale", None)) is not None:
            shape = [-1 if dim == counts else 1 for dim in range(tensors[name].ndim)]
            tensors[name] = tensors[name].float() * scale.float().view(shape)
    return config, tensors


def _rounded(W: Tensor, counts: int) -> tuple[Tensor, Tensor]:
    others = [dim for dim in range(W.ndim) if dim != counts]
    scale = W.abs().amax(others, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (W / scale).round().to(torch.int8), scale.flatten()


def _files(stem: str | Path) -> tuple[Path, Path]:
    """The files of weights and configuration. A dot belongs to the name: "l1_0.5" does not end in a suffix ".5"."""
    stem = Path(stem)
    name = stem.name.removesuffix(".safetensors")
    return stem.with_name(f"{name}.safetensors"), stem.with_name(f"{name}.json")
