"""Circuits walked by hand: thin ipywidgets shells around pure functions, for a notebook or for Voila.

Everything an explorer shows is a function that a notebook can call without it.
"""

from tclib.explorers.browser import Browser
from tclib.explorers.editor import Editor
from tclib.explorers.lab import Lab
from tclib.explorers.microscope import Microscope
from tclib.explorers.selected import Selected
from tclib.explorers.walker import Walker
from tclib.explorers.weights import Weights

__all__ = ["Browser", "Editor", "Lab", "Microscope", "Selected", "Walker", "Weights"]
