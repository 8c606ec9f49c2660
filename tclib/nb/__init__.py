"""What a notebook uses to be a notebook: strict parameters, findings, figure style, a headline.

The names below are all of it. Sweeps of a notebook over a grid are in `tclib.nb.sweeps`, exercises, student copies and
reports in `tclib.nb.teaching`.
"""

from tclib.nb.parameters import (
    Parameter,
    ParameterError,
    Parameters,
    assigned_literals,
    declared_parameters,
    injected_names,
    parameters,
    unknown_parameter,
)
from tclib.nb.style import figure_defaults, find_headline, headline, one_line, seed_everything, why

__all__ = [
    "Parameter",
    "ParameterError",
    "Parameters",
    "assigned_literals",
    "declared_parameters",
    "figure_defaults",
    "find_headline",
    "headline",
    "injected_names",
    "one_line",
    "parameters",
    "seed_everything",
    "unknown_parameter",
    "why",
]
