"""What all explorers share: a box of labelled controls above views, one status line, and views that follow the theme.

A control only ever calls a method through `Explorer.attempt`, so that nothing can be lost in a callback: a `ValueError`
is one sentence in the status line, anything else is told there too and raised on.
"""

from __future__ import annotations

import asyncio
import html
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as w
from IPython import get_ipython

from tclib.ui.markup import ERROR, FAINT, LINE, TEXT

if TYPE_CHECKING:
    from tclib.ui.selected import Selected

UNEXPECTED = "unexpected error"  # tests look for it in executed notebooks
WIDE = w.Layout(width="auto", min_width="300px", max_width="560px", flex="1 1 300px")
_SCRIPT = html.escape(Path(__file__).with_name("page.js").read_text(encoding="utf-8"), quote=True)
# A style is the only way to run a script that an output brings along; the kernel's silence cannot be told by Python:
# ipywidgets marks what has lost its kernel with a class, and the script what gets no answer.
PAGE = f"""<style>
@keyframes tclib-shown {{from {{opacity: 0.99}}}}
@keyframes tclib-late {{from {{visibility: hidden}} to {{visibility: visible}}}}
.tclib-progress {{animation: tclib-late 0s 0.4s both}}
.tclib-lost {{display: none; color: {ERROR}; font-weight: bold}}
.jupyter-widgets-disconnected .tclib-restarted, .tclib-silent .tclib-stopped {{display: block}}
.tclib-lost .tclib-in-app, .tclib-app .tclib-lost .tclib-alone {{display: none}}
.tclib-app .tclib-lost .tclib-in-app {{display: inline}}
</style>
<span style="animation: tclib-shown 1ms" onanimationstart="{_SCRIPT}"></span>
<div class="tclib-lost tclib-restarted" role="alert">The kernel was restarted, so these controls reach nothing:
<span class="tclib-in-app">run the cells of this notebook again.</span>
<span class="tclib-alone">reload this page.</span></div>
<div class="tclib-lost tclib-stopped" role="alert">No answer for ten seconds: the kernel is busy, or it was stopped. If
nothing comes, <span class="tclib-in-app">run the cells of this notebook again.</span>
<span class="tclib-alone">reload this page.</span></div>"""
# What a step of a longer piece of work gives while there is more to do: the share that is done.
Work = Generator[float, None, str]


def _finished(work: Work) -> str | None:
    """What a piece of work that is done in turns returns at its end."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


class Explorer:
    """Controls, status line, views. A cell shows it as ``box``; setting a control's ``.value`` is moving it by hand."""

    def __init__(
        self,
        name: str,
        controls: Sequence[Sequence[w.Widget]],
        views: Sequence[w.Widget],
        selected: Selected | None = None,
    ):
        """Args:
        controls: rows of controls, in the order of the tab key.
        selected: the feature chosen in any explorer; its card stands below the views.
        """
        self.selected: Any = selected
        self.name, self._answering, self._work, self._told = name, False, None, 0
        self.status = w.HTML()
        self.progress = w.FloatProgress(max=1.0, description="working")
        self.cancel = w.Button(description="cancel", tooltip="keep the last view")
        self.cancel.on_click(lambda _: self._cancel())
        self._under_way = w.HBox([self.progress, self.cancel], layout=w.Layout(display="none"))
        self._under_way.add_class("tclib-progress")
        title = w.HTML(f'<b style="color: {TEXT}">{html.escape(name)}</b>')
        flow = w.Layout(flex_flow="row wrap", align_items="center", width="100%")
        rows = [w.HBox(list(row), layout=flow) for row in controls]
        body = w.HBox(list(views), layout=w.Layout(flex_flow="row wrap", align_items="flex-start", width="100%"))
        cards = [selected.card] if selected else []
        layout = w.Layout(border=f"1px solid {LINE}", padding="8px", width="100%", max_width="1180px")
        self.box = w.VBox([title, *rows, self._under_way, self.status, body, *cards, w.HTML(PAGE)], layout=layout)
        self.box.add_class("tclib-explorer")

    def watch(self, action: Callable[[], str | Work | None], *controls: w.Widget) -> None:
        """Run ``action`` whenever one of the controls is moved or pressed; what it returns goes to the status line."""

        def moved(_) -> None:
            if not self._answering:
                self.attempt(action)

        for control in controls:
            if isinstance(control, w.Button):
                control.on_click(moved)
            else:
                control.observe(moved, names="value")

    def choose(self, layer: int, feature: int) -> None:
        """Tell the other explorers, and the card, that this feature was chosen here."""
        if self.selected:
            self.selected.choose(layer, feature)

    def follow(self, here: Callable[[], tuple[int, int] | None], action: Callable[[], str | None]) -> None:
        """Run ``action`` when another feature than the one ``here`` is chosen in another explorer."""
        if self.selected:
            self.selected.observe(lambda _: here() == self.selected.feature or self.attempt(action), names="feature")

    def start(self, action: Callable[[], str | Work | None]) -> None:
        """The first answer; what is wrong here is wrong in the code that calls, and is raised."""
        with self.answering():
            said = action()
            self._say((_finished(said) if isinstance(said, Generator) else said) or "")

    def attempt(self, action: Callable[[], str | Work | None]) -> None:
        """Run ``action`` and tell in the status line how it went; errors other than ValueError are raised on.

        An action that is a generator gives way to other messages at each ``yield``, so that it can be cancelled; it
        changes nothing that is shown before it is through. Called by a cell, it is run to its end.
        """
        work = self._guarded(action)
        if isinstance(work, Generator):
            self._work = work  # it takes the place of what is under way
            if _by_hand():
                asyncio.get_running_loop().create_task(self.work_in_turns(work))
            else:
                while self._goes_on(work):
                    pass

    async def work_in_turns(self, work: Work) -> None:
        """Go on with a piece of work between other messages, until it is through or no longer wanted."""
        self.progress.value, self._under_way.layout.display = 0.0, "flex"
        try:
            while self._work is work and self._goes_on(work):
                await asyncio.sleep(0.01)  # a message that came meanwhile needs several turns of the loop
        finally:
            work.close()
            if self._work in (work, None):
                self._work, self._under_way.layout.display = None, "none"

    def _goes_on(self, work: Work) -> bool:
        def step() -> str | float:
            try:
                return next(work)
            except StopIteration as end:
                return end.value

        done = self._guarded(step)
        if isinstance(done, float) and abs(done - self.progress.value) > 0.01:
            self.progress.value = done
        return isinstance(done, float)

    def _guarded(self, step: Callable[[], Any]) -> Any:
        try:
            with self.answering():
                said = step()
        except ValueError as error:
            self._say(f"{error} (The view is still the last one.)", wrong=True)
        except Exception as error:
            self._say(f"{UNEXPECTED}, {type(error).__name__}: {error}", wrong=True)
            raise
        else:
            if not isinstance(said, float | Generator):
                self._say(said or "")
            return said

    def _cancel(self) -> None:
        if self._work is not None:
            self._work = None
            self._say("Cancelled. (The view is still the last one.)")

    @contextmanager
    def answering(self):
        """Controls that are set inside this block do not answer: nobody moved them."""
        before, self._answering = self._answering, True
        try:
            yield
        finally:
            self._answering = before

    def _say(self, text: str, wrong: bool = False) -> None:
        style = f"color: {ERROR}; font-weight: bold" if wrong else f"color: {FAINT}"
        mark = "Not possible: " if wrong else ""
        self._told += 1  # so that the page sees an answer even if it is the same
        role = f'role="status" aria-live="polite" data-answer="{self._told}"'
        self.status.value = f'<div {role} style="{style}">{mark}{html.escape(text)}</div>'

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        data: dict[str, Any] = {**(self.box._repr_mimebundle_(**kwargs) or {})}
        data["text/plain"] = f"{self.name}: run this notebook to use it"
        return data


def prompt_field(prompt: str) -> w.Textarea:
    """A field for a prompt of one or more lines: Enter sends it, Shift and Enter begin another line."""
    about = "Enter: read it; Shift and Enter: another line"
    field = w.Textarea(prompt, description="prompt", continuous_update=False, layout=WIDE, tooltip=about)

    def fit(_=None) -> None:
        field.rows = min(6, sum(1 + len(line) // 55 for line in field.value.split("\n")))

    field.observe(fit, names="value")
    fit()
    return field


def whole_number(text: str, what: str, count: int) -> int:
    """A number from 0 to ``count - 1`` that was typed.

    Raises:
        ValueError: another number, or none.
    """
    if not re.fullmatch(r"[+-]?\d+", text.strip()):
        raise ValueError(f"{text!r} is no number of a {what}: type a whole number from 0 to {count - 1}")
    number = int(text)
    if not 0 <= number < count:
        raise ValueError(f"{what} {number} is outside what is there: type a whole number from 0 to {count - 1}")
    return number


def replace_options(control: w.Select | w.SelectMultiple | w.Dropdown, options: list[tuple[str, Any]]) -> None:
    """New options; what was chosen stays chosen where it is still there."""
    values = [value for _, value in options]
    if isinstance(control, w.SelectMultiple):
        kept = tuple(value for value in control.value if value in values)
        control.options, control.value = options, kept
    else:
        kept = control.value
        control.options = options
        if values:
            control.value = kept if kept in values else values[0]


def _by_hand() -> bool:
    """Whether a message of a browser is being answered; otherwise a cell, or a script, sets a control."""
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and kernel.get_parent().get("header", {}).get("msg_type") == "comm_msg"
