"""`python -m tclib run`: execute the notebooks, one on each core, without touching the committed ones."""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

from tclib.cli.bootstrap import REPO, disk_sentence
from tclib.cli.kernels import Result, as_finished
from tclib.cli.prepare import Refused, own_model, prepare
from tclib.io.paths import read_text
from tclib.nb import (
    Parameter,
    ParameterError,
    assigned_literals,
    declared_parameters,
    unknown_parameter,
)

PLACES = ("model", "transcoders", "results", "text", "second_text", "prompt_file")  # may name a file or a folder


def run(arguments: Sequence[str], repo: Path = REPO) -> int:
    """Run the notebooks; return 0, or 1 if one failed, 2 if refused, 130 if interrupted."""
    options = parse(arguments)
    try:
        parameters = read_parameters(options)
        notebooks = select(repo / "notebooks", options.only)
        if options.only is None:
            notebooks = [path for path in notebooks if own_model(path) is None]
        for notebook in notebooks:
            check(notebook, parameters)
        folder = unused_folder(repo / "runs", options.name)
        prepare(parameters, notebooks)
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    folder.mkdir(parents=True)
    results: list[Result] = []
    status = 0
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends the kernels too
    try:
        for result in as_finished([(path, folder / path.name, typed(path, parameters)) for path in notebooks]):
            results.append(result)
            counted = f"[{len(results)}/{len(notebooks)}] {result.name}"
            print(f"{counted} ... {result.seconds:.0f} s, {result.gigabytes:.1f} GB, {result.headline}", flush=True)
    except KeyboardInterrupt:
        print(f"\nInterrupted: what is finished is kept in {folder}.", file=sys.stderr)
        status = 130
    except OSError as error:
        if not (sentence := disk_sentence(error)):
            raise
        print(f"\n{sentence} What is finished is kept in {folder}.", file=sys.stderr)
        status = 1
    except BrokenExecutor:
        print(f"\nA kernel was killed, perhaps for its memory. What is finished is kept in {folder}.", file=sys.stderr)
        status = 1
    finally:
        signal.signal(signal.SIGTERM, before)
    results.sort(key=lambda result: result.name)
    for path in folder.glob("*.ipynb"):  # cut off in the middle
        if path not in {result.path for result in results}:
            path.unlink()
    if results:
        print(f'\n{table(results)}\n\nOpen them:  python -m tclib lab --name "{folder.name}"')
    return status or int(any(result.failed for result in results))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; exits with argparse's message if it is malformed."""
    parser = argparse.ArgumentParser(prog="python -m tclib run", allow_abbrev=False)
    parser.add_argument("--name", help="folder in runs/ (default: the time)")
    parser.add_argument("--only", help="notebooks to run, by number or by how their names start: 04 or 04,06")
    parser.add_argument("--model", help="the parameter `model` of every notebook")
    parser.add_argument(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter of the notebooks that run; may be repeated",
    )
    return parser.parse_args(arguments)


def read_parameters(options: argparse.Namespace) -> dict[str, str]:
    """The parameters to inject, as they were written."""
    parameters = {name: placed(name, text) for name, text in options.parameters}
    if options.model is not None:
        parameters["model"] = placed("model", options.model)
    return parameters


def placed(name: str, value: Any) -> Any:
    """``value``, absolute if it is the name of a file or folder that is there: a notebook runs in another folder."""
    return str(Path(value).absolute()) if name in PLACES and isinstance(value, str) and Path(value).exists() else value


def typed(notebook: Path, parameters: dict[str, str]) -> dict[str, Any]:
    """The values of the parameters that a notebook declares. What it declares as text stays as it was written.

    Raises Refused for a value of another type than the default's, with the way to write it here.
    """
    defaults = declared_defaults(json.loads(read_text(notebook)))
    values = {}
    for name, text in parameters.items():
        if name in defaults:
            default, value = defaults[name], literal(text)
            values[name] = text if isinstance(default, str) and not isinstance(value, str) else value
            try:
                if default is not None:
                    Parameter(default).check(name, values[name])
            except ParameterError:
                raise Refused(
                    f"{notebook.name}: {name} = {text} has the wrong type: write it like the default, "
                    f"-p {name} {shlex.quote(str(default))}"
                ) from None
    return values


def literal(text: str) -> Any:
    """``text`` as a Python literal where it is one (2, 1e-3, True, [1, 2]), else as text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def select(folder: Path, only: str | None) -> list[Path]:
    """The notebooks to run, in reading order: 04 is that number alone, not 04b. Raises Refused if one is not there."""
    notebooks = sorted(folder.glob("[0-9][0-9]*_*.ipynb"))
    if only is None:
        if not notebooks:
            raise Refused(f"There are no notebooks in {folder}.")
        return notebooks
    prefixes = [prefix.strip() for prefix in only.split(",")]
    chosen: set[Path] = set()
    for prefix in prefixes:
        exact = {path for path in notebooks if path.name.split("_")[0] == prefix}
        found = exact or {path for path in notebooks if prefix and path.name.startswith(prefix)}
        if not found:
            names = ", ".join(path.stem for path in notebooks)
            raise Refused(f"No notebook starts with {prefix!r}; there are: {names}.")
        chosen |= found
    return [path for path in notebooks if path in chosen]


def check(notebook: Path, parameters: dict[str, str]) -> None:
    """Raise Refused if the notebook does not declare one of the parameters, or would refuse its value."""
    parsed = json.loads(read_text(notebook))
    known, declared = list(declared_defaults(parsed)), {}
    with contextlib.suppress(ValueError):  # bounds that only its kernel can know
        declared = declared_parameters(parsed)
    for name in parameters:
        if name not in known:
            raise Refused(f"{notebook.name}: {unknown_parameter(name, known)}")
    for name, value in typed(notebook, parameters).items():
        if name in declared:
            try:
                declared[name].check(name, value)
            except ParameterError as error:
                raise Refused(f"{notebook.name}: {error}") from None


def declared_defaults(notebook: dict[str, Any]) -> dict[str, Any]:
    """Names and values set by the cell tagged ``parameters``; None for a value that is no literal."""
    for cell in notebook["cells"]:
        if "parameters" in cell["metadata"].get("tags", ()):
            return assigned_literals("".join(cell["source"]))
    return {}


def unused_folder(runs: Path, name: str | None) -> Path:
    """The folder of a new run. Raises Refused if the name is not a plain folder name, or is in use."""
    name = name or time.strftime("%Y-%m-%d_%H-%M-%S")
    if Path(name).name != name:
        raise Refused(f"{name!r} is not a folder name: write a name without slashes.")
    folder = runs / name
    if folder.exists():
        raise Refused(f"{folder} is there already: give this run another --name, or delete that folder.")
    return folder


def table(results: Sequence[Result]) -> str:
    """The results as aligned text."""
    rows = [("notebook", "seconds", "GB", "headline", "path")]
    for result in results:
        headline = "FAILED" if result.failed else result.headline
        rows.append((result.name, f"{result.seconds:.0f}", f"{result.gigabytes:.1f}", headline, str(result.path)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{name:{widths[0]}}  {seconds:>{widths[1]}}  {peak:>{widths[2]}}  {headline:{widths[3]}}  {path}"
        for name, seconds, peak, headline, path in rows
    )
