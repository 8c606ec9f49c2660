"""Execute notebooks in place, for their authors: `python tools/execute.py notebooks/04*.ipynb`.

The file is written only if every cell succeeded, and without timings, widget state or anything
else that would change from run to run. (nbclient, because papermill adds its own metadata.)
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
CELL_TIMEOUT = 600


def execute(path: Path) -> float:
    """Execute a notebook in place and return the minutes it took.

    Raises:
        CellExecutionError, CellTimeoutError, DeadKernelError: a cell failed; the file is untouched.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["kernelspec"] = dict(KERNEL)
    start = time.monotonic()
    NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=CELL_TIMEOUT,
        record_timing=False,
        # Else each kernel warns about its local TCP connection.
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        # The folder in which JupyterLab and nbmake would run it.
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    minutes = (time.monotonic() - start) / 60
    clean(notebook)
    about = dict(notebook.metadata.get("tclib", {}))
    about["minutes"] = steady_minutes(about.get("minutes"), minutes)
    notebook.metadata["tclib"] = about
    write(notebook, path)
    return minutes


def clean(notebook: nbformat.NotebookNode) -> None:
    """Remove what changes from run to run; cell ids and tags stay."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata.pop("papermill", None)
    notebook.metadata["kernelspec"] = dict(KERNEL)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        for noise in ("execution", "papermill", "collapsed", "scrolled"):
            cell.metadata.pop(noise, None)
        if cell.cell_type == "code":
            cell.outputs = merge_streams(cell.outputs)
            for output in cell.outputs:
                # A widget is dead without its kernel, and its id is another one at every run.
                output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
                mask_addresses(output)


def merge_streams(outputs: Sequence[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Join neighbouring prints: the kernel splits them wherever a buffer happened to be full."""
    merged: list[nbformat.NotebookNode] = []
    for output in outputs:
        last = merged[-1] if merged else {}
        if output.output_type == "stream" and output.name == last.get("name"):
            last["text"] += output.text
        else:
            merged.append(output)
    return merged


def mask_addresses(output: nbformat.NotebookNode) -> None:
    """Replace memory addresses in text, which differ on every run."""
    if "text" in output:
        output["text"] = re.sub(r"0x[0-9a-f]{6,}", "0x...", output["text"])
    for kind, text in output.get("data", {}).items():
        if kind.startswith("text/"):
            output["data"][kind] = re.sub(r"0x[0-9a-f]{6,}", "0x...", text)


def steady_minutes(old: float | None, measured: float) -> float:
    """Minutes to record: the old figure unless the new one is off by more than half."""
    new = max(0.1, round(measured, 1))
    if old and abs(new - old) <= 0.5 * old:
        return old
    return new


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Replace the file in one step, so that an interruption cannot leave half a notebook."""
    partial = path.with_name(path.name + ".partial")
    nbformat.write(notebook, partial)
    os.replace(partial, path)


def main(arguments: Sequence[str]) -> int:
    """Execute each notebook named; return 1 if one failed."""
    if not arguments:
        print("usage: python tools/execute.py NOTEBOOK...", file=sys.stderr)
        return 2
    # A kernel called python3 elsewhere on the machine must not be picked.
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    failed = False
    for name in arguments:
        try:
            print(f"{name}: {execute(Path(name)):.1f} minutes", flush=True)
        except (CellExecutionError, TimeoutError, DeadKernelError) as error:
            print(f"{name}: FAILED, file unchanged\n{error}", file=sys.stderr)
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
