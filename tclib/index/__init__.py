"""Every feature at once: where each fired and how strongly, from one pass over a text, read in under a millisecond."""

from tclib.index.build import build_index, merge
from tclib.index.predict import Plan, plan
from tclib.index.store import Index, NeverFired, fingerprint
from tclib.index.summary import Summary, load_summary, save_summary, summarise

__all__ = [
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
