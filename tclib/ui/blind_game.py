"""Shells around the game and the rating sheet, for a browser. Everything they do can be done without them.

They only `observe`: nothing here is lost in a callback, and setting ``.value`` from a test or a cell does the same as
a hand on the screen.
"""

from __future__ import annotations

import html
from pathlib import Path

import ipywidgets
import numpy as np
from jaxtyping import Float

from tclib.blind.rating import COLUMNS, NOT_RATED, RATINGS, Item, blank, read_ratings, write_ratings
from tclib.blind.rules import GRAMMAR, Words, parse
from tclib.blind.sealed import Seal, SealedError
from tclib.ui.base import Explorer


class Game:
    """One sealed feature: read its circuit, write a rule, then break the seal. ``box`` can be put anywhere."""

    _repr_mimebundle_ = Explorer._repr_mimebundle_

    def __init__(self, seal: Seal, text: Words, activations: Float[np.ndarray, "row pos"], player: str = "you"):
        """Args:
        text, activations: on which rules are scored; other text than the seal's examples.
        """
        self.name, self.seal, self.player = f"game of {seal.name}", seal, player
        self._text, self._activations = text, activations
        circuit = seal.readings(top=8).to_html()
        self.rule = ipywidgets.Text(placeholder=GRAMMAR, layout={"width": "44em"}, continuous_update=False)
        self.reveal = ipywidgets.ToggleButton(description="break the seal")
        self.message = ipywidgets.HTML()
        self.scores = ipywidgets.HTML()
        self.text = ipywidgets.HTML()
        head = ipywidgets.HTML(f"<b>{seal.name}</b> writes {html.escape(' '.join(map(repr, seal.writes())))}{circuit}")
        self.box = ipywidgets.VBox([head, self.rule, self.message, self.scores, self.reveal, self.text])
        self.rule.observe(self._commit, names="value")
        self.reveal.observe(self._break, names="value")

    def _commit(self, change: dict) -> None:
        if not change["new"].strip():
            return
        try:
            rule = parse(change["new"])
            rule.hits(self._text)
        except ValueError as error:
            self.message.value = html.escape(str(error))
            return
        self.seal.commit(rule, by=self.player)
        self.message.value = ""
        self.scores.value = self.seal.scores(self._text, self._activations).round(3).to_html(index=False)

    def _break(self, change: dict) -> None:
        if not change["new"]:
            return
        try:
            self.text.value = self.seal.reveal()
        except SealedError as error:
            self.message.value = html.escape(str(error))
            self.reveal.value = False


class Rating:
    """The rating sheet of one person: every choice is written to a CSV file at once, and found there again."""

    _repr_mimebundle_ = Explorer._repr_mimebundle_

    def __init__(self, items: list[Item], path: str | Path, rater: str):
        """Raises:
        ValueError: the file is the sheet of another deck or another rater.
        """
        self.name, self.items, self.path = f"rating of {len(items)} items", items, Path(path)
        self.sheet = blank(items, rater)
        if self.path.exists():
            found = read_ratings(self.path)
            if not found[COLUMNS[:2]].equals(self.sheet[COLUMNS[:2]]):
                raise ValueError(f"{self.path} holds other items or another rater's ratings: choose another file")
            self.sheet = found
        self.number = ipywidgets.IntSlider(1, 1, len(items), description="item")
        self.text = ipywidgets.HTML()
        self.rating = ipywidgets.ToggleButtons(options=[NOT_RATED, *RATINGS])
        self.context_free = ipywidgets.ToggleButtons(options=[NOT_RATED, "yes", "no"], description="context-free")
        self.done = ipywidgets.HTML()
        self.box = ipywidgets.VBox([self.number, self.text, self.rating, self.context_free, self.done])
        self._show({"new": 1})
        self.number.observe(self._show, names="value")
        self.rating.observe(self._keep, names="value")
        self.context_free.observe(self._keep, names="value")

    def _show(self, change: dict) -> None:
        row = self.sheet.iloc[change["new"] - 1]
        self._shown = None  # choices set below are not made by the rater
        self.text.value = self.items[change["new"] - 1].html()
        self.rating.value, self.context_free.value = row["rating"], row["context_free"]
        self._shown = change["new"] - 1
        self._count()

    def _keep(self, change: dict) -> None:
        if self._shown is None:
            return
        self.sheet.loc[self._shown, ["rating", "context_free"]] = [self.rating.value, self.context_free.value]
        write_ratings(self.sheet, self.path)
        self._count()

    def _count(self) -> None:
        rated = int((self.sheet["rating"] != NOT_RATED).sum())
        self.done.value = f"{rated} of {len(self.items)} rated"
