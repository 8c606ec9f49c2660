"""How much memory a notebook's kernel takes, watched from outside while it runs."""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType

import psutil

SECONDS = 0.25  # between two looks, each of which reads the list of all processes


class Peak:
    """``with Peak() as peak: ...``: the most memory that all processes started by this one took at any time.

    Pages of files that they map, such as weights, count; what comes and goes between two looks may be missed.
    """

    def __init__(self) -> None:
        self.gigabytes = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._done.wait(SECONDS):
            total = 0
            for process in own.children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                    total += process.memory_info().rss
            self.gigabytes = max(self.gigabytes, total / 1e9)
