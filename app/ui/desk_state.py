"""How the resident worker of a model stands, in words a person can act on. Knows desk records; starts nothing."""

import time
from dataclasses import dataclass

from bitpress.engine.runs.status import Status
from bitpress.engine.runs.store import Store

SILENT_SECONDS = 20.0  # a worker that has not beaten its heart for so long is not answering
BADGES = {
    "off": ":gray-badge[:material/power_settings_new: off]",
    "starting": ":blue-badge[:material/hourglass_top: starting]",
    "loading": ":blue-badge[:material/hourglass_top: loading]",
    "ready": ":green-badge[:material/check_circle: ready]",
    "writing": ":blue-badge[:material/edit: writing]",
    "silent": ":red-badge[:material/error: not answering]",
    "failed": ":red-badge[:material/error: failed]",
}


@dataclass(frozen=True)
class Engine:
    """The state of a model's desk, a key of BADGES, and one sentence on it."""

    state: str
    note: str

    @property
    def broken(self) -> bool:
        """Whether only a restart helps."""
        return self.state in ("silent", "failed")


def newest_desk(model: str) -> Status | None:
    """The newest desk of a model, whatever its state."""
    return next((status for status in Store().list(kind="desk", limit=50) if status.model == model), None)


def engine_of(status: Status | None, now: float | None = None) -> Engine:
    """What to tell of a desk's record."""
    if status is None or status.state in ("finished", "cancelled", "cancelling"):
        return Engine("off", "It starts with the next question, which takes a few seconds.")
    if status.state == "failed":
        error = status.error or {}
        return Engine("failed", " ".join(error.get(part, "") for part in ("what", "why", "remedy")).strip() or "The log on the runs page has the details.")
    if status.state == "interrupted":
        return Engine("failed", "The worker is gone. What it wrote is kept.")
    silent = (now or time.time()) - (status.heartbeat or status.created)
    if status.state == "running" and silent > SILENT_SECONDS:
        return Engine("silent", f"No sign of life for {silent:.0f} s.")
    if status.state == "queued" or status.phase == "starting":
        return Engine("starting", "The worker process is starting.")
    if status.phase == "loading":
        return Engine("loading", "The weights are being read into memory.")
    if status.phase == "measuring":
        return Engine("writing", "A recipe is measured, window by window.")
    if status.phase == "generating":
        return Engine("writing", "One token for each column in turn.")
    return Engine("ready", "The model is in memory; it is freed after ten minutes without a question.")
