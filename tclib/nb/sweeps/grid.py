"""Which runs a sweep consists of: a grid, checked against what the notebook declares before anything runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from tclib.nb import Parameter, unknown_parameter

Grid = Mapping[str, Sequence[Any]]  # parameter -> its values; a run for each combination
NAME_LENGTH = 12

# What `make sweep` runs: three architectures at four settings of their sparsity each, one layer, one seed.
SMALL: list[dict[str, Any]] = [
    {"activation": ["relu"], "l1_coefficient": [0.005, 0.02, 0.06, 0.15]},
    {"activation": ["topk"], "k": [4, 8, 16, 48]},
    {"activation": ["topk"], "skip": [True], "k": [4, 8, 16, 48]},
]


def expand(grid: Grid | Sequence[Grid], declared: Mapping[str, Parameter]) -> list[dict[str, Any]]:
    """The parameters of every run, those that the grid leaves out at their defaults; each run once.

    Args:
        grid: one grid, or several that are joined (topk needs ``k``, relu ``l1_coefficient``: give each its own).
        declared: what the notebook accepts, see `tclib.nb.declared_parameters`.

    Raises:
        ValueError: an unknown parameter, a value that the notebook would refuse, or an axis without values.
    """
    grids = [grid] if isinstance(grid, Mapping) else list(grid)
    if not grids:
        raise ValueError("the grid is empty: give at least one parameter with its values")
    runs = {}
    for one in grids:
        axes = {name: _axis(name, values, declared) for name, values in one.items()}
        for values in product(*axes.values()):
            parameters = {name: parameter.default for name, parameter in declared.items()}
            parameters |= dict(zip(axes, values, strict=True))
            runs[run_name(parameters)] = parameters
    return list(runs.values())


def _axis(name: str, values: Sequence[Any], declared: Mapping[str, Parameter]) -> list[Any]:
    if name not in declared:
        raise ValueError(unknown_parameter(name, declared))
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"{name} = {values!r} is not an axis: give a list of one value or more")
    return [declared[name].check(name, value) for value in values]


def run_name(parameters: Mapping[str, Any]) -> str:
    """The name of a run's directory: a hash of its parameters, whatever their order."""
    text = json.dumps(parameters, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:NAME_LENGTH]


def code_hash(notebook: Mapping[str, Any]) -> str:
    """A fingerprint of what a notebook does: its code cells. Prose and outputs may change."""
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()[:NAME_LENGTH]
