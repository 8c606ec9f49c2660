"""An executed notebook as one HTML file that needs nothing else: figures, styles and formulas are inside.

Formulas become MathML, which browsers draw themselves, so there is no script and no download. Where a Chromium is
installed, the same page is printed to PDF.
"""

from __future__ import annotations

import base64
import copy
import html
import mimetypes
import os
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbconvert.preprocessors import CSSHTMLHeaderPreprocessor
from nbformat import NotebookNode

from tclib.io.paths import write_whole

STYLE = Path(__file__).with_suffix(".css")
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")


class NotExecuted(ValueError):
    """A notebook without outputs cannot be reported; the message is one sentence for the user."""


def write_report(notebook: Path, folder: Path) -> list[Path]:
    """Write ``<folder>/<name>.html``, and ``.pdf`` where a Chromium is found; return the new files.

    Raises:
        NotExecuted: a code cell was never run, or ended with an error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{notebook.stem}.html"
    write_whole(page, render(nbformat.read(notebook, as_version=4), notebook.name, notebook.parent).encode())
    browser = chromium()
    return [page, print_pdf(browser, page)] if browser else [page]


def render(notebook: NotebookNode, name: str = "the notebook", folder: Path = Path()) -> str:
    """The page. Images that the prose names are looked for from ``folder`` and put inside.

    Raises:
        NotExecuted: a code cell was never run, or ended with an error.
    """
    refuse_unfinished(notebook, name)
    notebook = copy.deepcopy(notebook)
    describe_figures(notebook)
    # Jupyter's own colours for code are variables of a style sheet that is not loaded here.
    exporter = HTMLExporter(template_name="basic", exclude_anchor_links=True)
    exporter.register_preprocessor(CSSHTMLHeaderPreprocessor(style="default"), enabled=True)
    exporter.register_filter("markdown2html", partial(to_html, folder=folder))
    body, resources = exporter.from_notebook_node(notebook)
    heading = re.search(r"^# (.+)$", "\n".join(cell.source for cell in notebook.cells), re.MULTILINE)
    title = html.escape(heading[1] if heading else name)
    style = "\n".join([*resources["inlining"]["css"], STYLE.read_text(encoding="utf-8")])
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{style}</style></head>\n'
        f"<body><main>{body}</main></body></html>\n"
    )


def refuse_unfinished(notebook: NotebookNode, name: str) -> None:
    """Raise `NotExecuted` for the first cell that was not run or failed."""
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        if cell.execution_count is None:
            raise NotExecuted(f"cell {number} of {name} was not executed: run all cells and save it, then report it.")
        if any(output.output_type == "error" for output in cell.outputs):
            raise NotExecuted(f"cell {number} of {name} ended with an error: repair it, then report it.")


def describe_figures(notebook: NotebookNode) -> None:
    """Give every figure the prose before it as its alternative text."""
    prose = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", cell.source)
            prose = " ".join(re.sub(r"[#*`$]", "", words).replace('"', "'").split())
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.metadata.setdefault("image/png", {}).setdefault("alt", prose[:1000])


def to_html(markdown: str, folder: Path = Path()) -> str:
    """Markdown with its formulas as MathML and its images inside."""
    renderer = _Offline(escape=False, exclude_anchor_links=True, path=str(folder))
    return MarkdownWithMath(renderer=renderer).render(markdown)


def chromium() -> str | None:
    """The path of an installed Chromium, or None."""
    return next((path for path in map(shutil.which, CHROMIUM) if path), None)


def print_pdf(browser: str, page: Path) -> Path:
    """Print a page to a PDF beside it.

    Raises:
        RuntimeError: the browser printed nothing.
    """
    target = page.with_name(f"{page.stem}.pdf")
    target.unlink(missing_ok=True)
    # Chromium refuses its sandbox to root, as whom containers run.
    root = ["--no-sandbox"] if getattr(os, "geteuid", lambda: 1)() == 0 else []
    command = [browser, "--headless", *root, "--disable-gpu", "--no-pdf-header-footer", f"--print-to-pdf={target}"]
    options = {"capture_output": True, "encoding": "utf-8", "errors": "replace", "timeout": 180}
    said = subprocess.run([*command, page.resolve().as_uri()], **options)
    if not target.is_file():
        raise RuntimeError(f"{browser} printed no PDF: {said.stderr.strip()[-300:]}")
    return target


class _Offline(IPythonRenderer):
    """nbconvert's Markdown without anything that a browser would have to fetch."""

    def inline_math(self, body: str) -> str:
        return convert(body)

    def block_math(self, body: str) -> str:
        return convert(body, display="block")

    def image(self, text: str, url: str, title: str | None = None) -> str:
        if url.startswith(("http:", "https:")):
            return html.escape(text)
        # nbconvert embeds only what lies below the notebook's folder; our diagrams and pictures are beside it.
        kind, _ = mimetypes.guess_type(url)
        if kind and (file := Path(self.path) / url).is_file():
            url = f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
        return super().image(text, url, title)
