"""Transcoder circuits: the library behind the notebooks.

Every public name is loaded on first use (PEP 562). Importing `tclib` itself needs only the
standard library, because `python -m tclib` must start on a Python that has nothing installed.
"""

import importlib

__version__ = "0.1.0"

# public name -> module that defines it
_FACE = {
    # notebooks
    "Parameter": "tclib.nb",
    "ParameterError": "tclib.nb",
    "figure_defaults": "tclib.nb",
    "headline": "tclib.nb",
    "parameters": "tclib.nb",
    "seed_everything": "tclib.nb",
    # files
    "data_path": "tclib.io.paths",
    # models and text
    "load_model": "tclib.model",
    "load_text": "tclib.text",
    # transcoders
    "TrainConfig": "tclib.training",
    "ReplacementModel": "tclib.replacement_model",
    "Transcoder": "tclib.transcoder",
    "TranscoderConfig": "tclib.transcoder",
    "evaluate": "tclib.evaluation",
    "load_transcoders": "tclib.checkpoints",
    "save_transcoders": "tclib.checkpoints",
    "train": "tclib.training",
    # attribution and circuits
    "attribute": "tclib.attribution",
    "trace": "tclib.tracing",
}

__all__ = sorted(_FACE)


def __getattr__(name):
    """Load a public name. Raises AttributeError for a name that is not public."""
    if name not in _FACE:
        raise AttributeError("module 'tclib' has no attribute {!r}".format(name))
    value = getattr(importlib.import_module(_FACE[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(_FACE))
