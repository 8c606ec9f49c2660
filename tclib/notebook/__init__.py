"""What every notebook uses; the core never imports it."""

from tclib.notebook.declared import declared_parameters
from tclib.notebook.page import figure_defaults, find_headline, headline, one_line, seed_everything, why
from tclib.notebook.parameters import (
    Parameter,
    ParameterError,
    Parameters,
    assigned_literals,
    injected_names,
    parameters,
    unknown_parameter,
)

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
