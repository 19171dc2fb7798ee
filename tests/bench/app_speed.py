"""How fast the screens are: from starting the app to its first usable page, and a page's rerun after a slider moves by a key press.

Drives the real app in headless Chromium on an empty home and prints rows of `bitpress.engine.bench` as JSON. Times of reruns are
taken inside the page, from the key press to the end of Streamlit's script run.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

FIRST_PAGE_SECONDS, RERUN_SECONDS = 60.0, 0.2
SLIDER = '[data-testid="stSlider"] input[type="range"]'  # one pixel in size: attached, never visible
READY = f'[data-testid="stApp"][data-test-script-state="notRunning"] {SLIDER}'
# A promise that ends when the script run that follows a key press has ended.
WATCH = """() => {
    const app = document.querySelector('[data-testid="stApp"]');
    window.rerun = new Promise(resolve => {
        let pressed = 0, ran = false;
        document.addEventListener('keydown', () => { pressed = performance.now(); }, {once: true, capture: true});
        const watch = new MutationObserver(() => {
            const running = app.dataset.testScriptState === 'running';
            ran = ran || running;
            if (ran && !running) { watch.disconnect(); resolve((performance.now() - pressed) / 1000); }
        });
        watch.observe(app, {attributes: true, attributeFilter: ['data-test-script-state']});
    });
}"""


@contextmanager
def running_app(home: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The app as `make app` starts it, on a free port and an empty home, without its background download."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("bitpress")), "app", "--port", str(port)]
    environment = {**os.environ, "BITPRESS_HOME": home, "BITPRESS_FETCH": "0", "STREAMLIT_SERVER_HEADLESS": "true"}
    app = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield app, f"http://127.0.0.1:{port}"
    finally:
        app.terminate()
        app.wait(timeout=20)


def open_first_page(page: Page, address: str) -> None:
    """Go to the app until it answers and its first slider can be moved."""
    deadline = time.monotonic() + 2 * FIRST_PAGE_SECONDS
    while True:
        try:
            page.goto(address)
            break
        except Exception:  # refused until the server listens
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    page.wait_for_selector(READY, state="attached", timeout=2000 * FIRST_PAGE_SECONDS)


def rerun_seconds(page: Page, presses: int) -> list[float]:
    """Seconds of each rerun that an arrow key on the first slider causes; the first three only warm up."""
    page.locator(SLIDER).first.focus()
    times = []
    for press in range(presses + 3):
        page.evaluate(WATCH)
        page.keyboard.press("ArrowRight" if press % 2 == 0 else "ArrowLeft")
        times.append(page.evaluate("() => window.rerun"))
        page.wait_for_selector(READY, state="attached")
    return times[3:]


def holds_torch(process: int) -> bool:
    """Whether a torch library is mapped into a process; False where the system does not tell."""
    maps = Path(f"/proc/{process}/maps")
    return maps.exists() and "libtorch" in maps.read_text()


def rows(presses: int) -> list[dict[str, Any]]:
    """Start, look, press."""
    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        began = time.monotonic()
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        with running_app(home) as (app, address):
            page = browser.new_page()
            open_first_page(page, address)
            first = time.monotonic() - began
            times = rerun_seconds(page, presses)
            torch_inside = holds_torch(app.pid)
        browser.close()
    p50 = statistics.median(times)
    conditions = f"explore page, bundled model, {len(times)} key presses, p95 {sorted(times)[int(0.95 * (len(times) - 1))]:.3f} s"
    return [
        row("app to first usable page", first, "s", f"< {FIRST_PAGE_SECONDS:g}", first < FIRST_PAGE_SECONDS, "empty home, browser start included"),
        row("rerun after a slider, p50", p50, "s", f"< {RERUN_SECONDS:g}", p50 < RERUN_SECONDS, conditions),
        row("torch in the app's process", int(torch_inside), "", "0", not torch_inside, "libraries mapped after the reruns"),
    ]


def row(name: str, value: float, unit: str, bound: str, kept: bool, conditions: str) -> dict[str, Any]:
    """One promise as `bitpress.engine.bench` prints it."""
    return {"name": name, "value": value, "unit": unit, "bound": bound, "kept": kept, "conditions": conditions}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time the screens.")
    parser.add_argument("--quick", action="store_true", help="10 key presses instead of 40")
    print(json.dumps(rows(10 if parser.parse_args().quick else 40)))
