"""Everybody's checkpoints: read and written without running anything that is in them."""

from tclib.formats.fit import check_fit
from tclib.formats.graph_json import neuronpedia_url, save_graph_json
from tclib.formats.load import load_frequencies, load_transcoders, memory_plan
from tclib.formats.write import save_transcoders

__all__ = [
    "check_fit",
    "load_frequencies",
    "load_transcoders",
    "memory_plan",
    "neuronpedia_url",
    "save_graph_json",
    "save_transcoders",
]
