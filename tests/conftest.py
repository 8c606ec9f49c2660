"""Fixtures shared by the tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import make_model

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


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model of two layers, see `tests.tiny`; a module with a fixture of this name uses its own."""
    return make_model(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture(scope="module")
def tokens():
    """64 rows of random tokens for it, BOS first."""
    rows = torch.randint(0, 40, (64, 16), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = 40
    return rows
