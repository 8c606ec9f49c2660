"""Where the bundled files are, whatever the working directory, and how a file is written whole."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


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


def with_diagrams(notebook: str, notebooks: Path, folder: Path) -> str:
    """The text of a notebook from ``notebooks``, with its links to ``../docs`` as they are seen from ``folder``."""
    docs = os.path.relpath(notebooks.parent / "docs", folder).replace(os.sep, "/")
    return notebook.replace("](../docs/", f"]({docs}/")


def between_marks(page: str, name: str, new: str) -> str:
    """A page with the text between ``<!-- name:start -->`` and ``<!-- name:end -->`` replaced.

    Raises:
        ValueError: the page lacks one of the marks.
    """
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, found, rest = page.partition(start)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"the page lacks the markers {start} and {end}: put them where its table belongs")
    return f"{before}{start}\n{new}\n{end}{after}"


def decoded(content: bytes, path: Path) -> str:
    """Text of a file in UTF-8, whatever the platform's encoding; a byte order mark is no part of it.

    Raises:
        ValueError: another encoding.
    """
    try:
        text = content.decode("utf-8-sig")
        if "\0" not in text:
            return text.replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        pass
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content
    kind = "UTF-16, or no text" if marked else "latin-1 or another encoding, or damaged"
    raise ValueError(f"{path} is not text in UTF-8 (it may be {kind}): save it as UTF-8")


def read_text(path: Path) -> str:
    """`decoded`, of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: another encoding.
    """
    return decoded(path.read_bytes(), path)


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
    flush(path.parent)  # the rename itself must reach the disk


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; where the system can say so."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
