"""Several processes under torchrun: what is summed, gathered and divided among them. One process: nothing is done.

torchrun --nproc-per-node 2 -m making.transcoders ...
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

Rows = TypeVar("Rows", Tensor, np.ndarray)


@contextmanager
def processes() -> Iterator[str]:
    """Join the other processes if torchrun started this one; gives the device to use (nccl on GPUs, gloo on CPUs)."""
    gpu = torch.cuda.is_available()
    if "RANK" not in os.environ:
        yield "cuda" if gpu else "cpu"
        return
    device = f"cuda:{os.environ['LOCAL_RANK']}" if gpu else "cpu"
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; number 0 writes files and shows progress."""
    return dist.get_rank() if dist.is_initialized() else 0


def share(rows: Rows) -> Rows:
    """This process's equal part of the rows that all processes know."""
    size = len(rows) // world()
    return rows[rank() * size : (rank() + 1) * size]


def total(value: Tensor) -> Tensor:
    """The sum over processes, in place."""
    if world() > 1:
        dist.all_reduce(value)
    return value


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, in their order; each must have as many."""
    if world() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
