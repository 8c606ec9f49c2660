"""`python -m tclib sweep`: train and measure over a grid, on this machine or on a cluster."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tclib.cli.bootstrap import REPO
from tclib.cli.run import literal, placed
from tclib.io.paths import read_text
from tclib.nb import Parameter, declared_parameters
from tclib.nb.sweeps import NOTEBOOK, SMALL, load_results
from tclib.nb.sweeps import sweep as sweep_over

EXAMPLE = '{"l1_coefficient": [0.01, 0.1]}'
SHOWN = ["seconds", "l0", "fvu", "recovered", "reason"]


def sweep(arguments: Sequence[str], repo: Path = REPO, notebook: Path = NOTEBOOK) -> int:
    """Run the sweep; return 0, or 1 if a run failed, 2 if refused, 130 if interrupted."""
    options = parse(arguments)
    folder = (options.folder or repo / "runs" / "sweep").absolute()
    try:
        declared = declared_parameters(json.loads(read_text(notebook)))
        grid = with_axes(read_grid(options.grid), options.axes, declared)
        results = sweep_over(grid, folder, notebook, cluster=options.scheduler, progress=True)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nInterrupted: what is finished is kept in {folder}; the same command goes on.", file=sys.stderr)
        return 130
    axes = [name for name in dict.fromkeys(name for one in grid for name in one) if results[name].nunique() > 1]
    shown = [name for name in SHOWN if name != "reason" or results["reason"].notna().any()]
    print(results[[*axes, *shown]].to_string(index=False, na_rep="", float_format="{:.4g}".format))
    if results["reason"].isna().any():
        from tclib.nb.sweeps import sweep_report  # brings torch along, for which no refusal should wait

        print(f"\nReport:  {sweep_report.write(load_results(folder), folder)}")
    return int(results["reason"].notna().any())


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; exits with argparse's message if it is malformed."""
    parser = argparse.ArgumentParser(prog="python -m tclib sweep", allow_abbrev=False)
    parser.add_argument(
        "--grid", type=Path, help="JSON file: {parameter: [values]}, or a list of such (default: 12 runs)"
    )
    parser.add_argument("--folder", type=Path, help="where the results are kept (default: runs/sweep)")
    parser.add_argument("--scheduler", help="address of a running Dask scheduler (default: this machine)")
    parser.add_argument(
        "-p",
        dest="axes",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUES"),
        help='one value or a list for every run, such as -p seed "[0, 1, 2]"; may be repeated',
    )
    return parser.parse_args(arguments)


def read_grid(file: Path | None) -> list[dict[str, Any]]:
    """The grids of a file; without one, the small sweep. Raises ValueError if it is not a grid."""
    if file is None:
        return SMALL
    try:
        grid = json.loads(read_text(file))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a grid ({error}): write JSON such as {EXAMPLE}") from None
    grids = grid if isinstance(grid, list) else [grid]
    if not all(isinstance(one, dict) for one in grids):
        raise ValueError(f"{file} is not a grid: write JSON such as {EXAMPLE}, or a list of such")
    return grids


def with_axes(
    grids: Sequence[dict[str, Any]], given: Sequence[tuple[str, str]], declared: Mapping[str, Parameter]
) -> list[dict[str, Any]]:
    """The grids with axes from the command line, which replace those of the same name.

    What the notebook declares as text stays as it was written. Raises ValueError for numbers in a list of texts.
    """
    axes = {}
    for name, text in given:
        value, is_text = literal(text), name in declared and isinstance(declared[name].default, str)
        axes[name] = value if isinstance(value, list) else [text if is_text and not isinstance(value, str) else value]
        if is_text and not all(isinstance(one, str) for one in axes[name]):
            texts = [str(one) for one in axes[name]]
            raise ValueError(f'{name} = {text} is not a list of texts: write -p {name} "{texts}"')
        axes[name] = [placed(name, one) for one in axes[name]]
    return [{**one, **axes} for one in grids]
