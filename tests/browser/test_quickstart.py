"""The quickstart as a person meets it: JupyterLab in Chromium, Run, moving curves, Stop.

Needs Chromium (Debian: `apt-get install chromium`) and playwright's Python package; says so and skips where one is
missing. Screenshots go to tests/browser/screenshots: look at them after a change of the panel.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

ROOT = Path(__file__).parents[2]
SCREENSHOTS = Path(__file__).parent / "screenshots"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PATIENCE = 90_000  # ms; the first figure brings 5 MB of plotly, on a machine that may be busy
TOKENS = "gd => gd._fullData.find(trace => trace.uid === 'trend-tokens').x?.length ?? 0"
DISTANCE = """panel => panel.querySelector(".inferlab-sample").getBoundingClientRect().top
    - panel.getBoundingClientRect().top"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(300),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a JupyterLab of our own, that knows no one's settings and answers this machine only."""
    home = tmp_path_factory.mktemp("lab")
    (home / "work").mkdir()
    shutil.copy(ROOT / "notebooks" / "00_quickstart.ipynb", home / "work")
    quiet = home / "jupyterlab_settings_dir" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    places = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
              "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")  # fmt: skip
    environment = (
        os.environ
        | {name: str(home / name.lower()) for name in places}
        | {
            "PYTHONPATH": str(ROOT),
            "GOMP_SPINCOUNT": "1000",  # the browser needs the cores that idle OpenMP threads would spin on
        }
    )
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={home / 'work'}", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
    ]  # fmt: skip
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=home / "work", env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, home / "log")
        yield f"http://127.0.0.1:{port}/lab/tree/00_quickstart.ipynb?token={token}"
    finally:
        server.terminate()  # the server shuts its kernels down
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, f"JupyterLab ended at once: {log.read_text()[-2000:]}"
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise AssertionError(f"JupyterLab did not answer within a minute: {log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def page(lab: str) -> Iterator[sync_api.Page]:
    """The notebook, open, with its first code cell run and the panel drawn."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1240})
        page.set_default_timeout(PATIENCE)
        page.goto(lab)
        page.wait_for_function("window.jupyterapp?.shell.currentWidget?.content?.widgets?.length > 3")
        page.evaluate("window.jupyterapp.restored")
        page.evaluate("window.jupyterapp.shell.collapseLeft()")
        page.wait_for_function(
            "window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'"
        )
        page.evaluate(
            """() => {
                const app = window.jupyterapp, notebook = app.shell.currentWidget.content;
                notebook.activeCellIndex = notebook.widgets.findIndex(cell => cell.model.type === "code");
                app.commands.execute("notebook:run-cell");
            }"""
        )
        page.locator(".inferlab .js-plotly-plot .bartext").first.wait_for()
        yield page
        browser.close()


def _shoot(page: sync_api.Page, name: str) -> None:
    page.locator(".inferlab").first.evaluate("panel => panel.scrollIntoView({block: 'start'})")
    page.wait_for_timeout(600)
    SCREENSHOTS.mkdir(exist_ok=True)
    path = SCREENSHOTS / f"{name}.png"
    page.screenshot(path=path)
    print(f"\nscreenshot: {path}")


def test_run_moves_the_curves_and_stop_stops(page: sync_api.Page) -> None:
    panel, plot = page.locator(".inferlab").first, page.locator(".inferlab .js-plotly-plot").first
    progress = panel.get_by_role("progressbar")
    requests = panel.get_by_role("spinbutton", name="Requests", exact=True)
    requests.fill("5000")
    requests.press("Tab")
    plot.evaluate("gd => { window.redraws = 0; gd.on('plotly_afterplot', () => { window.redraws += 1; }); }")
    top = panel.evaluate(DISTANCE)

    panel.get_by_role("button", name="Run").click()
    sync_api.expect(progress).to_have_attribute("aria-valuetext", re.compile(r"run 1 running: [1-9]"), timeout=PATIENCE)
    points, redraws = plot.evaluate(TOKENS), page.evaluate("window.redraws")
    page.wait_for_timeout(3000)
    assert plot.evaluate(TOKENS) > points > 0, "the throughput curve must grow while the run goes on"
    assert page.evaluate("window.redraws") > redraws + 2
    assert panel.evaluate(DISTANCE) == top, "nothing may jump while a run goes on"
    _shoot(page, "running")

    panel.get_by_role("button", name="Stop").click()
    sync_api.expect(progress).to_have_attribute("aria-valuetext", re.compile("run 1 stopped"), timeout=PATIENCE)
    sync_api.expect(panel.get_by_role("button", name="Run")).to_be_enabled()
    assert panel.get_by_role("alert").inner_text() == ""
    assert len(panel.locator("[role=status]").inner_text()) > 40, "a sentence says what limited the run"


def test_the_runs_are_saved_as_a_table_by_the_browser(page: sync_api.Page) -> None:
    link = page.locator(".inferlab").first.get_by_role("link", name="Save runs (CSV)")
    sync_api.expect(link).to_have_attribute("href", re.compile("^data:text/csv"))
    with page.expect_download() as saving:
        link.press("Enter")
    assert saving.value.suggested_filename == "inferlab-runs.csv"
    table = Path(saving.value.path()).read_text().splitlines()
    assert table[0].startswith("run,label,status,") and table[1].startswith("1,") and ",stopped," in table[1]


def test_a_knob_tells_what_would_fit_before_the_next_run(page: sync_api.Page) -> None:
    panel = page.locator(".inferlab").first
    panel.get_by_role("button", name="Keep as baseline").click()
    panel.get_by_role("combobox", name="KV cache").select_option("int4")
    progress = panel.get_by_role("progressbar")
    sync_api.expect(progress).to_have_attribute("aria-valuetext", re.compile(r"Next run: about [\d,]+ tokens fit"))
    sync_api.expect(page.locator(".inferlab .js-plotly-plot .ytick", has_text="next run")).to_be_visible()


def test_the_keyboard_turns_knobs_and_leaves_the_cells_alone(page: sync_api.Page) -> None:
    panel = page.locator(".inferlab").first
    weights, ratio = panel.get_by_role("combobox", name="Weights"), panel.get_by_role("spinbutton", name="Cache ratio")
    weights.focus()
    page.keyboard.press("ArrowDown")
    sync_api.expect(weights).to_have_value("int8 (A16W8)")
    panel.get_by_role("slider", name="Cache ratio, slider").focus()
    page.keyboard.press("ArrowDown")
    sync_api.expect(ratio).to_have_value("0.75")
    page.keyboard.press("ArrowUp")
    weights.focus()
    page.keyboard.press("ArrowUp")
    sync_api.expect(weights).to_have_value("bf16")
    sync_api.expect(ratio).to_have_value("0.8")


def test_what_has_the_keyboard_shows_it(page: sync_api.Page) -> None:
    panel = page.locator(".inferlab").first
    panel.get_by_role("button", name="Run").focus()
    unseen, kinds = [], set()
    for _ in range(40):
        page.keyboard.press("Tab")
        kind, style, width, inside = page.evaluate(
            """() => { const at = document.activeElement, look = getComputedStyle(at);
                return [at.tagName, look.outlineStyle, look.outlineWidth, at.closest(".inferlab") !== null]; }"""
        )
        if inside:
            kinds.add(kind)
            unseen += [kind] if style != "solid" or width != "2px" else []
    page.evaluate("document.activeElement.blur()")
    assert {"BUTTON", "SELECT", "INPUT", "DIV", "PRE"} <= kinds and not unseen


def test_inputs_have_names(page: sync_api.Page) -> None:
    tree = page.locator(".inferlab").first.aria_snapshot()
    for role in ("slider", "spinbutton", "combobox", "textbox", "checkbox", "button", "group", "figure"):
        lines = [line.strip(" -'") for line in tree.splitlines() if re.match(rf"\s*- '?{role}\b", line)]
        assert lines, f"no {role} in the panel"
        assert all(line.startswith(f'{role} "') for line in lines), f"a {role} without a name: {lines}"


@pytest.mark.parametrize("theme", ["Light", "Dark"])
@pytest.mark.parametrize("width", [1280, 900])
def test_fits_in_both_themes_and_at_two_widths(page: sync_api.Page, theme: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 1240 if width > 1000 else 1640})
    page.evaluate(
        "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", f"JupyterLab {theme}"
    )
    page.wait_for_timeout(1000)
    overflow = page.evaluate(
        """() => [...document.querySelectorAll(".inferlab, .inferlab-body, .inferlab-knobs, .inferlab-tiles > div")]
            .filter(part => part.scrollWidth > part.clientWidth + 1).map(part => part.className + part.textContent)"""
    )
    assert not overflow, f"wider than its place: {overflow}"
    names = [page.locator(".inferlab .annotation-text").nth(i).bounding_box() for i in range(4)]
    buttons = page.locator(".inferlab .modebar").first.bounding_box()
    assert all(buttons["y"] + buttons["height"] <= name["y"] for name in names), "the buttons cover no title"
    cut = page.evaluate(
        """() => { const figure = document.querySelectorAll(".inferlab-tiles strong")[5], words = figure.textContent;
            figure.textContent = "3,034,880";
            const cut = figure.scrollWidth > figure.clientWidth;
            figure.textContent = words;
            return cut; }"""
    )
    assert not cut, "a figure without its last digits is another figure"
    figure, place = (
        page.locator(f".inferlab {part}").first.bounding_box() for part in (".main-svg", ".inferlab-charts")
    )
    assert abs(figure["width"] - place["width"]) <= 2, "the charts take the width they are given"
    _shoot(page, f"{theme.lower()}_{width}")
