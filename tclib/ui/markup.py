"""Pieces of HTML that both themes of JupyterLab show and a screen reader can read: tables, bars, pictures.

None is long enough for a template engine.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tclib.plots import NEGATIVE, POSITIVE

# JupyterLab's own colours, light and dark; what follows the comma is for other pages.
TEXT, FAINT = "var(--jp-content-font-color1, #212121)", "var(--jp-content-font-color2, #616161)"
LINE, ERROR = "var(--jp-border-color1, #bdbdbd)", "var(--jp-error-color1, #b3261e)"


def bars(
    rows: Sequence[tuple[str, float]], caption: str, unit: str, bold: int | None = None, digits: int | None = None
) -> str:
    """Signed numbers as bars to the left and right of zero, with the numbers written out.

    Args:
        rows: name and value, from the top.
        bold: which row to set in bold.
        digits: of numbers that have no sign; None writes signs and three digits.
    """
    largest = max((abs(value) for _, value in rows), default=0.0) or 1.0
    lines, form = [], "+.3f" if digits is None else f",.{digits}f"
    for number, (name, value) in enumerate(rows):
        width = f"{50 * abs(value) / largest:.1f}%"
        side = f"left: 50%; background: {POSITIVE}" if value > 0 else f"right: 50%; background: {NEGATIVE}"
        bar = f'<div style="position: absolute; top: 3px; bottom: 3px; width: {width}; {side}"></div>'
        axis = f'<div style="position: absolute; left: 50%; top: 0; bottom: 0; border-left: 1px solid {FAINT}"></div>'
        weight = f"; font-weight: {'bold' if number == bold else 'normal'}"
        lines.append(
            f'<tr><th scope="row" style="{_CELL}; text-align: left{weight}">{html.escape(name)}</th>'
            f'<td style="{_CELL}; min-width: 150px; position: relative">{axis}{bar}</td>'
            f'<td style="{_CELL}; text-align: right{weight}">{value:{form}}</td></tr>'
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


def in_one_line(tokens: Sequence[str]) -> list[str]:
    """Tokens with an arrow for each line break."""
    return [token.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}") for token in tokens]


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
