"""`python -m tclib lab`: on a copy, with JupyterLab's own options, as root too, and until SIGTERM."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tclib.cli import serve
from tests.conftest import REPO


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_lab_works_on_a_copy(tmp_path, write_notebook, capfd):
    write_notebook(tmp_path / "notebooks" / "00_a.ipynb", ["1 + 1"])
    ask_for_version = ["--name", "mine", "--version"]  # --version is JupyterLab's
    assert serve.lab(ask_for_version, tmp_path) == 0
    assert "git restore" not in capfd.readouterr().out
    copy = tmp_path / "runs" / "mine" / "00_a.ipynb"
    assert copy.read_bytes() == (tmp_path / "notebooks" / "00_a.ipynb").read_bytes()
    copy.write_text("mine", encoding="utf-8")
    assert serve.lab(ask_for_version, tmp_path) == 0 and copy.read_text(encoding="utf-8") == "mine"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine"]
    assert serve.lab(["--name", "a/b"], tmp_path) == 2
    assert "'a/b' is not a folder name" in capfd.readouterr().err
    assert serve.lab(["--version"], tmp_path) == 0
    assert "`git restore notebooks` brings the committed outputs back" in capfd.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="SIGTERM is of POSIX")
@pytest.mark.parametrize("command", ["lab", "explore"])
def test_server_takes_a_port_and_ends_at_sigterm(tmp_path, command):
    port = free_port()
    home = {"JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "JUPYTER_DATA_DIR": str(tmp_path / "data")}
    env = {**os.environ, **home, "TCLIB_VENV": "off", "PYTHONPATH": str(REPO)}
    line = ["make", command, f"PYTHON={sys.executable}", f"OPTIONS=--no-browser --port {port}"]
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        server = subprocess.Popen(line, cwd=REPO, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        until(lambda: answers(port) or server.poll() is not None)
        assert server.poll() is None, (tmp_path / "log").read_text(encoding="utf-8")
        server.terminate()
        assert server.wait(60)
        until(lambda: not answers(port))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
        return True
    return False


def until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.3)
