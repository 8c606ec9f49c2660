"""How quickly the explorers answer: every kind of interaction, on the bundled model.

    python benchmarks/explorers.py

Each interaction is moved there and back a few times, as a hand would; what is measured is the time until all views are
ready to be sent to the browser. Nothing is cached between the two, except what an explorer itself keeps. What the page
of the editor does alone is timed by `tests/test_graph_browser.py`. The last line is the headline.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

import tclib as tc
from tclib import ui
from tclib.circuits.editing import FROZEN
from tclib.features import Index, Summary, build_index, load_summary

PROMPT, OTHER = "The war lasted from the year 1732 to the year 17", "The siege ended in the year 1545; it began in 15"
REPEATS = 4


def set_up(folder: Path) -> tuple:
    """Model, transcoders, summary and a small index."""
    model, transcoders = tc.load_model(device="cpu"), tc.load_transcoders(device="cpu")
    tokens = tc.load_text(model, "chronicle", 64)
    return (
        model,
        transcoders,
        load_summary(tc.ReplacementModel(model, transcoders)),
        build_index(tc.ReplacementModel(model, transcoders), tokens, folder / "i"),
    )


def interactions(model, transcoders, summary: Summary, index: Index) -> Iterator[tuple[str, list[Callable[[], None]]]]:
    """What can be done, by name: moves that are made in turn."""

    def settings(control, *values) -> list[Callable[[], None]]:
        return [lambda value=value: setattr(control, "value", value) for value in values]

    scope = ui.Microscope(tc.ReplacementModel(model, transcoders), PROMPT)
    yield "microscope: prompt", settings(scope.prompt, OTHER, PROMPT)
    yield "microscope: token", settings(scope.token, 8, 12)
    yield "microscope: layer", settings(scope.layer, 0, 2)
    yield "microscope: feature", settings(scope.feature, *[value for _, value in scope.feature.options[1:3]])

    browser = ui.Browser(tc.ReplacementModel(model, transcoders), summary)
    yield "browser: frequency", settings(browser.range, (0.0, 1e-3), (0.0, 1.0))
    yield "browser: feature", settings(browser.list, *[value for _, value in browser.list.options[1:3]])
    browser.query.value, browser.by.value = "war", "token"
    yield "browser: token", settings(browser.query, "reign", "war")
    browser.query.value, browser.by.value = "year", "label"
    yield "browser: label", settings(browser.query, "noun", "year")
    browser.by.value = "similarity"
    yield "browser: similarity", settings(browser.number, "107", "1334")

    walker = ui.Walker(tc.ReplacementModel(model, transcoders), PROMPT, "45", "20")
    yield "walker: prompt", settings(walker.prompt, PROMPT.replace("war", "siege"), PROMPT)
    yield "walker: source", settings(walker.source, *[value for _, value in walker.source.options[1:3]])
    yield "walker: down and up", [walker.down.click, walker.up.click]

    editor = ui.Editor(tc.ReplacementModel(model, transcoders), PROMPT, "45", "20")
    yield "editor: prompt", settings(editor.prompt, PROMPT.replace("war", "siege"), PROMPT)
    features = sorted((n["influence"], n["node_id"]) for n in editor.file["nodes"] if n["activation"] is not None)
    four = [[name, 0.0] for _, name in features[:4]]

    def sent(number: int, **state) -> str:
        return json.dumps({"n": number, "of": editor._sent, "state": {**editor.state, **state}})

    yield "editor: ablate four", settings(editor.asked, sent(1, edits=four), sent(2, edits=[]))
    modes = [sent(3 + number, edits=four, frozen=mode) for number, mode in enumerate(FROZEN)]
    yield "editor: frozen or free", settings(editor.asked, *modes)

    weights = ui.Weights(transcoders, index, 2, 1334)
    yield "weights: feature", settings(weights.feature, "107", "1334")
    yield "weights: sources", settings(weights.source, 0, 1)
    yield "weights: weighting", settings(weights.by, "input_x_gradient", "target_weighted")

    lab = ui.Lab(tc.ReplacementModel(model, transcoders))
    yield "lab: YY", settings(lab.year, 60, 35)
    yield "lab: units kept", settings(lab.kept, 4, 16)
    yield "lab: taken out", settings(lab.out, tuple(lab.ranked[:2].tolist()), ())
    yield "lab: units", settings(lab.units, "neurons", "features")
    yield "lab: MLP", settings(lab.layer, 1, 2)
    yield "lab: noun", settings(lab.noun, *lab.noun.options[1:4])


def measure(*parts, repeats: int = REPEATS) -> pd.DataFrame:
    """Milliseconds of each interaction: the ``best``, ``median`` and ``worst`` of its moves; ``cpu`` is the
    median time on the processor, which other work on the machine hardly changes."""
    rows = {}
    for name, moves in interactions(*parts):
        times = []
        for move in moves * repeats:
            start = time.perf_counter(), time.process_time()
            move()
            times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        wall, cpu = 1000 * pd.DataFrame(times, columns=["wall", "cpu"]).T.to_numpy()
        rows[name] = {"best": wall.min(), "median": np.median(wall), "worst": wall.max(), "cpu": np.median(cpu)}
    return pd.DataFrame(rows).T


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        table = measure(*set_up(Path(folder)))
    print(table.round(0).astype(int).to_string())
    slowest = table["cpu"].idxmax()
    tc.headline("slowest interaction, median milliseconds of CPU", f"{table['cpu'].max():.0f} ({slowest})")
