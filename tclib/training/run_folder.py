"""A run's folder: configuration, checkpoints that appear whole or not at all, and the log.

run.json                  what the run is; a run that goes on must be the same
step_00000250.safetensors  everything that step 250 depends on; the last two are kept
log.jsonl                  one line per record
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from tclib.io.paths import read_text, write_whole
from tclib.training import distributed
from tclib.training.config import with_new_names
from tclib.training.trainer import SCALES, Trainer

KEPT = 2


class RunFolder:
    """Checkpoints and log of one run. Only process 0 writes.

    Raises:
        ValueError: the folder belongs to a run with other settings (the first that differs is named), or it cannot be
            written.
    """

    def __init__(self, folder: str | Path, about: dict, seconds: float):
        self.folder, self.seconds = Path(folder), seconds
        self.saved_at = time.monotonic()
        about = json.loads(json.dumps(about))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if (self.folder / "run.json").exists():
                _refuse_another(json.loads(read_text(self.folder / "run.json")), about, self.folder)
            elif distributed.rank() == 0:
                write_whole(self.folder / "run.json", json.dumps(about, indent=2).encode())
        except OSError as error:
            raise ValueError(f"the run cannot be kept in {self.folder} ({error.strerror}): free or change it") from None

    def checkpoints(self) -> list[Path]:
        """The complete ones, oldest first."""
        return sorted(self.folder.glob("step_*.safetensors"))

    def restore(self, trainers: Mapping[str, Trainer]) -> int:
        """Load the newest readable checkpoint and give its step; 0 and untouched trainers if there is none."""
        for path in reversed(self.checkpoints()):
            try:
                tensors = load_file(path)
            except (SafetensorError, OSError) as error:
                warnings.warn(f"{path.name} is damaged and is passed over: {error}", stacklevel=4)
                continue
            for name, trainer in trainers.items():
                mine = {k.removeprefix(f"{name}:"): v for k, v in tensors.items() if k.startswith(f"{name}:")}
                _refuse_another_model(mine, trainer, self.folder)
                trainer.restore(mine)
            return int(path.stem.removeprefix("step_"))
        return 0

    def start(self, trainers: Mapping[str, Trainer]) -> None:
        """Write the first checkpoint, so that a disk that is full or read-only is found before any training."""
        if distributed.rank() > 0 or self.checkpoints():
            return
        try:
            self._write(0, trainers)
            size = sum(path.stat().st_size for path in self.checkpoints())
            with open(self.folder / "room.part", "wb") as file:  # each later one also holds two Adam moments
                file.write(bytes(3 * size))
        except OSError as error:
            raise ValueError(
                f"checkpoints cannot be written to {self.folder} ({error.strerror}): free some space or choose another"
            ) from None
        finally:
            (self.folder / "room.part").unlink(missing_ok=True)

    def due(self) -> bool:
        return time.monotonic() - self.saved_at >= self.seconds

    def save(self, step: int, trainers: Mapping[str, Trainer]) -> None:
        """Write a checkpoint; if the disk refuses, warn, keep the older ones and train on."""
        if distributed.rank() > 0:
            return
        self.saved_at = time.monotonic()
        try:
            self._write(step, trainers)
        except OSError as error:
            warnings.warn(
                f"no checkpoint at step {step} ({error.strerror}); the last good one is {self.last()}", stacklevel=3
            )

    def last(self) -> str:
        """The newest checkpoint's file name, for messages."""
        return self.checkpoints()[-1].name if self.checkpoints() else "none"

    def _write(self, step: int, trainers: Mapping[str, Trainer]) -> None:
        tensors = {f"{name}:{key}": t for name, s in trainers.items() for key, t in s.state().items()}
        content = save({key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()})
        write_whole(self.folder / f"step_{step:08d}.safetensors", content)
        for old in self.checkpoints()[:-KEPT]:
            old.unlink()

    def records(self, before: int) -> list[dict]:
        """Records of the steps before ``before``; later and half-written lines are removed from the log."""
        path = self.folder / "log.jsonl"
        records = []
        if path.exists():
            for line in read_text(path).splitlines():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError:
                    break
        records = [record for record in records if record["step"] < before]
        if distributed.rank() == 0:
            write_whole(path, "".join(json.dumps(record) + "\n" for record in records).encode())
        return records

    def log(self, record: dict) -> None:
        if distributed.rank() > 0:
            return
        try:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            warnings.warn(f"a line of log.jsonl was lost ({error.strerror})", stacklevel=3)


def _refuse_another(old: dict, new: dict, folder: Path) -> None:
    for key in ("layers", "text"):
        if old[key] != new[key]:
            raise ValueError(f"the run in {folder} was begun with {key} {old[key]}, not {new[key]}: use another folder")
    for name in old["settings"].keys() | new["settings"].keys():
        before, now = with_new_names(old["settings"].get(name, {})), new["settings"].get(name, {})
        for key in before.keys() | now.keys():
            if before.get(key) != now.get(key):
                raise ValueError(
                    f"the run in {folder} was begun with {key} = {before.get(key)}, not {now.get(key)} ({name}): "
                    "use the same, or another folder"
                )


def _refuse_another_model(tensors: dict[str, Tensor], trainer: Trainer, folder: Path) -> None:
    for name in SCALES:
        before, now = tensors[f"scale.{name}"], getattr(trainer, name).cpu()
        if before.shape != now.shape or not torch.allclose(before.to(now), now, rtol=1e-2, atol=1e-2):
            raise ValueError(f"the run in {folder} was begun with another model: its activations differ")
