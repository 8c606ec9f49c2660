"""Every feature at once: where each fired and how strongly, from one pass over a text, read in under a millisecond.

The names below build and open an index, and read one feature of it, `FeatureActivations`. Import modules for more:
`search`, `connect` (a feature's connections), `dashboard` and `dashboard_figure` (all about one feature). `naming`
gives features names that a person can say, without an index.
"""

from tclib.features.build import build_index, merge
from tclib.features.cost import Plan, plan
from tclib.features.feature_activations import FeatureActivations
from tclib.features.index import Index, NeverFired, fingerprint
from tclib.features.summary import Summary, load_summary, save_summary, summarise

__all__ = [
    "FeatureActivations",
    "Index",
    "NeverFired",
    "Plan",
    "Summary",
    "build_index",
    "fingerprint",
    "load_summary",
    "merge",
    "plan",
    "save_summary",
    "summarise",
]
