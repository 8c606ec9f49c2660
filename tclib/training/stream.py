"""The stream of training tokens: all layers from one forward pass, shuffled, the same whenever it is read again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.activations import forward
from tclib.text import text_hash
from tclib.training import distributed
from tclib.training.config import TrainConfig

if TYPE_CHECKING:
    from tclib.training.cache import ActivationCache

Acts = dict[int, tuple[Float[Tensor, "token d_model"], Float[Tensor, "token d_model"]]]
FORWARD_ROWS = {"cpu": 16, "cuda": 256, "mps": 64}  # of one forward pass: constants, since the last bits depend on them


def both(change: Callable[[Any], Tensor], pair: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The same done to inputs and outputs."""
    x, y = pair
    return change(x), change(y)


def forward_rows(model: TransformerBridge) -> int:
    """How many rows one forward pass reads on the model's device."""
    return FORWARD_ROWS[torch.device(str(model.cfg.device)).type]


class ModelSource:
    """Activations computed by the model when they are needed, of rows in any order."""

    def __init__(self, model: TransformerBridge, tokens: Int[Tensor, "row pos"], layers: Sequence[int]):
        self.model, self.tokens, self.layers = model, tokens, list(layers)
        self.n_rows, self.row_length = tokens.shape

    @property
    def text(self) -> str:
        """The hash of the tokens."""
        return text_hash(self.tokens)

    def read(self, rows: Int[np.ndarray, " row"]) -> Acts:
        """Inputs and outputs of the MLPs of every layer, one token per line."""
        tokens = self.tokens[torch.from_numpy(rows)]
        parts = list(forward(self.model, tokens, self.layers, forward_rows(self.model)))
        return {
            layer: both(
                lambda name, at=layer: torch.cat([getattr(p[at], name).flatten(0, 1) for p in parts]), ("x", "y")
            )
            for layer in self.layers
        }


class Stream:
    """Batch ``step`` is a function of (seed, step) alone, so a run that resumes needs no state of the stream.

    A buffer holds the activations of ``batch_rows * buffer`` rows, drawn without replacement; each batch is a random
    ``1 / buffer`` of its tokens, and the buffer is used ``passes`` times before the next one. See `mixing`.

    Raises:
        ValueError: the text does not fill one buffer, or cannot be divided among the processes.
    """

    def __init__(self, source: ModelSource | ActivationCache, config: TrainConfig):
        self.source, self.config = source, config
        self.rows = config.batch_rows * config.buffer
        self.buffers = source.n_rows // self.rows
        self.loaded: tuple[int, Acts] | None = None
        if self.buffers == 0:
            raise ValueError(
                f"the text has {source.n_rows} rows of {source.row_length} tokens, fewer than one buffer "
                f"({config.batch_rows} rows x {config.buffer}): give more text, or lower batch_rows or buffer"
            )
        if config.batch_rows % distributed.world():
            raise ValueError(
                f"batch_rows = {config.batch_rows} cannot be divided among {distributed.world()} processes"
            )

    def sample(self) -> Acts:
        """One buffer of the first rows, from which means, scales and biases are set."""
        return self._read(np.arange(self.rows))

    def batch(self, step: int) -> Acts:
        """This process's share of the batch."""
        c = self.config
        index, place = divmod(step, c.buffer * c.passes)
        if self.loaded is None or self.loaded[0] != index:
            self.loaded = index, self._read(self._buffer_rows(index))
        acts = self.loaded[1]
        if c.buffer == 1:
            return {layer: both(distributed.share, pair) for layer, pair in acts.items()}
        use, part = divmod(place, c.buffer)
        order = np.random.default_rng([c.seed, 1, index, use]).permutation(self.rows * self.source.row_length)
        chosen = torch.from_numpy(distributed.share(order.reshape(c.buffer, -1)[part]))
        return {layer: both(lambda t: t[chosen.to(t.device)], pair) for layer, pair in acts.items()}

    def _buffer_rows(self, index: int) -> Int[np.ndarray, " row"]:
        epoch, place = divmod(index, self.buffers)
        order = np.random.default_rng([self.config.seed, 0, epoch]).permutation(self.source.n_rows)
        return order[place * self.rows : (place + 1) * self.rows]

    def _read(self, rows: Int[np.ndarray, " row"]) -> Acts:
        # Each process computes its share of the rows. Gathering them costs less than one step's gradients, and makes
        # the batches the same for any number of processes.
        acts = self.source.read(distributed.share(rows))
        return {layer: both(distributed.gathered, pair) for layer, pair in acts.items()}


def mixing(config: TrainConfig, row_length: int) -> float:
    """Probability that two tokens of one batch come from the same row of text: 0 would be perfect mixing.

    ``(row_length - 1) / (batch_rows * buffer * row_length - 1)``, since a batch is a uniform draw from its buffer.
    """
    return (row_length - 1) / (config.batch_rows * config.buffer * row_length - 1)
