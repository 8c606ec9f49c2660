"""Check memory requirements before running."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")  # containers are allowed less than the machine has


def available_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that can be taken now without swapping."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        limit, used = (int((_CGROUP / f"memory.{name}").read_text(encoding="utf-8")) for name in ("max", "current"))
        parts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="utf-8").splitlines())
        return min(free, limit - used + int(parts.get("inactive_file", 0)))  # cached files give way
    except (OSError, ValueError):  # no container, or no limit
        return free


def check_memory(needs: Mapping[str, int], device: torch.device | str = "cpu") -> pd.DataFrame:
    """What each part needs and what is there, in GB, as a table.

    Args:
        needs: bytes by part, for example ``{"model": ..., "transcoders": ..., "peak": ...}``.

    Raises:
        ValueError: together they need more than is available.
    """
    there, total = available_memory(device), sum(needs.values())
    if total > there:
        parts = " + ".join(f"{name} {size / 1e9:.1f}" for name, size in needs.items())
        raise ValueError(
            f"this needs {parts} = {total / 1e9:.1f} GB of memory and {there / 1e9:.1f} GB are available: close other "
            "programs, choose fewer layers or a smaller dtype, or use model='bundled'"
        )
    sizes = pd.Series({**needs, "together": total, "available": there}, name="GB") / 1e9
    return sizes.rename_axis("part").to_frame()
