"""Sentences in which something lasts from one year to another, with ``NOUN``, ``XXYY`` and ``XX`` to be filled in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from tclib.chronicle import SPANS
from tclib.io.paths import read_text

TEMPLATE = "The NOUN lasted from the year XXYY to the year XX"
BACKWARD_TEMPLATE = "The NOUN ended in the year XXYY; it began in the year XX"
PAPER_TEMPLATE = "The NOUN lasted from XXYY to XX"


def fill(template: str, noun: str, century: int, year: int) -> str:
    """One prompt: ``fill(TEMPLATE, "war", 17, 32)``."""
    text = template.replace("XXYY", f"{century}{year:02d}").replace("XX", str(century))
    return text.replace("NOUN", noun)


def check_template(template: str) -> None:
    """Raise ValueError unless the template has one NOUN and one XXYY and ends in XX."""
    marks = [template.count("NOUN"), template.count("XXYY"), template.count("XX"), template.count("YY")]
    if marks != [1, 1, 2, 1] or not template.endswith("XX"):
        raise ValueError(f"template {template!r} needs NOUN and XXYY once each, and must stop at XX")


def read_templates(path: str | Path) -> list[str]:
    """Templates of a text file, one a line; empty lines and lines that begin with # are left out.

    Raises:
        ValueError: no such file, none in UTF-8, no template in it, or a line that is not one (it is named).
    """
    try:
        lines = read_text(Path(path)).splitlines()
    except OSError:
        raise ValueError(f"there is no prompt file {path}: give a text file with one template a line") from None
    templates = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    for template in templates:
        check_template(template)
    if not templates:
        raise ValueError(f"{path} holds no template: write one a line, for example {TEMPLATE!r}")
    return templates


def chronicle_templates(kind: Literal["train", "heldout"]) -> list[str]:
    """The bundled corpus' own sentences as templates: those with no other field than the noun and the two years.

    ``heldout`` templates never occur in the training text.
    """
    plain = [t for t in SPANS[kind] if set(re.findall(r"{(.*?)}", t)) == {"noun", "start", "end"}]
    return [t.replace("{noun}", "NOUN").replace("{start}", "XXYY").split("{end}")[0] + "XX" for t in plain]
