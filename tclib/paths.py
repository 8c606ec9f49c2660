"""Where the bundled files are, whatever the working directory, and how a file is written whole."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_path(*parts: str) -> Path:
    """Path of a bundled file or folder, for example ``data_path("model", "config.json")``.

    A wheel carries the data as ``tclib/data``; a clone has it beside the package, as ``data/``.

    Raises:
        FileNotFoundError: there is no such file or folder.
    """
    packaged = _PACKAGE / "data"
    root = packaged if packaged.is_dir() else _PACKAGE.parent / "data"
    path = root.joinpath(*parts)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: reinstall tclib, or restore data/ in your clone (`git checkout -- data`)."
        )
    return path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself must reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
