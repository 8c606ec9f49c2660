"""The sweep: what is not finished yet goes to the cluster, and every result is on disk as soon as it is there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from tclib.io.paths import read_text
from tclib.nb import declared_parameters, one_line
from tclib.nb.sweeps.cluster import connected
from tclib.nb.sweeps.execute import execute
from tclib.nb.sweeps.grid import Grid, code_hash, expand, run_name
from tclib.nb.sweeps.results import COLUMNS, About, Results, Run, read_run, results_folder, table, write_run

NOTEBOOK = Path(__file__).with_name("train_one.ipynb")


def sweep(
    grid: Grid | Sequence[Grid],
    folder: str | Path,
    notebook: str | Path = NOTEBOOK,
    cluster: Any = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Execute a notebook once for every combination of a grid, and keep every result.

    Runs that are finished in ``folder`` are not run again; failed ones are. Interrupted (ctrl-C, a killed worker, a
    power cut), the same call goes on where it stopped.

    Args:
        grid: parameter -> values, or several such grids; see `tclib.nb.sweeps.grid`.
        folder: of the results; on a cluster of several machines, one that all of them see under this path.
        notebook: declares its parameters by `tc.parameters` and shows one `Point`. By default it trains one dictionary.
        cluster: None for this machine, or any Dask cluster, client or scheduler address, see `cluster.connected`.
        progress: a line per run and a bar, in the terminal.

    Returns:
        One row per run of the grid, see `results.table`; failed runs have a ``reason``.

    Raises:
        ValueError: before anything runs: a parameter or value that the notebook refuses, a folder that cannot be
            written or holds results of another version, an address where no scheduler answers.
    """
    text = read_text(Path(notebook))
    parsed = json.loads(text)
    declared = declared_parameters(parsed)
    if hidden := sorted(declared.keys() & set(COLUMNS)):
        raise ValueError(f"the notebook has a parameter {hidden[0]!r}, which is a column of the results: rename it")
    runs = expand(grid, declared)
    about = About(notebook=Path(notebook).name, code=code_hash(parsed))
    folder = results_folder(folder, about)
    done = {run_name(p): read_run(folder / run_name(p)) for p in runs}
    todo = [p for p in runs if not ((run := done[run_name(p)]) and run.point)]
    with tqdm(total=len(runs), initial=len(runs) - len(todo), disable=not progress, unit="run") as bar:
        if todo:
            with connected(cluster, len(todo)) as client:
                for run in _as_finished(client, text, todo, folder, bar):
                    done[run_name(run.parameters)] = run
                    if progress:
                        bar.write(_sentence(run, runs))
                    bar.update()
    return table(Results(about=about, runs=[run for p in runs if (run := done[run_name(p)])]))


def _as_finished(client: Any, notebook: str, todo: list[dict], folder: Path, bar: tqdm) -> Iterator[Run]:
    """Runs as they come to their end. Leaving early withdraws those that have not begun."""
    futures, ended = {}, Queue()
    try:
        for parameters in todo:
            future = client.submit(execute, notebook, parameters, str(folder / run_name(parameters)), pure=False)
            futures[future] = parameters
            future.add_done_callback(ended.put)
        while futures:
            try:
                future = ended.get(timeout=1)
            except Empty:
                bar.refresh()  # the clock goes on
                continue
            parameters = futures.pop(future)
            try:
                run = future.result()
            except Exception as error:
                run = _lost(error, parameters, folder / run_name(parameters))
            yield run
    finally:
        client.cancel(list(futures))


def _lost(error: Exception, parameters: dict, directory: Path) -> Run:
    """A run that gave nothing back: it brought down one worker after another, or its worker or cluster is unfit."""
    from dask.distributed import KilledWorker

    done = read_run(directory)
    if done and done.point:  # only the message was lost
        return done
    says = "its workers died, one after another" if isinstance(error, KilledWorker) else one_line(str(error))
    run = Run(parameters=parameters, seconds=0, reason=f"({type(error).__name__}: {says})")
    directory.mkdir(exist_ok=True)
    write_run(directory, run)
    return run


def _sentence(run: Run, runs: Sequence[Mapping[str, Any]]) -> str:
    """One line: what distinguishes this run from the others, and what came out."""
    axes = [name for name in run.parameters if len({json.dumps(p[name]) for p in runs}) > 1]
    which = ", ".join(f"{name}={run.parameters[name]}" for name in axes)
    what = f"L0 {run.point.l0:.1f}, FVU {run.point.fvu:.3f}" if run.point else f"FAILED {run.reason}"
    return f"{which or 'the run'}: {what} ({run.seconds:.0f} s)"
