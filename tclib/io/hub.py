"""Models and transcoders from the Hugging Face hub: downloaded once, checked, then read from the cache.

The cache, retries and resuming within a run, progress bars, tokens and the settings HF_ENDPOINT, HF_HOME and
HF_HUB_OFFLINE are huggingface_hub's. Added here: only the files asked for, a look at the disk before, checksums after,
and one sentence when something fails. (`hf cache verify` checks too, but as a step of its own that may come too late.)
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import huggingface_hub as hub
from huggingface_hub import constants, errors

MODELS = {  # short names
    "gpt2": "openai-community/gpt2",
    "gpt2-small": "openai-community/gpt2",
    "pythia-410m": "EleutherAI/pythia-410m",
    "pythia-1.4b": "EleutherAI/pythia-1.4b",
    "smollm2": "HuggingFaceTB/SmolLM2-135M",
}
TRANSCODERS = {name: "pchlenski/gpt2-transcoders" for name in ("gpt2", "gpt2-small")}

Choose = Callable[[list[str]], list[str]]
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


@dataclass(frozen=True)
class HubId:
    """``owner/name``, ``owner/name/folder/in/it``, either with ``@revision`` (a branch, tag or commit)."""

    repo: str
    folder: str = ""
    revision: str = "main"

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision != "main" else "")


def parse(text: str) -> HubId | None:
    """The hub id that a text is, or None if it is not one."""
    found = re.fullmatch(r"([\w\-.]+/[\w\-.]+)((?:/[\w\-.]+)*)(?:@([\w\-./]+))?", text)
    if not found or any(part in (".", "..") for part in re.split("[/@]", text)):
        return None
    return HubId(found[1], found[2].strip("/"), found[3] or "main")


def fetch(source: HubId, choose: Choose) -> tuple[Path, list[str]]:
    """The snapshot's folder, and the files in it that ``choose`` picked from the names of all.

    Raises:
        ValueError: it is neither in the cache nor to be had, or what came is not what the hub announced.
    """
    try:
        info = hub.HfApi().model_info(source.repo, revision=source.revision, files_metadata=True)
    except errors.GatedRepoError:
        raise ValueError(f"{source.repo} is gated: accept its licence on its page, then run `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"there is no {source.repo} on the hub (or it is private: then run `hf auth login`)") from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{source.repo} has no revision {source.revision!r}") from None
    except errors.HFValidationError:
        raise ValueError(f"{source.repo!r} is not the name of a repository: write owner/name") from None
    except Exception as error:  # off-line, a broken connection, a server in trouble: only the cache can help
        return _cached(source, choose, error)
    files, sha = {file.rfilename: file for file in info.siblings or ()}, str(info.sha)
    chosen = choose(_safe(source, files))
    store = _store(source)
    folder, record = store / "snapshots" / sha, Record.read(store, sha)
    missing = [name for name in chosen if name not in record.whole or not (folder / name).is_file()]
    if missing or not (store / "refs" / source.revision).is_file():
        _check_space(source, sum(files[name].size or 0 for name in missing if not (folder / name).is_file()))
        Record(sorted(files), record.whole).write(store, sha)
        _download(source, chosen, sha)
        for name in missing:
            _verify(folder / name, files[name])
        Record(sorted(files), sorted({*record.whole, *chosen})).write(store, sha)
    return folder, chosen


@dataclass(frozen=True)
class Record:
    """What a commit holds, and what of it was downloaded and checked; kept in the cache beside the files.

    Without it, part of a set would pass for the whole one off-line.
    """

    names: list[str]
    whole: list[str]

    @classmethod
    def read(cls, store: Path, sha: str) -> Record:
        try:
            return cls(**json.loads((store / "tclib" / f"{sha}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return cls([], [])

    def write(self, store: Path, sha: str) -> None:
        (store / "tclib").mkdir(parents=True, exist_ok=True)
        (store / "tclib" / f"{sha}.json").write_text(json.dumps(self.__dict__, indent=1), encoding="utf-8")


def _download(source: HubId, names: list[str], sha: str) -> None:
    try:
        folder = hub.snapshot_download(
            source.repo, revision=source.revision, allow_patterns=[glob.escape(name) for name in names]
        )
    except Exception as error:
        cause = error
        while cause is not None and getattr(cause, "errno", None) not in _FULL:
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise ValueError(
                f"the disk is full: {source} did not fit into {constants.HF_HUB_CACHE}; free space or set HF_HOME to "
                "another disk, then run again: files that are whole are kept"
            ) from error
        raise ValueError(
            f"the download of {source} broke off ({_one_line(error)}): run again, files that are whole are kept"
        ) from error
    if Path(folder).name != sha:
        raise ValueError(f"{source} changed during the download: run again, or name a commit (@...) to pin it")


def _cached(source: HubId, choose: Choose, error: Exception) -> tuple[Path, list[str]]:
    missing = (
        f"{source} is not in the cache ({constants.HF_HUB_CACHE}) and the hub cannot be reached "
        f"({_one_line(error)}); run once with a network, or use model='bundled' and transcoders='bundled'"
    )
    store = _store(source)
    ref = store / "refs" / source.revision
    sha = ref.read_text(encoding="utf-8").strip() if ref.is_file() else source.revision
    folder, record = store / "snapshots" / sha, Record.read(store, sha)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    try:
        chosen = choose(_safe(source, record.names or present))  # without a record, another program put them there
    except ValueError:
        chosen = []
    if not chosen or not present.issuperset(chosen) or (record.names and not set(record.whole).issuperset(chosen)):
        raise ValueError(missing) from error
    return folder, chosen


def _store(source: HubId) -> Path:
    return Path(constants.HF_HUB_CACHE) / f"models--{source.repo.replace('/', '--')}"


def _safe(source: HubId, names: Iterable[str]) -> list[str]:
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise ValueError(f"{source} lists a file {name!r}, which would leave its folder: nothing was downloaded")
    return sorted(names)


def _check_space(source: HubId, needed: int) -> None:
    place = Path(constants.HF_HUB_CACHE)
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ValueError(
            f"{source} needs {needed / 1e9:.1f} GB and {place} has {free / 1e9:.1f} GB: set HF_HOME to another disk"
        )


def _verify(path: Path, announced) -> None:
    """Git names a file by the SHA-1 of its content, LFS by the SHA-256."""
    size = path.stat().st_size
    lfs = announced.lfs.sha256 if announced.lfs else None
    start = hashlib.sha256 if lfs else lambda: hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, start)
    if digest.hexdigest() != (lfs or announced.blob_id):
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise ValueError(
            f"{path.name} arrived damaged: its checksum is not the one the hub announced. It was deleted; run again"
        )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:150]}" if text else type(error).__name__
