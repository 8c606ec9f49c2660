"""What all explorers share: a box of labelled controls above views, one status line, and views that follow the theme.

A control only ever calls a method through `Explorer.attempt`, so that nothing can be lost in a callback: a `ValueError`
is one sentence in the status line, anything else is told there too and raised on.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import ipywidgets as w
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tclib.tracing import Trace
from tclib.views import NEGATIVE, POSITIVE

# JupyterLab's own colours, light and dark; what follows the comma is for other pages.
TEXT, FAINT = "var(--jp-content-font-color1, #212121)", "var(--jp-content-font-color2, #616161)"
LINE, ERROR = "var(--jp-border-color1, #bdbdbd)", "var(--jp-error-color1, #b3261e)"
UNEXPECTED = "unexpected error"  # tests look for it in executed notebooks
WIDE = w.Layout(width="auto", min_width="300px", max_width="560px", flex="1 1 300px")
# JupyterLab takes arrow keys and letters for itself unless what has the focus says otherwise, and Python cannot say it.
KEYS = (
    "<style>@keyframes tclib-shown {from {opacity: 0.99}}</style>"
    '<span style="animation: tclib-shown 1ms" onanimationstart="'
    "this.closest('.tclib-explorer').addEventListener('focusin', "
    "event => event.target.setAttribute('data-lm-suppress-shortcuts', 'true'))\"></span>"
)
# ipywidgets marks what has lost its kernel with a class; no code runs any more that could say so.
RESTARTED = (
    "<style>.tclib-restarted {display: none} .jupyter-widgets-disconnected .tclib-restarted {display: block}</style>"
    f'<div class="tclib-restarted" style="color: {ERROR}; font-weight: bold">'
    "The kernel was restarted, so these controls reach nothing: run the cells of this notebook again.</div>"
)


class Explorer:
    """Controls, status line, views. A cell shows it as ``box``; setting a control's ``.value`` is moving it by hand."""

    def __init__(self, name: str, controls: Sequence[Sequence[w.Widget]], views: Sequence[w.Widget]):
        """Args:
        controls: rows of controls, in the order of the tab key.
        """
        self.name, self._answering = name, False
        self.status = w.HTML()
        title = w.HTML(f'<b style="color: {TEXT}">{html.escape(name)}</b>')
        flow = w.Layout(flex_flow="row wrap", align_items="center", width="100%")
        rows = [w.HBox(list(row), layout=flow) for row in controls]
        body = w.HBox(list(views), layout=w.Layout(flex_flow="row wrap", align_items="flex-start", width="100%"))
        layout = w.Layout(border=f"1px solid {LINE}", padding="8px", width="100%", max_width="1180px")
        self.box = w.VBox([title, *rows, self.status, body, w.HTML(KEYS + RESTARTED)], layout=layout)
        self.box.add_class("tclib-explorer")

    def watch(self, action: Callable[[], str | None], *controls: w.Widget) -> None:
        """Run ``action`` whenever one of the controls is moved or pressed; what it returns goes to the status line."""

        def moved(_) -> None:
            if not self._answering:
                self.attempt(action)

        for control in controls:
            if isinstance(control, w.Button):
                control.on_click(moved)
            else:
                control.observe(moved, names="value")

    def start(self, action: Callable[[], str | None]) -> None:
        """The first answer; what is wrong here is wrong in the code that calls, and is raised."""
        with self.answering():
            self._say(action() or "")

    def attempt(self, action: Callable[[], str | None]) -> None:
        """Run ``action`` and tell in the status line how it went; errors other than ValueError are raised on."""
        try:
            with self.answering():
                said = action()
        except ValueError as error:
            self._say(f"{error} (The view is still the last one.)", wrong=True)
        except Exception as error:
            self._say(f"{UNEXPECTED}, {type(error).__name__}: {error}", wrong=True)
            raise
        else:
            self._say(said or "")

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
        self.status.value = f'<div role="status" aria-live="polite" style="{style}">{mark}{html.escape(text)}</div>'

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        data = dict(self.box._repr_mimebundle_(**kwargs))
        data["text/plain"] = f"{self.name}: run this notebook to use it"
        return data


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


def bars(rows: Sequence[tuple[str, float]], caption: str, unit: str, bold: int | None = None) -> str:
    """Signed numbers as bars to the left and right of zero, with the numbers written out.

    Args:
        rows: name and value, from the top.
        bold: which row to set in bold.
    """
    largest = max((abs(value) for _, value in rows), default=0.0) or 1.0
    lines = []
    for number, (name, value) in enumerate(rows):
        width = f"{50 * abs(value) / largest:.1f}%"
        side = f"left: 50%; background: {POSITIVE}" if value > 0 else f"right: 50%; background: {NEGATIVE}"
        bar = f'<div style="position: absolute; top: 3px; bottom: 3px; width: {width}; {side}"></div>'
        axis = f'<div style="position: absolute; left: 50%; top: 0; bottom: 0; border-left: 1px solid {FAINT}"></div>'
        weight = f"; font-weight: {'bold' if number == bold else 'normal'}"
        lines.append(
            f'<tr><th scope="row" style="{_CELL}; text-align: left{weight}">{html.escape(name)}</th>'
            f'<td style="{_CELL}; min-width: 150px; position: relative">{axis}{bar}</td>'
            f'<td style="{_CELL}; text-align: right{weight}">{value:+.3f}</td></tr>'
        )
    return _table_of(f"{caption} ({unit})", "", "".join(lines))


def table(frame: pd.DataFrame, caption: str, digits: int = 3) -> str:
    """A table that a screen reader can read and both themes show."""
    head = "".join(f'<th scope="col" style="{_CELL}">{html.escape(str(n)).replace("_", " ")}</th>' for n in frame)
    lines = ("<tr>" + "".join(_cell(value, digits) for value in row) + "</tr>" for row in frame.itertuples(index=False))
    return _table_of(caption, f"<tr>{head}</tr>", "".join(lines))


def paper(inner: str) -> str:
    """White paper with black ink, for views that were drawn for it, in any theme."""
    return f'<div style="background: white; color: black; padding: 4px 8px; overflow-x: auto">{inner}</div>'


def picture(figure: Figure, told: str, width: int) -> str:
    """A figure as an image ``width`` pixels wide, with what it shows told in words."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    source = base64.b64encode(buffer.getvalue()).decode()
    alt = html.escape(told, quote=True)
    return f'<img alt="{alt}" style="width: {width}px; max-width: 100%" src="data:image/png;base64,{source}">'


def shown(token: str) -> str:
    """A token with its spaces and line breaks visible."""
    return repr(token)


def token_options(trace: Trace) -> list[tuple[str, int]]:
    """Positions of a prompt, by number and token."""
    return [(f"{position}  {shown(token)}", position) for position, token in enumerate(trace.token_strings)]


_CELL = f"padding: 1px 8px; color: {TEXT}; background: transparent"


def _table_of(caption: str, head: str, body: str) -> str:
    style = "border-collapse: collapse; font-size: 12px; line-height: 1.5"
    title = f"text-align: left; white-space: nowrap; color: {FAINT}; padding: 4px 8px"
    told = f'<caption style="{title}">{html.escape(caption)}</caption>'
    return f'<table style="{style}">{told}{head}{body}</table>'


def _cell(value: Any, digits: int) -> str:
    text = "none" if pd.isna(value) else f"{value:.{digits}f}" if isinstance(value, float) else str(value)
    side = "left" if isinstance(value, str) else "right"
    return f'<td style="{_CELL}; text-align: {side}">{html.escape(text)}</td>'
