"""Runs as rows of a table: what stands in each column, how rows are filtered. Knows records and metrics; draws nothing."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from bitpress.app.ui.numbers import amount, duration, file_size, signed_percent, times
from bitpress.app.ui.run_names import plan_of_run, short_id
from bitpress.engine.runs.status import Status
from bitpress.engine.runs.store import Run, Store

# Each state has a shape of its own besides its word.
STATE_WORDS = {
    "queued": "○ queued", "running": "● running", "cancelling": "◌ cancelling", "cancelled": "⊘ cancelled",
    "failed": "✕ failed", "interrupted": "△ interrupted", "finished": "✓ finished",
}  # fmt: skip
KIND_WORDS = {
    "compress": "Compress", "measure": "Measure", "sensitivity": "Sensitivity", "inspect": "Inspect",
    "install": "Fetch", "generate": "Generate", "desk": "Desk", "sweep": "Sweep", "ranks": "Ranks", "caches": "Caches",
}  # fmt: skip
MAIN_KINDS = ("compress", "measure", "sensitivity", "sweep")


@dataclass(frozen=True)
class Filter:
    """What to show: kinds and states (none means all), and text that title, model or id must contain."""

    kinds: tuple[str, ...] = MAIN_KINDS
    states: tuple[str, ...] = ()
    text: str = ""

    def takes(self, status: Status, title: str) -> bool:
        """Whether a run passes."""
        words = f"{title} {status.model or ''} {status.id} {status.host}".lower()
        return (
            (not self.kinds or status.kind in self.kinds)
            and (not self.states or status.state in self.states)
            and all(word in words for word in self.text.lower().split())
        )


@dataclass(frozen=True)
class Row:
    """One run and the figures of its metrics, absent ones None."""

    status: Status
    title: str
    bytes: int | None = None
    smaller: float | None = None
    perplexity: float | None = None
    change: float | None = None
    speed: float | None = None
    faster: float | None = None


def rows_of(statuses: Iterable[Status], wanted: Filter) -> list[Row]:
    """The rows that pass the filter, in the order given."""
    titled = ((status, plan_of_run(status)) for status in statuses)
    return [row_of(status, title) for status, title in titled if wanted.takes(status, title)]


def row_of(status: Status, title: str) -> Row:
    """A run with its figures."""
    figures = _figures(str(Store().folder), status.id) if status.state == "finished" and status.kind in ("compress", "measure") else {}
    return Row(status, title, **figures)


@lru_cache(maxsize=4096)
def _figures(folder: str, run_id: str) -> dict[str, Any]:
    """The figures of a finished run, whose metrics never change."""
    return figures_of((Run(Store().folder / run_id).metrics() or {}).get("metrics", {}))


def figures_of(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Size, perplexity and speed of the compressed side, each with its change to dense; of dense alone where there is no other."""
    dense, now = metrics.get("dense", {}), metrics.get("compressed") or metrics.get("dense", {})
    found = {"bytes": now.get("bytes"), "perplexity": now.get("perplexity"), "speed": now.get("decode_tokens_per_s")}
    if "compressed" in metrics:
        found["smaller"] = _ratio(dense.get("bytes"), now.get("bytes"))
        found["faster"] = _ratio(now.get("decode_tokens_per_s"), dense.get("decode_tokens_per_s"))
        ratio = _ratio(now.get("perplexity"), dense.get("perplexity"))
        found["change"] = None if ratio is None else ratio - 1
    return found


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def table(rows: Iterable[Row]) -> dict[str, list[Any]]:
    """The columns of the history. Numbers stay numbers, so that a click on a heading sorts by value."""
    rows = list(rows)
    return {
        "state": [STATE_WORDS[row.status.state] for row in rows],
        "what": [KIND_WORDS.get(row.status.kind, row.status.kind) for row in rows],
        "plan": [row.title for row in rows],
        "model": [row.status.model or "" for row in rows],
        "size, MB": [None if row.bytes is None else row.bytes / 1e6 for row in rows],
        "smaller": [row.smaller for row in rows],
        "perplexity": [row.perplexity for row in rows],
        "change, %": [None if row.change is None else 100 * row.change for row in rows],
        "tokens/s": [row.speed for row in rows],
        "faster": [row.faster for row in rows],
        "created": [_when(row.status.created) for row in rows],
        "took, s": [row.status.seconds if row.status.ended else None for row in rows],
        "machine": [row.status.host for row in rows],
        "run": [row.status.id for row in rows],
    }


def _when(seconds: float) -> str:
    """Local time to the minute, in the order that sorts."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else ""


def sentence(row: Row) -> str:
    """A finished run's three answers in one line."""
    parts = [f"{file_size(row.bytes)}" + (f", {times(row.smaller)} smaller" if row.smaller else "") if row.bytes else ""]
    parts += [f"perplexity {amount(row.perplexity)}" + (f" ({signed_percent(row.change)})" if row.change is not None else "") if row.perplexity else ""]
    parts += [f"{amount(row.speed)} tokens/s" + (f", {times(row.faster)} dense" if row.faster else "") if row.speed else ""]
    return " · ".join(part for part in parts if part)


def progress_of(status: Status) -> str:
    """How long an open run has waited or worked, and where."""
    since = f"{duration(status.seconds)} at work" if status.state != "queued" and status.seconds is not None else f"asked for {_when(status.created)}"
    return " · ".join(part for part in (since, status.host, short_id(status.id)) if part)


def times_of(status: Status) -> str:
    """When it was asked for, how long it took or has taken, where, and its id."""
    took = f"{duration(status.seconds)} at work" if status.state != "queued" and status.seconds is not None else "not started"
    return " · ".join(part for part in (f"created {_when(status.created)}", took, status.host, f"run {status.id}") if part)
