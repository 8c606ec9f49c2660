"""Explorers in a real browser: JupyterLab in headless Chromium, driven by the keyboard; and Voila without a network.

Needs Chromium and playwright: `pip install playwright`, then `playwright install chromium`, or a system's own
Chromium, which is found by its name. Pictures are kept in build/screens/.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import REPO, notebook_dict

pytestmark = pytest.mark.slow
# The page but for circuitsvis' code, which has the word "unexpected" among its own messages.
WITHOUT_SCRIPTS = """() => {
    const page = document.documentElement.cloneNode(true);
    page.querySelectorAll("script").forEach((script) => script.remove());
    return page.outerHTML;
}"""
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

SCREENS = REPO / "build" / "screens"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
PROMPT = "The war lasted from the year 1732 to the year 17"
CELLS = {
    "set up": f"""
import tempfile
from pathlib import Path
import tclib as tc
from tclib import ui
from tclib.features import build_index, load_summary
lm, layers, prompt = tc.load_model(), tc.load_transcoders(), {PROMPT!r}
replacement = tc.ReplacementModel(lm, layers)
folder = tempfile.TemporaryDirectory()
where = build_index(replacement, tc.load_text(lm, "chronicle", 32), Path(folder.name) / "i")""",
    "Prompt microscope": "ui.Microscope(replacement, prompt)",
    "Feature browser": "ui.Browser(replacement, load_summary(replacement))",
    "Attribution walker": 'ui.Walker(replacement, prompt, "45", "20")',
    "Circuit editor": 'ui.Editor(replacement, prompt, "45", "20")',
    "Weights explorer": "ui.Weights(layers, where, 2, 1334)",
    "Greater-than laboratory": "ui.Lab(replacement)",
}
# What a hand does: which labelled control, and the keys or the click.
MOVES = {
    "Prompt microscope": [
        ("prompt", ["Control+a", "type:The siege lasted from 1545 to 15", "Enter"]),
        ("active here", ["ArrowDown"]),
        ("token", ["ArrowLeft", "ArrowLeft"]),
        ("layer", ["ArrowUp"]),
    ],
    "Feature browser": [
        ("found", ["ArrowDown"]),
        ("feature", ["Control+a", "type:107", "Enter"]),
        ("layer", ["ArrowUp"]),
        ("search by", "click:label"),
        ("for", ["type:year", "Enter"]),
    ],
    "Attribution walker": [
        ("source", ["ArrowDown"]),
        ("", "click:down to it"),
        ("", "click:up again"),
        ("rather than", ["Control+a", "Backspace", "Enter"]),
    ],
    "Circuit editor": [  # more in tests/test_graph_browser.py
        ("rather than", ["Control+a", "Backspace", "Enter"]),
        ("", "click:pin"),
        ("", "click:copy link"),
    ],
    "Weights explorer": [
        ("feature", ["Control+a", "type:107", "Enter"]),
        ("sources in", ["ArrowUp"]),
        ("by text:", "click:mean input x gradient"),
    ],
    "Greater-than laboratory": [
        ("YY", ["ArrowRight", "ArrowRight"]),
        ("kept", ["ArrowLeft", "ArrowLeft"]),
        ("taken out", ["Home", "ArrowDown"]),
        ("units", "click:neurons"),
    ],
}
QUIET = {("Feature browser", "search by")}  # a search for nothing finds nothing
WRONG = {
    "Prompt microscope": ("prompt", ["Control+a", "Backspace", "Enter"], "the prompt is empty"),
    "Feature browser": ("for", ["Control+a", "Backspace", "Enter"], "the search is empty"),
    "Attribution walker": ("answer", ["Control+a", "type:no such token", "Enter"], "one token is needed"),
    "Circuit editor": ("prompt", ["Control+a", "type:" + 130 * "war ", "Enter"], "reads at most 128"),
    "Weights explorer": ("feature", ["Control+a", "type:99999", "Enter"], "from 0 to 2047"),
}
# A page for what does not depend on what is explored: two explorers, and a prompt that takes seconds.
SMALL = {
    "set up": f"""
import tclib as tc
from tclib import ui
replacement = tc.ReplacementModel(tc.load_model(), tc.load_transcoders())
long = {26 * "war " + "17"!r}""",
    "Prompt microscope": "ui.Microscope(replacement, long)",
    "Circuit editor": f'ui.Editor(replacement, {PROMPT!r}, "45", "20")',
}
SLOW = 38 * "\u65e5"  # more than a hundred tokens
DARK = {"theme": "JupyterLab Dark"}


def chromium() -> str | None:
    """A Chromium of the system, or None: then playwright's own is tried."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def serving(command: list[str], port: int, folder: Path) -> Iterator[None]:
    """A server in a process of its own, until the block ends."""
    home = {"JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTER_DATA_DIR": str(folder / "data")}
    env = {**os.environ, **home, "JUPYTER_PREFER_ENV_PATH": "1", "PYTHONPATH": str(REPO)}
    with (folder / "server.log").open("w", encoding="utf-8") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=folder, start_new_session=True)
        try:
            for _ in range(240):
                assert server.poll() is None, (folder / "server.log").read_text(encoding="utf-8")[-2000:]
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.25)
            yield
        finally:
            if server.poll() is None:
                stop(server, signal.SIGTERM)


def stop(server: subprocess.Popen, how: int) -> None:
    """End a server and what it started; one that still waits for a kernel is not waited for."""
    os.killpg(server.pid, how) if os.name == "posix" else server.terminate()
    try:
        server.wait(15)
    except subprocess.TimeoutExpired:
        stop(server, signal.SIGKILL)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        except sync_api.Error as error:
            pytest.skip(f"there is no Chromium: install it, or `playwright install chromium` ({str(error)[:80]})")
        yield started
        started.close()


@contextmanager
def lab(browser, folder: Path, settings: dict | None = None, cells: dict[str, str] = CELLS):
    """A page with a notebook in JupyterLab, all cells run; and what its console complained about, and what it asked of
    other machines."""
    folder.mkdir(parents=True, exist_ok=True)
    notebook = notebook_dict([source.strip() for source in cells.values()])
    (folder / "nb.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    place = folder / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    place.mkdir(parents=True)
    (place / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}', encoding="utf-8")
    if settings:
        (place / "themes.jupyterlab-settings").write_text(json.dumps(settings), encoding="utf-8")
    port = free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--ServerApp.token=", f"--ServerApp.root_dir={folder}", "--LabApp.news_url="]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with serving(command, port, folder):
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(180_000)  # of a machine that is busy with other things
        complaints: list[str] = []
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: here(asked.url) or complaints.append(f"asked for {asked.url}"))
        page.goto(f"http://127.0.0.1:{port}/doc/tree/nb.ipynb")
        page.wait_for_selector(".jp-Notebook")
        page.wait_for_timeout(3000)
        for button in page.locator(".jp-Dialog button.jp-mod-accept").all():
            button.click()
        page.keyboard.press("Escape")
        run_all(page)
        last = page.get_by_text(list(cells)[-1], exact=True)
        last.wait_for()
        page.wait_for_timeout(1000)
        yield page, complaints
        page.close()


def here(url: str) -> bool:
    """Whether a request stays on this machine."""
    return url.startswith(("data:", "blob:", "http://127.0.0.1:", "ws://127.0.0.1:"))


def run_all(page) -> None:
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()


def frame_of(page, name: str):
    """The box of an explorer."""
    title = page.locator(".widget-html b", has_text=name)
    return page.locator(".jp-OutputArea-output .widget-vbox", has=title).first


def drawn(frame) -> str:
    """All views of an explorer as one text."""
    parts = frame.locator(".widget-html-content").evaluate_all("all => all.map(e => e.innerHTML)")
    return "".join(part for part in parts if "data-answer" not in part)


def status(frame) -> str:
    return frame.locator('[role="status"][data-answer]').inner_text()


def move(page, frame, label: str, what: list[str] | str) -> None:
    """Move the control with this label by keyboard, or click the button with this text."""
    if isinstance(what, str):
        frame.locator("button", has_text=what.removeprefix("click:")).first.click()
        return
    control = frame.locator(f'xpath=.//label[normalize-space()="{label}"]/..')
    control.locator("input, select, textarea, .noUi-handle").first.focus()
    for key in what:
        if key.startswith("type:"):
            page.keyboard.insert_text(key.removeprefix("type:"))
        else:
            page.keyboard.press(key)


def changes(frame, before: str) -> Callable[[], bool]:
    return lambda: drawn(frame) != before


def says(frame, sentence: str) -> Callable[[], bool]:
    return lambda: sentence in status(frame)


def comes(page, condition: Callable[[], bool]) -> bool:
    """Whether the condition holds within half a minute."""
    for _ in range(300):
        if condition():
            return True
        page.wait_for_timeout(100)
    return False


def test_explorers_in_jupyterlab(browser, tmp_path):
    SCREENS.mkdir(parents=True, exist_ok=True)
    with lab(browser, tmp_path / "lab") as (page, complaints):
        problems = []
        for name, moves in MOVES.items():
            frame = frame_of(page, name)
            frame.scroll_into_view_if_needed()
            frame.screenshot(path=SCREENS / f"{name.replace(' ', '_')}_light.png")
            for label, what in moves:
                before = drawn(frame)
                move(page, frame, label, what)
                if (name, label) not in QUIET and not comes(page, changes(frame, before)):
                    problems.append(f"{name}: {label or what} changed nothing; {status(frame)}")
                page.wait_for_timeout(300)
                if "unexpected" in status(frame):
                    problems.append(f"{name}: {label or what}: {status(frame)}")
            if name in WRONG:
                label, what, sentence = WRONG[name]
                move(page, frame, label, what)
                if not comes(page, says(frame, sentence)):
                    problems.append(f"{name}: {label} should say {sentence!r}, not {status(frame)!r}")
            frame.screenshot(path=SCREENS / f"{name.replace(' ', '_')}_moved.png")
            width = frame.evaluate("e => [e.scrollWidth, e.clientWidth]")
            if width[0] > width[1] + 1:
                problems.append(f"{name} is wider than the page: {width}")
        assert not problems, "\n".join(problems)
        assert page.locator(".jp-OutputArea-output[data-mime-type*='error']").count() == 0
        assert page.locator(".jp-mod-error, .jupyter-widgets-error-widget").count() == 0
        mine = [text for text in complaints if not harmless(text)]
        assert not mine, mine

        frame = frame_of(page, "Attribution walker")
        assert not frame.get_by_text("The kernel was restarted").is_visible()
        page.locator(".lm-MenuBar-itemLabel", has_text="Kernel").first.click()
        page.locator(".lm-Menu-itemLabel", has_text="Restart Kernel").first.click()
        page.locator(".jp-Dialog button.jp-mod-warn, .jp-Dialog button.jp-mod-accept").last.click()
        told = frame.get_by_text("The kernel was restarted")
        told.wait_for(state="visible", timeout=20_000)
        frame.screenshot(path=SCREENS / "restarted.png")


def harmless(text: str) -> bool:
    """What JupyterLab itself says, with or without explorers: a missing icon, a settings file that is not there yet."""
    return "404" in text or "favicon" in text or "status of 4" in text


FITS = """
frame => {
  const root = frame.querySelector(".tcg"), side = root.querySelector(".tcg-side").getBoundingClientRect();
  const map = root.querySelector(".tcg-scroll").getBoundingClientRect(), outer = frame.getBoundingClientRect();
  return {left: map.left - outer.left, right: outer.right - Math.max(map.right, side.right), height: map.height,
    beside: side.left >= map.right, clipped: root.scrollWidth - root.clientWidth, dark: root.matches(".tcg-dark")};
}
"""


def test_any_page(browser, tmp_path):
    """Widths and themes, names for screen readers, requests, a long prompt, saving and cancelling."""
    SCREENS.mkdir(parents=True, exist_ok=True)
    with lab(browser, tmp_path / "lab", cells=SMALL) as (page, complaints):
        editor, scope = frame_of(page, "Circuit editor"), frame_of(page, "Prompt microscope")
        problems = []
        for theme in ("light", "dark"):
            if theme == "dark":
                page.set_viewport_size({"width": 1300, "height": 1000})
                page.locator(".lm-MenuBar-itemLabel", has_text="Settings").first.click()
                page.locator(".lm-Menu-itemLabel", has_text="Theme").first.click()
                page.locator(".lm-Menu-itemLabel", has_text="JupyterLab Dark").last.click()
                page.wait_for_timeout(2000)
            for width in (620, 1300, 1500):
                page.set_viewport_size({"width": width, "height": 1000})
                page.wait_for_timeout(1000)
                editor.scroll_into_view_if_needed()
                found = editor.evaluate(FITS)
                editor.screenshot(path=SCREENS / f"editor_{theme}_{width}.png")
                whole = found["left"] >= 0 and found["right"] >= 0 and found["clipped"] <= 1
                if not whole or found["dark"] != (theme == "dark") or (width >= 1300 and not found["beside"]):
                    problems.append(f"{theme}, {width} pixels: {found}")
        scope.scroll_into_view_if_needed()
        page.wait_for_timeout(1000)
        cell = scope.locator("td", has=page.locator("span")).first
        inside = cell.evaluate("e => [e.getBoundingClientRect(), e.closest('.tclib-explorer').getBoundingClientRect()]")
        assert inside[1]["left"] <= inside[0]["left"] and inside[0]["right"] <= inside[1]["right"] + 1, inside
        scope.screenshot(path=SCREENS / "microscope_long.png")

        for frame in (editor, scope):
            tree = frame.aria_snapshot()
            nameless = re.findall(r"^ *- (?:slider|listbox|textbox|combobox|spinbutton|group)(?!.* \").*$", tree, re.M)
            problems += [f"without a name: {line}" for line in nameless]
        values = page.locator(".noUi-handle").evaluate_all("all => all.map(e => e.getAttribute('aria-valuetext'))")
        assert any("17" in value for value in values), values

        with page.expect_download(timeout=180_000) as waits:
            editor.locator("button", has_text="save page").click()
        waits.value.save_as(tmp_path / "graph.html")
        saved, asked = browser.new_page(), []
        saved.on("request", lambda request: asked.append(request.url))
        saved.goto((tmp_path / "graph.html").as_uri())
        saved.locator("svg text", has_text="logit").first.wait_for()
        assert len(asked) == 1
        saved.screenshot(path=SCREENS / "saved.png")
        saved.close()

        before = drawn(editor)
        move(page, editor, "prompt", ["Control+a", f"type:{SLOW}", "Enter"])
        progress = editor.locator(".tclib-progress")
        progress.wait_for(state="visible")
        editor.screenshot(path=SCREENS / "working.png")
        progress.locator("button").click()
        assert comes(page, says(editor, "Cancelled")), status(editor)
        assert drawn(editor) == before and not problems, "\n".join(problems)
        mine = [text for text in complaints if not harmless(text)]
        assert not mine, mine


def test_dark_theme(browser, tmp_path):
    """The same page in the dark theme: text of the views stands out from what is behind it."""
    SCREENS.mkdir(parents=True, exist_ok=True)
    with lab(browser, tmp_path / "lab", DARK) as (page, _):
        assert page.locator('body[data-jp-theme-light="false"]').count() == 1
        for name in MOVES:
            frame = frame_of(page, name)
            frame.scroll_into_view_if_needed()
            frame.screenshot(path=SCREENS / f"{name.replace(' ', '_')}_dark.png")
            faint = frame.evaluate(FAINTEST)
            assert faint["ratio"] >= 4.5, f"{name}: {faint}"
        page.set_viewport_size({"width": 980, "height": 1000})  # what JupyterLab's side bar leaves of 1280
        page.wait_for_timeout(1000)
        for name in MOVES:
            width = frame_of(page, name).evaluate("e => [e.scrollWidth, e.clientWidth]")
            assert width[0] <= width[1] + 1, f"{name} is wider than the page: {width}"
        frame_of(page, "Circuit editor").screenshot(path=SCREENS / "Circuit_editor_narrow.png")


# The smallest contrast between a text and the backgrounds behind it, by WCAG's formula.
FAINTEST = """
frame => {
  const parse = c => (c.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const over = (top, below) => { const a = top[3] ?? 1; return [0, 1, 2].map(i => a * top[i] + (1 - a) * below[i]); };
  const bent = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => { const l = c.slice(0, 3).map(bent);
    return 0.2126 * l[0] + 0.7152 * l[1] + 0.0722 * l[2]; };
  let worst = {ratio: 99};
  for (const content of frame.querySelectorAll(".widget-html-content")) {
    const walk = document.createTreeWalker(content, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
      const element = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim();
      if (!text || element.closest("style, svg, .tclib-lost") || !element.offsetParent) continue;
      const layers = [];
      for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
      let back = [17, 17, 17];
      for (const layer of layers.reverse()) back = over(layer.length === 3 ? [...layer, 1] : layer, back);
      const ink = over(parse(getComputedStyle(element).color), back);
      const [a, b] = [light(ink), light(back)].sort((x, y) => y - x);
      const ratio = (a + 0.05) / (b + 0.05);
      if (ratio < worst.ratio) worst = {ratio, text: text.slice(0, 60), ink, back};
    }
  }
  return worst;
}
"""


def test_voila_without_a_network(browser, tmp_path):
    """`python -m tclib explore`: the notebook as a page, all requests to elsewhere refused."""
    SCREENS.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [sys.executable, "-m", "tclib.cli.commands", "explore", "--no-browser", f"--port={port}"]
    with serving(command, port, tmp_path):
        context = browser.new_context(viewport={"width": 1280, "height": 1000})
        page, elsewhere = context.new_page(), []

        def only_here(route) -> None:
            here = route.request.url.startswith((f"http://127.0.0.1:{port}", "data:", "blob:"))
            if not here:
                elsewhere.append(route.request.url)
            route.continue_() if here else route.abort()

        context.route("**/*", only_here)
        page.goto(f"http://127.0.0.1:{port}/", timeout=180_000, wait_until="domcontentloaded")
        page.locator("b", has_text="Greater-than laboratory").wait_for(timeout=180_000)
        page.wait_for_timeout(2000)
        frame = page.locator(".widget-vbox", has=page.locator(".widget-html b", has_text="Attribution walker")).first
        before = drawn(frame)
        frame.locator("button", has_text="down to it").click()
        assert comes(page, changes(frame, before)), "the walker does not answer under Voila"
        assert "unexpected" not in page.evaluate(WITHOUT_SCRIPTS)
        assert not [url for url in elsewhere if url.endswith((".js", ".mjs"))], elsewhere
        frame.scroll_into_view_if_needed()
        page.screenshot(path=SCREENS / "voila.png")
        context.close()
