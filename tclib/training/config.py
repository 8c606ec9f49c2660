"""What decides a training run. Saved inside the configuration of the transcoder that it makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from tclib.transcoder import Activation

Kind = Literal["transcoder", "sae_in", "sae_out", "cross_layer"]
STREAM = ("steps", "batch_rows", "buffer", "passes", "seed")  # what training runs side by side share

OLDER = {  # names in older files
    "l1": "l1_coefficient",
    "l0": "l0_coefficient",
    "rows": "batch_rows",
    "ramp": "sparsity_warmup",
    "pull": "dead_bias_lift",
}


def with_new_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run, under their names of today."""
    return {OLDER.get(name, name): value for name, value in settings.items()}


class TrainConfig(BaseModel):
    """How to train. Inputs and targets are scaled to unit variance, so one sparsity coefficient suits all layers.

    The loss is ``||y - TC(x)||^2 + penalty``, with the penalty of the architecture:

    * ``relu``: ``l1_coefficient * ||z||_1`` (Dunefsky et al. 2024, equation 2)
    * ``topk``: none; the ``k`` largest activations of each token are kept (Gao et al. 2024)
    * ``batchtopk``: none; the ``k * tokens`` largest of the whole batch are kept (Bussmann et al. 2024)
    * ``jumprelu``: ``l0_coefficient * ||z||_0`` (Rajamanoharan et al. 2024)

    With ``skip`` the transcoder also has an affine path past the features (Paulo et al. 2025). Of the kind
    ``cross_layer`` the layers are trained together, on the sum of their losses: each feature writes to the MLP that it
    reads and to all later ones (Ameisen et al. 2025), and pays its penalty once.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind = "transcoder"
    d_features: PositiveInt = 4096
    activation: Activation = "relu"
    k: PositiveInt | None = None  # active features per token (topk), or on average (batchtopk)
    skip: bool = False
    l1_coefficient: NonNegativeFloat = 0.02  # relu: lambda_1 of the paper, in units of the target's standard deviation
    l0_coefficient: NonNegativeFloat = 0.002  # jumprelu: cost of an active feature, as a share of the target's variance
    bandwidth: PositiveFloat = 0.03  # jumprelu: width of the window in which thresholds get a gradient

    steps: PositiveInt = 1000
    batch_rows: PositiveInt = 16  # rows of text per step
    buffer: PositiveInt = 1  # batches whose tokens are shuffled together
    passes: PositiveInt = 1  # how often the tokens of a buffer are used
    lr: PositiveFloat = 1e-3
    warmup: float = Field(default=0.05, ge=0, le=1)  # fraction of the steps over which lr rises
    decay: float = Field(default=0.3, ge=0, le=1)  # fraction of the steps, at the end, over which lr falls to 0
    sparsity_warmup: float = Field(default=0.5, ge=0, le=1)  # fraction of the steps over which the coefficient rises
    clip: PositiveFloat | None = None  # largest norm of a gradient
    tied: bool = False  # start with encoder columns along decoder rows
    start_l0: PositiveFloat | None = None  # start the biases so low that about this many features fire
    unit_norm: bool = True  # keep decoder rows at length 1; if not, relu charges z times the length of its row
    dead_bias_lift: NonNegativeFloat = 0.0  # relu, jumprelu: how fast biases of dead features rise, in lr per step
    aux: NonNegativeFloat = 1 / 32  # topk, batchtopk: weight of the error explained by dead features
    dead_after: PositiveInt = 200_000  # tokens without firing after which a feature counts as dead
    sparse_from: PositiveInt = 1024  # features from which inactive ones are skipped (on processors, in full precision)
    sparse_below: float = Field(default=0.2, ge=0, le=1)  # ... after a step with a smaller share of active ones
    screen_below: float = Field(default=0.03, ge=0, le=1)  # ... and below this, candidates come from a rounded product
    bfloat16: bool = False  # matrix products in bfloat16: about twice as fast on processors that have it
    seed: NonNegativeInt = 0

    @model_validator(mode="before")
    @classmethod
    def _older_names(cls, given: Any) -> Any:
        return with_new_names(given) if isinstance(given, Mapping) else given

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other values; older names are taken here too."""
        return super().model_copy(update=with_new_names(update or {}), deep=deep)

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        if self.activation in ("topk", "batchtopk"):
            if self.k is None:
                raise ValueError(f"a {self.activation} transcoder needs k, the number of active features per token")
            if self.k > self.d_features:
                raise ValueError(f"k = {self.k} is more than the {self.d_features} features")
            if not self.unit_norm:
                raise ValueError(f"{self.activation} compares activations, so it needs decoder rows of unit length")
        if self.skip and self.kind.startswith("sae"):
            raise ValueError("an SAE with a skip path would copy its input: use skip with kind='transcoder' only")
        return self


# The paper's settings for GPT2-small: 60M tokens in batches of 4096, 5000 steps of warm-up. Its lambda_1 = 1.4e-4
# stands before a loss that is a mean over d_model = 768 coordinates; ours is a sum, so the coefficient is 768 times
# that. The public code's ghost gradients aim at the wrong target and are left out.
PAPER = TrainConfig(
    d_features=24_576, l1_coefficient=1.4e-4 * 768, lr=4e-4, batch_rows=32, steps=14_648, warmup=5_000 / 14_648,
    decay=0, sparsity_warmup=0, buffer=8,
)  # fmt: skip
