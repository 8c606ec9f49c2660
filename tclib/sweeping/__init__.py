"""Sweeps: one notebook over a grid of parameters, on this machine or on a cluster, with results that survive."""

from tclib.sweeping.grid import SMALL, Grid, expand, run_name
from tclib.sweeping.results import Point, Results, Run, load_results, save_results, table
from tclib.sweeping.shards import build_index_sharded
from tclib.sweeping.sweep import NOTEBOOK, sweep

__all__ = [
    "NOTEBOOK",
    "SMALL",
    "Grid",
    "Point",
    "Results",
    "Run",
    "build_index_sharded",
    "expand",
    "load_results",
    "run_name",
    "save_results",
    "sweep",
    "table",
]
