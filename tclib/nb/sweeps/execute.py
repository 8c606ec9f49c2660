"""One run of a sweep, on whatever machine it lands: papermill executes the notebook into the run's directory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import Context
from pathlib import Path
from typing import Any

from tclib.nb import why
from tclib.nb.sweeps.results import MIME, Point, Run, read_run, write_run


def execute(notebook: str, parameters: Mapping[str, Any], directory: str) -> Run:
    """Run the notebook and write the result; a failure is a result too, and its notebook is kept.

    Args:
        notebook: the notebook as JSON text, so that all runs of a sweep execute the same one.
        directory: of this run; the workers and the caller see it under the same absolute path.
    """
    import nbformat
    import papermill

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    done = read_run(folder)
    if done and done.point:  # another sweep was faster
        return done
    (folder / "run.json").unlink(missing_ok=True)  # of a failure that is tried again
    start, point, reason = time.monotonic(), None, None
    try:
        # Neither a working directory nor a redirection is asked for: both would be those of the whole process, and a
        # worker may run several notebooks in threads. Those share what a context holds, the event loop of an earlier
        # notebook for one, so each gets a context of its own.
        executed = Context().run(
            papermill.execute_notebook,
            nbformat.reads(notebook, as_version=4),
            folder / "notebook.ipynb",
            dict(parameters),
            kernel_name="python3",
            progress_bar=False,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        )
        shown = [o.get("data", {}) for cell in executed["cells"] for o in cell.get("outputs", ())]
        found = [data[MIME] for data in shown if MIME in data]
        if len(found) != 1:
            raise ValueError(
                f"the notebook shows {len(found)} points, not one: end it with a cell that shows its Point"
            )
        point = Point.model_validate(found[0])
    except Exception as error:  # whatever it is, the other runs go on
        reason = why(error)
    run = Run(parameters=dict(parameters), seconds=round(time.monotonic() - start, 1), point=point, reason=reason)
    write_run(folder, run)
    return run
