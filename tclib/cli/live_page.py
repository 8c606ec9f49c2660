"""How `python -m tclib explore` renders prose: without the pictures that stand for explorers where nothing runs."""

from __future__ import annotations

from voila.exporter import VoilaMarkdownRenderer


class WithoutPictures(VoilaMarkdownRenderer):
    """Voila's Markdown renderer without images: those of notebook 08 show what is live beside them, and lie outside
    the folder that Voila serves, which would make it show no page at all."""

    def image(self, text: str, url: str, title: str | None = None) -> str:
        return ""
