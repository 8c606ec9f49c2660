"""Walk a circuit: from a target down to what made it, again and again, and up again; every table is balanced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ipywidgets as w
import pandas as pd

from tclib import targets
from tclib.attribution import attribute
from tclib.plots import source_names
from tclib.replacement_model import ReplacementModel
from tclib.targets import Target
from tclib.tracing import Trace, trace
from tclib.ui.answers import Question
from tclib.ui.base import Explorer, replace_options
from tclib.ui.markup import bars, table
from tclib.ui.selected import Selected

TOP = 12


@dataclass(frozen=True)
class Step:
    """One stop of a walk: a target and its sources, and how a source's contribution counts for where the walk began."""

    name: str
    target: Target
    table: pd.DataFrame  # of `attribute`, with `on_path`: the contribution to the walk's first target
    factor: float


def begin(trace: Trace, target: Target) -> list[Step]:
    """A walk of one step, at the target itself."""
    return [_step(trace, target.name, target, 1.0)]


def down(trace: Trace, walk: Sequence[Step], row: int) -> list[Step]:
    """The walk, one step further: to the source in this row of the last table.

    A feature is followed to its pre-activation, which passes on contribution / pre-activation (paper, section 4.1); a
    head to what it read at its source token.

    Raises:
        ValueError: a source that has no sources of its own.
    """
    last = walk[-1]
    if not 0 <= row < len(last.table):
        raise ValueError(f"the table of {last.name} has no row {row}: it has {len(last.table)}")
    source = last.table.iloc[row]
    name, factor = source_names(last.table.iloc[[row]])[0], last.factor
    if source["kind"] == "feature":
        target = targets.feature(trace, int(source["layer"]), int(source["feature"]), int(source["position"]))
        factor *= source["contribution"] / target.value(trace)
    elif source["kind"] == "head":
        place = (int(source["layer"]), int(source["head"]), int(source["position"]))
        target = targets.head_source(trace, last.target, *place)
    else:
        raise ValueError(f"{name} is where a path ends: follow a feature (mlp...) or a head (attn...)")
    return [*walk, _step(trace, name, target, factor)]


def walked(walk: Sequence[Step]) -> pd.DataFrame:
    """The walk so far: ``step``, ``value`` (of each target), ``on_path`` (what the path carries to the first)."""
    rows = [(s.name, s.table.attrs["value"], s.factor * s.table.attrs["value"]) for s in walk]
    return pd.DataFrame(rows, columns=["step", "value", "on_path"])


def goes_on(table: pd.DataFrame, most: int = 40) -> list[tuple[str, int]]:
    """The sources that can be followed, by name and row, largest |contribution| first."""
    some = table[table["kind"].isin(["feature", "head"]) & (table["contribution"] != 0)].head(most)
    names = source_names(some)
    return [(f"{n}  {c:+.3f}", row) for n, c, row in zip(names, some["contribution"], some.index, strict=True)]


class Walker(Explorer):
    """Step down to a source or back up with two buttons; the path and its balance stand beside them."""

    def __init__(
        self,
        replacement: ReplacementModel,
        prompt: str,
        token: str,
        other: str = "",
        selected: Selected | None = None,
    ):
        self.replacement, self.walk = replacement, []
        self.question = Question(prompt, token, other)
        self.prompt, self.token, self.other = self.question.fields
        self.source = w.Select(description="source", rows=16, layout=w.Layout(width="340px"))
        self.down = w.Button(description="down to it", tooltip="explain the chosen source", icon="arrow-down")
        self.up = w.Button(description="up again", tooltip="back to what it contributes to", icon="arrow-up")
        self.path, self.view = w.HTML(), w.HTML()
        side = w.VBox([self.source, w.HBox([self.down, self.up])])
        super().__init__(
            "Attribution walker",
            self.question.rows,
            [side, w.VBox([self.path, self.view], layout=w.Layout(flex="1 1 420px"))],
            selected,
        )
        self.watch(self._start, *self.question.fields)
        self.watch(self._down, self.down)
        self.watch(self._up, self.up)
        self.watch(self._choose, self.source)
        self.start(self._start)

    def _start(self) -> str:
        traced = trace(self.replacement, self.prompt.value)
        walk = begin(traced, self.question.target(traced))
        self.trace, self.walk = traced, walk  # together, or not at all
        self.question.show(traced)
        return self._show()

    def _choose(self) -> str:
        if self.source.value is not None:
            source = self.walk[-1].table.loc[self.source.value]
            if source["kind"] == "feature":
                self.choose(int(source["layer"]), int(source["feature"]))
        return self._mark()

    def _down(self) -> str:
        if self.source.value is None:
            raise ValueError("nothing here can be followed further: go up again")
        self.walk = down(self.trace, self.walk, self.source.value)
        return self._show()

    def _up(self) -> str:
        if len(self.walk) == 1:
            raise ValueError("this is where the walk began: choose a source and go down")
        self.walk = self.walk[:-1]
        return self._show()

    def _show(self) -> str:
        replace_options(self.source, goes_on(self.walk[-1].table))
        self.path.value = table(walked(self.walk), "the path so far, from the answer down")
        return self._mark()

    def _mark(self) -> str:
        step = self.walk[-1]
        self.view.value = step_html(step, self.source.value)
        sizes, value = step.table["contribution"], step.table.attrs["value"]
        off = abs(sizes.sum() - value) / sizes.abs().sum()
        return (
            f"{len(sizes)} sources sum to {sizes.sum():.4f}; the target is {value:.4f} (off by {off:.0e} of their "
            "summed magnitude)."
        )


def step_html(step: Step, chosen: int | None = None) -> str:
    """The largest contributions of a step, and all others as one."""
    head, rest = step.table.head(TOP), step.table.iloc[TOP:]
    rows = list(zip(source_names(head), head["contribution"], strict=True))
    rows.append((f"{len(rest)} other sources", rest["contribution"].sum()))
    bold = chosen if chosen is not None and chosen < TOP else None
    return bars(rows, f"sources of {step.name}", "contribution", bold)


def _step(trace: Trace, name: str, target: Target, factor: float) -> Step:
    sources = attribute(trace, target)
    sources["on_path"] = factor * sources["contribution"]
    return Step(name, target, sources, factor)
