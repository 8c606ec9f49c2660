"""Transcoders' checkpoints read from seven formats and written in four, without running anything that is in them.

The functions below are what others need first; `detect` knows the formats by their files' names, `readers` and
`clt_reader` have one function for each, `lazy` leaves large layers in their files, `save` writes and `fit` checks that
they suit a model.
"""

from tclib.checkpoints.fit import check_fit
from tclib.checkpoints.load import load_transcoders, memory_plan
from tclib.checkpoints.save import save_transcoders

__all__ = [
    "check_fit",
    "load_transcoders",
    "memory_plan",
    "save_transcoders",
]
