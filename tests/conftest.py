"""Fixtures shared by the tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[1]
COMMITTED = sorted((REPO / "notebooks").glob("[0-9][0-9]*_*.ipynb"))

Write = Callable[..., Path]


def notebook_dict(cells: Sequence[str], tags: dict[int, str] | None = None) -> dict[str, Any]:
    """A notebook of code cells, with at most one tag each."""
    return {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}},
        "cells": [
            {
                "id": f"cell-{index}",
                "cell_type": "code",
                "source": source,
                "metadata": {"tags": [tags[index]]} if tags and index in tags else {},
                "execution_count": None,
                "outputs": [],
            }
            for index, source in enumerate(cells)
        ],
    }


@pytest.fixture
def write_notebook() -> Write:
    """Write a notebook of code cells: ``write_notebook(path, [cell, ...], {index: tag})``."""

    def write(path: Path, cells: Sequence[str], tags: dict[int, str] | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(notebook_dict(cells, tags)), encoding="utf-8")
        return path

    return write
