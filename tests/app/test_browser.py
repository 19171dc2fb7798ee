"""The main job in a real browser with a real worker: compress the tiny model at 4 bits by clicking, reload half-way, find the run again.

The home is fresh, nothing is fetched, every process started here is ended here.
"""

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
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitpress.engine.runs.status import ALIVE
from bitpress.engine.runs.store import Store

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
START_SECONDS, WORK_SECONDS = 90, 420  # idle machines need a tenth of it
pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, built_kernels: Path) -> Path:
    folder = tmp_path_factory.mktemp("browser") / "home"
    folder.mkdir()
    (folder / "kernels").symlink_to(built_kernels, target_is_directory=True)
    return folder


@pytest.fixture(scope="module")
def url(home: Path) -> Iterator[str]:
    """The app as `bitpress app` serves it. At the end the server and the workers of this home are stopped."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--server.headless=true", f"--server.port={port}", "--server.address=127.0.0.1", "--server.fileWatcherType=none"]
    environment = os.environ | {"BITPRESS_HOME": str(home), "BITPRESS_FETCH": "0", "BITPRESS_DESK_IDLE": "30", "OMP_NUM_THREADS": "1"}
    with (home.parent / "server.log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "streamlit", "run", "app/main.py", *flags], cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        wait_for_server(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=20)
        stop_workers(home)


def wait_for_server(port: int) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=2):
            return
        time.sleep(0.3)
    raise AssertionError("the server did not start")


def stop_workers(home: Path) -> None:
    for status in Store(home).list(state=ALIVE):
        if status.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(status.pid, signal.SIGKILL)


def wait_for_end(home: Path, run_id: str) -> str:
    """The state in which a run ends, which is read from its folder so that it does not matter what a page shows meanwhile."""
    end = time.monotonic() + WORK_SECONDS
    while (status := Store(home).get(run_id).status()).active and time.monotonic() < end:
        time.sleep(0.5)
    return status.state


def answered(home: Path, order: str) -> None:
    """Wait until a desk says that it has answered an order."""
    end = time.monotonic() + WORK_SECONDS
    while time.monotonic() < end:
        logs = (path.read_text() for path in home.glob("runs/*/events.jsonl"))
        if any('"order_done"' in line and order in line for log in logs for line in log.splitlines()):
            return
        time.sleep(0.2)
    raise AssertionError("no desk answered the order")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=chromium, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A fresh tab of a fresh visitor that fails the test when the page shows an exception."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    tab = context.new_page()
    tab.set_default_timeout(START_SECONDS * 1000)
    yield tab
    assert tab.locator('[data-testid="stException"]').all_inner_texts() == []
    context.close()


def test_compress_by_clicking_reload_half_way_and_find_the_run_again(url: str, page: Any, home: Path) -> None:
    page.goto(url)
    compress = page.get_by_role("button", name=re.compile("^Compress"))
    compress.wait_for(timeout=WORK_SECONDS * 1000)  # the first visit has a worker look at the model once
    page.locator(".layer-map svg [role=gridcell]").first.wait_for()
    assert page.locator(".layer-map svg [role=gridcell]").count() >= 42
    compress.click()
    page.wait_for_url(re.compile("run="))
    run_id = re.search(r"run=([\w-]+)", page.url).group(1)  # type: ignore[union-attr]
    page.get_by_role("button", name="Cancel", exact=True).wait_for()

    page.reload()
    assert run_id in page.url
    page.get_by_text(run_id).first.wait_for()

    assert wait_for_end(home, run_id) == "finished"
    page.get_by_text("finished", exact=False).first.wait_for()
    page.locator(".stMarkdownBadge", has_text="measured").first.wait_for()
    metrics = json.loads((home / "runs" / run_id / "metrics.json").read_text())["metrics"]
    assert metrics["compressed"]["bytes"] < 0.5 * metrics["dense"]["bytes"]
    page.locator(".token-diff .token").first.wait_for()


def test_another_visitor_finds_the_run_on_the_runs_page(url: str, page: Any, home: Path) -> None:
    run = Store(home).list(kind="compress")[0]
    page.goto(f"{url}/runs?run={run.id}")
    page.get_by_role("button", name="Open on explore").click()
    page.wait_for_url(re.compile(rf"run={run.id}"))
    page.locator(".stMarkdownBadge", has_text="measured").first.wait_for()


def test_both_models_write_side_by_side_and_the_link_brings_the_answer_back(url: str, page: Any, home: Path) -> None:
    page.goto(f"{url}/generate?max_new=12")
    prompt = page.locator("textarea")
    prompt.wait_for()
    prompt.click()
    page.keyboard.press("End")
    page.keyboard.type(" there was a dragon")
    page.keyboard.press("Control+Enter")
    page.wait_for_url(re.compile("order="))
    answered(home, re.search(r"order=([\w-]+)", page.url).group(1))  # type: ignore[union-attr]
    page.get_by_role("button", name=re.compile("^Generate")).wait_for()
    texts = page.locator(".token-diff .text")
    texts.nth(1).locator(".token").first.wait_for()
    assert texts.count() == 2
    said = [texts.nth(index).inner_text() for index in range(2)]
    assert all(said)
    page.goto(page.url)
    texts.nth(1).locator(".token").first.wait_for()
    assert [page.locator(".token-diff .text").nth(index).inner_text() for index in range(2)] == said
    orders = [json.loads(line) for path in home.glob("runs/*/orders.jsonl") for line in path.read_text().splitlines()]
    assert orders[-1]["args"]["prompt"] == "Once upon a time there was a dragon"


def test_sensitivity_is_measured_by_clicking_and_a_square_opens_its_layer(url: str, page: Any) -> None:
    page.goto(f"{url}/sensitivity")
    page.get_by_role("button", name=re.compile("^Measure")).click()
    page.get_by_text("Layers by harm at", exact=False).first.wait_for(timeout=WORK_SECONDS * 1000)
    square = page.locator(".layer-map svg [role=gridcell]").nth(3)
    square.click()
    page.wait_for_url(re.compile("layer="))
    page.get_by_text("Error against bits", exact=True).first.wait_for()
