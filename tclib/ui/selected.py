"""One feature that all explorers share: chosen in one, its card opens in the others."""

from __future__ import annotations

import ipywidgets as w
import torch
import traitlets

from tclib.inputs import bos_id
from tclib.replacement_model import ReplacementModel, joined
from tclib.tracing import trace
from tclib.ui.browser import card


class Selected(traitlets.HasTraits):
    """Give the same one to several explorers. ``feature`` is (layer, feature), or None before anything is chosen."""

    feature = traitlets.Tuple(traitlets.Int(), traitlets.Int(), default_value=None, allow_none=True)

    summary, index = traitlets.Any(), traitlets.Any()  # of a `Browser`; without one, the card tells of weights alone

    def __init__(self, replacement: ReplacementModel):
        super().__init__()
        self._traced = trace(replacement, torch.tensor([bos_id(joined(replacement).model) or 0]))
        self.card = w.HTML()

    def choose(self, layer: int, feature: int) -> None:
        """Open the card of a feature, here and in every explorer.

        Raises:
            ValueError: no such feature.
        """
        self.card.value = card(self._traced, self.summary, layer, feature, self.index)
        self.feature = (layer, feature)
