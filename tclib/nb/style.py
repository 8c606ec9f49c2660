"""What a notebook sets at its beginning and says at its end: seeds, figure style, one headline number."""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping
from typing import Any


def headline(label: str, value: Any, spec: str = ".2f") -> None:
    """Print the notebook's one number; the runner and the README table read this line.

    Integers and text are printed as they are, other numbers with the format ``spec``.
    """
    if not isinstance(value, str | numbers.Integral):
        value = format(float(value), spec)
    print(f"headline: {label} = {value}")


def find_headline(notebook: Mapping[str, Any]) -> str | None:
    """The last headline printed in an executed notebook, as ``label = value``."""
    texts = [
        "".join(output.get("text", ""))
        for cell in notebook["cells"]
        for output in cell.get("outputs", ())
        if output.get("output_type") == "stream"
    ]
    found = re.findall(r"^headline: (.+ = .+)$", "\n".join(texts), flags=re.MULTILINE)
    return found[-1] if found else None


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's random generators."""
    import random

    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def figure_defaults() -> None:
    """One figure style for all notebooks: PNG, colour-blind-safe, the same bytes on every run."""
    import matplotlib
    from cycler import cycler
    from IPython import get_ipython

    # Okabe and Ito's palette, without its yellow, which is faint on white.
    okabe_ito = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000"]
    matplotlib.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=okabe_ito),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "figure.constrained_layout.use": True,
            "figure.dpi": 110,
            "figure.figsize": (6.4, 3.6),
            "font.size": 10,
            "image.cmap": "viridis",
        }
    )
    if get_ipython() is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        # Without this, each PNG names the matplotlib version that drew it.
        set_matplotlib_formats("png", metadata={"Software": None})


def why(error: Exception) -> str:
    """What went wrong in a notebook, and in which cell."""
    import papermill

    if isinstance(error, papermill.PapermillExecutionError):
        return f"in cell {error.cell_index + 1}, In [{error.exec_count}]: {error.ename}: {one_line(error.evalue)}"
    return f"({type(error).__name__}: {one_line(str(error))})"


def one_line(text: str, longest: int = 160) -> str:
    """``text`` without line breaks, cut short."""
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 3] + "..."
