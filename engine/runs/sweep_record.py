"""What a sweep writes down of its points, and which of them no other beats. Knows one file of a run's folder; runs nothing.

`points.json`: `{v, tag, points: [{number, name, given, digest, run, state, predicted, wrong, figures, seconds}]}`. States are
open, finished, failed, cancelled and unfit.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from bitpress.engine.runs.store import Run

FILE, VERSION = "points.json", 1
OPEN, FINISHED, FAILED, CANCELLED, UNFIT = "open", "finished", "failed", "cancelled", "unfit"
Record = dict[str, Any]


def tag_of(sweep_id: str) -> str:
    """The tag that the runs of a sweep carry, so that the compare page can show them alone."""
    return f"sweep {sweep_id[-4:]}"


def read_points(run: Run) -> list[Record]:
    """What a sweep has written down of its points, in their order; none before the first."""
    try:
        return json.loads((run.path / FILE).read_text(encoding="utf8"))["points"]
    except (OSError, ValueError, KeyError):
        return []


def front_of(records: list[Record]) -> list[str]:
    """Runs on the front of stored bytes against measured divergence, the smallest first."""
    figures = {record["run"]: record["figures"] for record in records if record["state"] == FINISHED}
    return front({run: (found["bytes"], found["kl_mean"]) for run, found in figures.items() if {"bytes", "kl_mean"} <= found.keys()})


def front(values: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names that no other beats in both values (less is better), from the least first value on."""
    best, found = math.inf, []
    for name, (_, second) in sorted(values.items(), key=lambda item: item[1]):
        if second < best:
            best = second
            found.append(name)
    return found
