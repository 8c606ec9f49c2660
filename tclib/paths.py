"""Where the bundled files are, whatever the working directory."""

from __future__ import annotations

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
