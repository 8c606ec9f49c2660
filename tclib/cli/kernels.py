"""Notebooks in kernels of their own, one on each core: their results as they come, with time and memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import psutil

from tclib.cli.bootstrap import disk_sentence
from tclib.io.paths import with_diagrams
from tclib.nb import find_headline, why

KERNEL_MEMORY = 2 * 10**9  # bytes, with room: what most notebooks take at most
SECONDS = 0.25  # between two looks at what a kernel takes, each of which reads the list of all processes


@dataclass(frozen=True)
class Result:
    """One executed notebook."""

    name: str
    seconds: float
    gigabytes: float  # the most memory that its kernel took
    headline: str
    path: Path
    failed: bool


def as_finished(tasks: Sequence[tuple[Path, Path, dict[str, Any]]]) -> Iterator[Result]:
    """Results of `execute` as they come, one notebook on each core; when the caller leaves early, all kernels end.

    Raises:
        OSError: the disk takes no more.
        BrokenExecutor: a process was killed.
    """
    from tclib.io.memory import available_memory

    cores = os.cpu_count() or 1
    side_by_side = max(1, min(cores, len(tasks), available_memory() // KERNEL_MEMORY))
    threads = cores // side_by_side
    with ProcessPoolExecutor(side_by_side, get_context("spawn"), begin, (threads,)) as pool:
        try:
            for future in as_completed([pool.submit(execute, *task) for task in tasks]):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in active_children():  # a kernel without a parent ends by itself
                worker.terminate()
            raise


def begin(threads: int) -> None:
    """What a worker does first: its kernels share the cores, and ctrl-C, which reaches it too, is the caller's."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def execute(source: Path, target: Path, parameters: dict[str, Any]) -> Result:
    """Execute one notebook into ``target``, which is kept if a cell fails.

    Raises:
        OSError: the disk takes no more; nothing is left of ``target``.
    """
    import papermill

    start = time.monotonic()
    problem, gigabytes = None, [0.0]
    try:
        with stderr_to(target.parent / "kernels.log"), peak() as gigabytes:
            papermill.execute_notebook(
                source,
                target,
                parameters=parameters,
                kernel_name="python3",
                progress_bar=False,
                # What a notebook writes by a relative path lands beside its results.
                cwd=target.parent,
            )
    except Exception as error:  # a dead kernel, say: the notebooks after it still run
        if isinstance(error, OSError) and disk_sentence(error):
            target.unlink(missing_ok=True)  # cut off in the middle
            raise
        problem = f"FAILED {why(error)}"
    seconds = time.monotonic() - start
    if problem is None:
        text = with_diagrams(target.read_text(encoding="utf-8"), source.parent, target.parent)
        target.write_text(text, encoding="utf-8", newline="\n")
        executed = json.loads(text)
        headline = find_headline(executed) or "no headline"
        return Result(source.stem, seconds, gigabytes[0], headline, target, failed=False)
    return Result(source.stem, seconds, gigabytes[0], problem, target, failed=True)


@contextlib.contextmanager
def peak() -> Iterator[list[float]]:
    """The most memory, in gigabytes, that all processes started by this one took at any time: a list of one number.

    Pages of files that they map, such as weights, count; what comes and goes between two looks may be missed.
    """
    gigabytes, done, own = [0.0], threading.Event(), psutil.Process()

    def watch() -> None:
        while not done.wait(SECONDS):
            total = 0
            for process in own.children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                    total += process.memory_info().rss
            gigabytes[0] = max(gigabytes[0], total / 1e9)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield gigabytes
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def stderr_to(log: Path) -> Iterator[None]:
    """Send what kernels say outside their notebooks to a file: start-up warnings, the traceback
    of one that is interrupted, the last words of one that dies."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
