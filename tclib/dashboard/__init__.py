"""A feature on one page: what it fires on, what drives it, what it does; static first, interactive on top."""

from tclib.dashboard.contents import Dashboard, collect, neuronpedia
from tclib.dashboard.figure import figure
from tclib.dashboard.interactive import attention_heads, bundle, coloured_tokens
from tclib.dashboard.page import dashboard_html, export, layer_html, save_dashboard

__all__ = [
    "Dashboard",
    "attention_heads",
    "bundle",
    "collect",
    "coloured_tokens",
    "dashboard_html",
    "export",
    "figure",
    "layer_html",
    "neuronpedia",
    "save_dashboard",
]
