"""Sphinx's settings for `make docs`: the committed notebooks and the pages of docs/, as a website without scripts from
elsewhere. Sphinx and MyST-NB, because Jupyter Book 2 needs Node.js."""

from __future__ import annotations

import json

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

project = html_title = "Transcoder Circuits"
extensions = ["myst_nb"]
root_doc = "docs/index"
# The repository itself is the source, so the links of its pages are those of the site.
include_patterns = ["notebooks/*.ipynb", "docs/*.md", "*.md", "benchmarks/README.md"]
exclude_patterns = [".*", "build", "runs", "checkpoints", "data", "tclib", "tests", "**/.ipynb_checkpoints"]
nb_execution_mode = "off"  # what is shown is what was committed
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]  # a level that is left out; a widget's output
html_theme = "furo"
html_copy_source = False
html_math_renderer = "mathml"  # which browsers know by themselves


def setup(app) -> None:
    """Add the renderer of formulas, and fold what JupyterLab folds."""
    app.add_html_math_renderer("mathml", (_written("inline"), None), (_written("block"), None))
    app.connect("source-read", _folded)


def _folded(app, page: str, source: list[str]) -> None:
    if not page.startswith("notebooks/"):
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        if cell["metadata"].get("jupyter", {}).get("source_hidden"):
            cell["metadata"].setdefault("tags", []).append("hide-input")
    source[0] = json.dumps(notebook)


def _written(display: str):
    def visit(translator, node) -> None:
        translator.body.append(convert(node.astext(), display=display))
        raise SkipNode

    return visit
