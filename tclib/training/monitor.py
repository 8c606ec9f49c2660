"""Ways to look at a training while it runs: pass one, or any function of a list of records, as ``watch``."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

COLUMNS = {
    "loss": "loss",
    "fvu": "FVU",
    "l0": "active per token",
    "dead": "dead fraction",
    "speed": "tokens per second",
}


class LiveFigure:
    """A figure in the notebook that is redrawn as the training goes on."""

    def __init__(self, every: int = 5):
        self.every, self.calls, self.records = every, 0, []
        self.display = None

    def __call__(self, records: list[dict]) -> None:
        self.records += records
        self.calls += 1
        if self.calls % self.every == 0:
            self.draw()

    def draw(self) -> None:
        """Show the figure, or replace the one already shown."""
        from IPython.display import display

        figure = curves(pd.DataFrame(self.records))
        if self.display is None:
            self.display = display(figure, display_id=True)
        else:
            self.display.update(figure)
        plt.close(figure)


def curves(history: pd.DataFrame) -> Figure:
    """Loss, FVU, L0, dead features and speed against the step, one line per layer and name."""
    shown = {column: label for column, label in COLUMNS.items() if column in history}
    figure, axes = plt.subplots(1, len(shown), figsize=(2.6 * len(shown), 2.4), layout="constrained")
    by = [column for column in ("name", "layer") if column in history and history[column].nunique() > 1]
    groups = history.groupby(by) if by else [("", history)]
    for key, group in groups:
        label = " ".join(map(str, key)) if isinstance(key, tuple) else str(key)
        for axis, column in zip(axes, shown, strict=True):
            axis.plot(group["step"], group[column], label=label)
    for axis, (column, label) in zip(axes, shown.items(), strict=True):
        axis.set(xlabel="step", title=label, yscale="log" if column in ("loss", "fvu") else "linear")
    if by:
        axes[0].legend(title=", ".join(by), frameon=False)
    return figure


class TensorBoard:
    """Write TensorBoard event files. Requires TensorBoard (``pip install tensorboard``) and no account.

    Raises:
        ValueError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("TensorBoard is not installed: pip install tensorboard, or use the JSONL log") from None
        self.writer = SummaryWriter(str(folder))

    def __call__(self, records: list[dict]) -> None:
        for record in records:
            place = "/".join(filter(None, [record["name"], f"layer {record['layer']}"]))
            for column in COLUMNS:
                self.writer.add_scalar(f"{column}/{place}", record[column], record["step"])
        self.writer.flush()
