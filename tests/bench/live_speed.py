"""How fast a live session answers: from an order that changes one block to the perplexity of eight windows of 256 tokens, in the worker's process.

    python tests/bench/live_speed.py [MODEL] [--edits 20] [--text TEXT]

Prints rows of `bitpress.engine.bench` as JSON. Blocks are edited in turn from the first to the last, so the median is that of a block in the middle.
"""

import argparse
import json
import os
import statistics
import time
from typing import Any

from bitpress.engine.live import Live
from bitpress.engine.measure.measure import windows_for
from bitpress.engine.model import library
from bitpress.engine.model.load import load
from bitpress.engine.recipe import Measure, Recipe

BOUND_SECONDS = 1.0


def rows(model: str, edits: int, text: str) -> list[dict[str, Any]]:
    """Times of single edits, after one warm-up of the whole model."""
    loaded = load(model)
    windows = windows_for(loaded, library.find(model), Measure(tier="quick", text=text))
    began = time.perf_counter()
    live = Live(loaded, windows.ids_NT)
    opened = time.perf_counter() - began
    base = {"model": model, "stages": [{"method": "rtn"}]}
    lines: list[dict[str, Any]] = [{"match": "*", "weights": {"bits": 4}}]
    times = [_answer(live, Recipe.from_dict({**base, "schemes": lines}))]
    for edit in range(edits):
        block = edit * loaded.anatomy.blocks // edits
        lines.append({"match": f"blocks:{block}", "weights": {"bits": 3}})
        times.append(_answer(live, Recipe.from_dict({**base, "schemes": lines})))
    whole, singles = times[0], times[1:]
    p50 = statistics.median(singles)
    load_now = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    spread = f"{len(singles)} edits, fastest {min(singles):.2f} s, slowest {max(singles):.2f} s"
    conditions = f"{model}, {windows.protocol.one_line()}, {spread}, load {load_now:.1f}"
    return [
        {"name": "live edit of one block to perplexity, p50", "value": p50, "unit": "s", "bound": f"< {BOUND_SECONDS:g}", "kept": p50 < BOUND_SECONDS,
         "conditions": conditions},
        {"name": "live edit of the whole model", "value": whole, "unit": "s", "bound": "", "kept": True, "conditions": conditions},
        {"name": "opening a live session on a loaded model", "value": opened, "unit": "s", "bound": "", "kept": True, "conditions": conditions},
    ]  # fmt: skip


def _answer(live: Live, recipe: Recipe) -> float:
    began = time.perf_counter()
    live.turn(recipe)
    for _ in live.windows():
        pass
    return time.perf_counter() - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time live edits.")
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument("--text", default="auto")
    asked = parser.parse_args()
    print(json.dumps(rows(asked.model, asked.edits, asked.text), indent=1))
