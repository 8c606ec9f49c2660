"""Where the runs are executed: this machine by default, or any Dask cluster that is handed over."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

RUN_MEMORY = 2 * 10**9  # bytes of one kernel that trains on the bundled model, with room


def local_cluster(tasks: int, task_memory: int = RUN_MEMORY) -> Any:
    """A `LocalCluster` that fits this machine: a worker per core, fewer if memory or tasks do not suffice for more.

    The cores are divided among the workers: matrix products of a task use no more threads than its worker's share.

    Raises:
        ValueError: the memory does not suffice for one task.
    """
    from dask.distributed import LocalCluster
    from dask.system import CPU_COUNT  # counts what a container may use

    from tclib.io.memory import available_memory  # imports torch, which workers do without

    memory = available_memory()
    if memory < task_memory:
        raise ValueError(
            f"one run needs about {task_memory / 1e9:.0f} GB of memory and {memory / 1e9:.1f} GB are available: "
            "close other programs, or hand over a cluster"
        )
    workers = max(1, min(CPU_COUNT, tasks, memory // task_memory))
    threads = str(max(1, CPU_COUNT // workers))
    return LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        memory_limit=memory // workers,
        env={name: threads for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")},
        # Ctrl-C reaches every process of a terminal; it is this one that tells the workers to stop.
        preload=["import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"],
        dashboard_address="127.0.0.1:0",
        silence_logs=logging.CRITICAL,
    )


@contextmanager
def connected(cluster: Any, tasks: int, task_memory: int = RUN_MEMORY) -> Iterator[Any]:
    """A Dask client of ``cluster``: what was handed over stays open, what was made here is closed.

    Args:
        cluster: None for this machine; a `dask.distributed.Client`; a cluster such as `SLURMCluster`; or the address
            of a running scheduler.

    Raises:
        ValueError: nobody answers at that address.
    """
    from dask.distributed import Client

    if isinstance(cluster, Client):
        yield cluster
        return
    own = local_cluster(tasks, task_memory) if cluster is None else None
    try:
        try:
            client = Client(own or cluster, set_as_default=False)
        except (OSError, TimeoutError) as error:
            raise ValueError(f"no Dask scheduler answers at {cluster!r} ({type(error).__name__})") from None
        with client:
            yield client
    finally:
        if own:
            own.close()
