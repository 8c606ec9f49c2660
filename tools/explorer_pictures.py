"""Photograph the explorers of notebook 08 into docs/pictures/: `python tools/explorer_pictures.py`.

On the web a notebook has no kernel and its explorers are blank, so a picture of each stands beside its cell. The page
is that of `python -m tclib explore`. Needs Chromium and playwright, as tests/test_ui_browser.py does.
"""

from __future__ import annotations

import importlib
import io
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

REPO = Path(__file__).resolve().parents[1]
PICTURES = REPO / "docs" / "pictures"
EXPLORERS = {
    "microscope": "Prompt microscope",
    "browser": "Feature browser",
    "walker": "Attribution walker",
    "editor": "Circuit editor",
    "weights": "Weights explorer",
    "laboratory": "Greater-than laboratory",
}
WIDTH, COLOURS = 1240, 128
PATIENCE = 300_000  # milliseconds until the notebook behind the page has run


def main() -> None:
    # Like pytest's importorskip: a package that this one tool needs is no part of the environment.
    playwright_api = importlib.import_module("playwright.sync_api")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tclib.cli.commands", "explore", "--no-browser", f"--port={port}"]
    server = subprocess.Popen(command, cwd=REPO)
    try:
        with playwright_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"]
            )
            page = browser.new_page(viewport={"width": WIDTH, "height": 1400})
            for _ in range(240):
                try:
                    page.goto(f"http://127.0.0.1:{port}/", timeout=PATIENCE, wait_until="domcontentloaded")
                    break
                except Exception:  # the server is not up yet
                    time.sleep(0.5)
            page.locator("b", has_text=EXPLORERS["laboratory"]).wait_for(timeout=PATIENCE)
            page.wait_for_timeout(10_000)  # until all views are drawn
            PICTURES.mkdir(exist_ok=True)
            for name, title in EXPLORERS.items():
                box = page.locator(".tclib-explorer", has=page.locator("b", has_text=title)).first
                save(box.screenshot(), PICTURES / f"{name}.png")
            browser.close()
    finally:
        server.terminate()
        server.wait()


def save(png: bytes, path: Path) -> None:
    """A screenshot with few colours, which makes the file a fraction of its size."""
    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)
    print(f"{path.relative_to(REPO)}: {picture.width} x {picture.height}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
