"""What a sweep leaves behind: one directory per run, small typed JSON, and a marker that is written last.

FOLDER/sweep.json            which notebook and which version made these results
FOLDER/<hash>/notebook.ipynb  the executed notebook, also of a run that failed
FOLDER/<hash>/run.json       parameters, and the point or the reason why there is none
FOLDER/<hash>/finished       empty; a directory without it is run again
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from tclib import __version__
from tclib.io.paths import data_path, read_text, write_whole
from tclib.nb.sweeps.grid import run_name

MIME = "application/vnd.tclib.point+json"  # how a notebook hands its point to the sweep
Share = Field(ge=0, le=1)


class _Typed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Point(_Typed):
    """One trained dictionary: the columns of `tclib.evaluation.evaluate` on one layer."""

    tokens: PositiveInt
    l0: NonNegativeFloat  # active features per token
    fvu: NonNegativeFloat
    cosine: float = Field(ge=-1.001, le=1.001)
    dead: float = Share
    dense: float = Share
    ce: NonNegativeFloat  # nats; the untouched model, then its MLP replaced by the dictionary, by zero, by its mean
    ce_replaced: NonNegativeFloat
    ce_zero: NonNegativeFloat
    ce_mean: NonNegativeFloat
    recovered: float
    kl: float
    top1: float = Share

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """Shown as the last line of a cell, a point is both text and JSON: the sweep reads the second."""
        text = "\n".join(f"{name:12} {value:.4g}" for name, value in self.model_dump().items())
        return {MIME: self.model_dump(), "text/plain": text}


class Run(_Typed):
    """One run of the grid."""

    parameters: dict[str, JsonValue]
    seconds: NonNegativeFloat
    point: Point | None = None
    reason: str | None = None  # why there is no point

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Run:
        if (self.point is None) == (self.reason is None):
            raise ValueError("a run has a point, or a reason why not")
        return self


class About(_Typed):
    """What made the results of a folder."""

    format: Literal[1] = 1
    tclib: str = __version__
    notebook: str
    code: str  # `grid.code_hash` of the notebook


class Results(_Typed):
    """All results in one file, without the notebooks."""

    about: About
    runs: list[Run]


def results_folder(path: str | Path, about: About) -> Path:
    """The folder of a sweep's results, made if it is not there; its path is absolute.

    Raises:
        ValueError: the folder cannot be written, or holds results of another version or notebook (the first thing
            that differs is named).
    """
    path = Path(path).absolute()
    file = path / "sweep.json"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if file.exists():
            _refuse_another(_read(file, About), about, path)
        write_whole(file, about.model_dump_json(indent=2).encode())
    except OSError as error:
        raise ValueError(f"results cannot be written to {path} ({error.strerror}): choose another folder") from None
    return path


def write_run(directory: Path, run: Run) -> None:
    """Write a run's result; the marker comes last, and only if there is a point."""
    write_whole(directory / "run.json", (run.model_dump_json(indent=2) + "\n").encode())
    if run.point:
        write_whole(directory / "finished", b"")


def read_run(directory: Path) -> Run | None:
    """The result of a run; None if it was not begun, not brought to its end, or is damaged: it is run again."""
    try:
        run = _read(directory / "run.json", Run)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return run if run.reason or (directory / "finished").exists() else None


def load_results(where: str | Path = "bundled") -> Results:
    """Results from a sweep's folder, from a file that `save_results` wrote, or those of the larger sweep (bundled).

    Raises:
        ValueError: no results there, or of another format.
    """
    path = data_path("sweep.json") if where == "bundled" else Path(where)
    if path.is_file():
        return _read(path, Results)
    if not (path / "sweep.json").is_file():
        raise ValueError(f"there are no results in {path}: give the folder of a sweep, or 'bundled'")
    runs = (read_run(directory) for directory in sorted(path.iterdir()))
    return Results(about=_read(path / "sweep.json", About), runs=[run for run in runs if run])


def save_results(results: Results, path: str | Path) -> None:
    """Write results into one file, one line per run."""
    lines = ",\n".join(run.model_dump_json() for run in results.runs)
    write_whole(Path(path), f'{{"about": {results.about.model_dump_json()}, "runs": [\n{lines}\n]}}\n'.encode())


COLUMNS = ["run", *Point.model_fields, "seconds", "reason"]


def table(results: Results) -> pd.DataFrame:
    """One row per run: ``run`` (its directory), the parameters, the columns of `Point`, ``seconds`` and ``reason``."""
    rows = []
    for run in results.runs:
        point = run.point.model_dump() if run.point else {}
        rows.append({"run": run_name(run.parameters), **run.parameters, **point, "seconds": run.seconds})
        rows[-1]["reason"] = run.reason
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in ("seconds", "reason")))
    return pd.DataFrame(rows, columns=[*columns, "seconds", "reason"])


def _read(path: Path, kind: type[_Typed]) -> Any:
    try:
        return kind.model_validate_json(read_text(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(
            f"{path} does not hold results of this version of tclib ({where}: {first['msg']}): use another folder"
        ) from None


def _refuse_another(old: About, new: About, folder: Path) -> None:
    for name, words in {"tclib": "tclib", "notebook": "the notebook", "code": "the notebook's code"}.items():
        before, now = getattr(old, name), getattr(new, name)
        if before != now:
            raise ValueError(
                f"the results in {folder} were made with {words} {before}, not {now}: use another folder, since "
                "old and new results would stand side by side"
            )
