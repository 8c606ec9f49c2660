"""Sweeps: one notebook over a grid of parameters, on this machine or on a cluster, with results that survive.

The names below are what others need first. Modules: `grid`, `run_sweep`, `execute`, `cluster`, `results`,
`sweep_report`.
"""

from tclib.nb.sweeps.grid import SMALL, Grid, expand, run_name
from tclib.nb.sweeps.results import Point, Results, Run, load_results, save_results, table
from tclib.nb.sweeps.run_sweep import NOTEBOOK, sweep

__all__ = [
    "NOTEBOOK",
    "SMALL",
    "Grid",
    "Point",
    "Results",
    "Run",
    "expand",
    "load_results",
    "run_name",
    "save_results",
    "sweep",
    "table",
]
