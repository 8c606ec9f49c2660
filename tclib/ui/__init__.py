"""Everything that draws for a browser: explorers, pages, circuitsvis views and the blind game.

The explorers below are thin ipywidgets shells around pure functions of their modules, and `Selected` is the one feature
that they share. Pages without scripts are in `dashboard_page`, circuitsvis in `circuitsvis_views`, the blind game in
`blind_game`.
"""

from tclib.ui.browser import Browser
from tclib.ui.editor import Editor
from tclib.ui.lab import Lab
from tclib.ui.microscope import Microscope
from tclib.ui.selected import Selected
from tclib.ui.walker import Walker
from tclib.ui.weights import Weights

__all__ = ["Browser", "Editor", "Lab", "Microscope", "Selected", "Walker", "Weights"]
