"""`make explore` in a real browser: nothing is asked of another machine, and kernels of closed pages end.

Needs what tests/test_ui_browser.py needs, and is skipped without it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.test_ui_browser import browser, changes, comes, drawn, free_port, serving  # noqa: F401  (a fixture)

pytestmark = pytest.mark.slow


def kernels() -> list[psutil.Process]:
    """The kernels that servers of this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any("ipykernel" in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:  # ended meanwhile
            continue
    return found


def until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def opened(page, address: str):
    """The page, loaded or loaded again, when its last explorer is there."""
    page.goto(address, timeout=300_000, wait_until="domcontentloaded")
    page.locator("b", has_text="Greater-than laboratory").wait_for(timeout=300_000)
    return page.locator(".widget-vbox", has=page.locator(".widget-html b", has_text="Attribution walker")).first


def test_pages_stay_here_and_leave_no_kernels(browser, tmp_path: Path):  # noqa: F811
    port = free_port()
    address = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-m", "tclib.cli.commands", "explore", "--no-browser", f"--port={port}"]
    with serving(command, port, tmp_path):
        context = browser.new_context(viewport={"width": 1280, "height": 1000})
        requested = []
        context.on("request", lambda request: requested.append(request))
        page = context.new_page()
        for _ in range(3):
            walker = opened(page, address)
        assert until(lambda: len(kernels()) == 1, 90), f"{len(kernels())} kernels for one page"
        time.sleep(30)  # longer than an idle kernel without a page lives
        before = drawn(walker)
        walker.locator("button", has_text="down to it").click()
        assert comes(page, changes(walker, before)), "the kernel of an open page was ended"

        tried = page.evaluate(
            """() => new Promise(done => {
                document.addEventListener("securitypolicyviolation", event => done(event.blockedURI));
                new Image().src = "https://example.org/badge.svg"; })"""
        )
        assert tried == "https://example.org/badge.svg"
        here = (address, f"ws://127.0.0.1:{port}", "data:", "blob:")
        asked = [request.url for request in requested if not request.url.startswith(here) and request.failure != "csp"]
        assert not asked and len(requested) > 10  # what the policy refuses is listed, but never sent
        context.close()
        assert until(lambda: not kernels(), 90), f"{len(kernels())} kernels are left when no page is open"
