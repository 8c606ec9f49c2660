"""Training of transcoders and SAEs: every architecture, several layers and configurations from one stream.

The names below are what others need first; a new architecture goes into `architectures`, its settings into `config`.
The sparse step is in `tclib.training.fast`.
"""

from tclib.training.cache import ActivationCache, cache_activations
from tclib.training.config import PAPER, TrainConfig
from tclib.training.loop import train, train_side_by_side
from tclib.training.monitor import LiveFigure, TensorBoard

__all__ = [
    "PAPER",
    "ActivationCache",
    "LiveFigure",
    "TensorBoard",
    "TrainConfig",
    "cache_activations",
    "train",
    "train_side_by_side",
]
