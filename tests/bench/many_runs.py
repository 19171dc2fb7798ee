"""How fast the pages that show runs open when there are many of them: five hundred, in a real browser.

    python tests/bench/many_runs.py [--runs 500]

Writes a home of made-up runs, opens the app on it, goes from page to page by the navigation, and prints rows of
`bitpress.engine.bench` as JSON. A page is open when Streamlit's script has ended, its plot is drawn, and the browser has painted it; the time is
taken inside the page, from the click. The first opening reads every run once and loads the plotting code.
"""

import argparse
import json
import math
import os
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from app_speed import open_first_page, row, running_app
from playwright.sync_api import Page, sync_playwright

from bitpress.engine.model import library, load
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs.status import change_status
from bitpress.engine.runs.store import Store
from bitpress.engine.sensitivity_file import FISHER, OPTIONS, Score, SensitivityReport

MODEL, SECONDS, VISITS = "tiny-stories", 1.5, 6
IDLE = '[data-testid="stApp"][data-test-script-state="notRunning"]'
# A promise that ends, after the next click, when the script has ended, a new plot is drawn, and the browser has painted and has nothing left to do.
WATCH = """(name) => {
    const app = document.querySelector('[data-testid="stApp"]'), plots = '[data-testid="stPlotlyChart"] .main-svg';
    const before = new Set(document.querySelectorAll(plots));
    window.opened = new Promise(resolve => {
        let began = 0, ran = false;
        const watch = new MutationObserver(() => {
            const state = app.dataset.testScriptState;
            ran = ran || state === 'running';
            const drawn = location.pathname.includes(name) && [...document.querySelectorAll(plots)].some(plot => !before.has(plot));
            if (!ran || state !== 'notRunning' || !drawn) return;
            watch.disconnect();
            requestAnimationFrame(() => setTimeout(() => resolve((performance.now() - began) / 1000)));
        });
        document.addEventListener('click', () => {
            began = performance.now();
            watch.observe(document.body, {attributes: true, childList: true, subtree: true});
        }, {once: true, capture: true});
    });
}"""


def fill(runs: int) -> None:
    """The model as inspected, made-up sensitivities, and so many finished runs of it, each with another recipe and other figures."""
    loaded = load.load(MODEL)
    path = library.anatomy_path(MODEL)
    path.parent.mkdir(parents=True, exist_ok=True)
    loaded.anatomy.save(path)
    rng, store, anatomy = random.Random(0), Store(), loaded.anatomy
    harms = {f"{bits}-bit": 4.0**-bits for bits in (8, 4, 3, 2)}
    scores = [Score(layer=part.name, option=option, kind=FISHER, score=harm) for part in anatomy.linears for option, harm in harms.items()]
    report = SensitivityReport(digest="0" * 16, model=MODEL, fingerprint=anatomy.fingerprint, kinds=(FISHER,), text="stories", tokens_sha256="",
                               protocol="made up", options=OPTIONS[:4], scores=scores)  # fmt: skip
    report.save()
    protocol = {"text": "stories", "part": "evaluation", "window": 256, "windows": 8}
    dense = {"perplexity": 8.0, "bytes": anatomy.bytes, "decode_tokens_per_s": 300.0, "protocol": protocol}
    for number in range(runs):
        bits, block = rng.choice((2, 3, 4, 5, 6, 8)), rng.randrange(anatomy.blocks)
        lines = [{"match": "*", "weights": {"bits": bits}}, {"match": f"blocks:{block}", "weights": {"bits": rng.choice((4, 8))}}]
        lines = lines[:1] if number < 12 else lines  # a few uniform ones, for the reference curve
        recipe = Recipe.from_dict({"model": MODEL, "seed": number, "schemes": lines, "stages": [{"method": "rtn"}]})
        kl = math.exp(-bits + rng.gauss(0, 0.3))
        size = int(anatomy.bytes * bits / 16 * rng.uniform(1.0, 1.1))
        side = {**dense, "perplexity": 8 * math.exp(kl), "kl_mean": kl, "same_top1": 1 - kl / 4, "bytes": size, "bits_per_weight_linears": bits + 0.3,
                "bits_per_weight_model": 8 * size / anatomy.params, "decode_tokens_per_s": 900 / bits, "ttft_s": 0.01 * rng.uniform(0.9, 1.1)}  # fmt: skip
        run = store.create("compress", {"model": MODEL}, recipe)
        (run.path / "metrics.json").write_text(json.dumps({"run": run.id, "digest": None, "metrics": {"dense": dense, "compressed": side}}))
        change_status(run.path, lambda _: {"state": "finished", "started": time.time() - 9, "ended": time.time()})


def visit(page: Page, name: str) -> float:
    """Seconds from a click in the navigation to a page that has drawn its plot and rests, taken inside the page: Playwright's own time is not in it."""
    page.evaluate(WATCH, name.lower())
    page.get_by_role("link", name=name).click()
    return float(page.evaluate("() => window.opened"))


def visits(address: str, page: Page) -> dict[str, list[float]]:
    """The pages in turn, with another one between, so that nothing of the last visit is still on screen."""
    open_first_page(page, address)
    page.wait_for_selector(IDLE, state="attached", timeout=120_000)
    found: dict[str, list[float]] = {"Compare": [], "Autotune": []}
    for _ in range(VISITS):
        for name, times in found.items():
            times.append(visit(page, name))
            page.get_by_role("link", name="Generate").click()
            page.wait_for_url("**/generate*")
            page.wait_for_selector(IDLE, state="attached", timeout=60_000)
            page.wait_for_timeout(300)
    return found


def rows(runs: int) -> list[dict[str, Any]]:
    """A home, the app on it, and the pages opened by a person."""
    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        (Path(home) / "kernels").symlink_to(Path(os.environ.get("BITPRESS_HOME", home)) / "kernels")
        os.environ["BITPRESS_HOME"] = home
        fill(runs)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        with running_app(home) as (_, address):
            found = visits(address, browser.new_page())
        browser.close()
    busy = f"{runs} runs, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    return [
        row(f"opening {name.lower()}, p50", (p50 := statistics.median(times[1:])), "s", f"< {SECONDS}", p50 < SECONDS,
            f"{busy}; the first opening took {times[0]:.2f} s, the fastest {min(times):.2f} s")
        for name, times in found.items()
    ]  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time pages that show many runs.")
    parser.add_argument("--runs", type=int, default=500)
    print(json.dumps(rows(parser.parse_args().runs), indent=1))
