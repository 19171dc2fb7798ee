"""The one small record that says how a run stands: `status.json`. Knows its states and how to change it safely.

Several processes may change it (a worker's heartbeat, a person's cancel), so every change is read, altered and replaced
under the folder's lock; a reader needs no lock, because the file is replaced whole.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from bitpress.engine.runs.events import finite

VERSION = 1
STATES = ("queued", "running", "cancelling", "cancelled", "failed", "interrupted", "finished")
ACTIVE = ("queued", "running", "cancelling")
ALIVE = ("running", "cancelling")
RESUMABLE = ("cancelled", "failed", "interrupted")
LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class Status:
    """How a run stands. Times are seconds since the epoch; what does not apply yet is None."""

    id: str
    kind: str
    title: str = ""
    model: str | None = None
    state: str = "queued"
    phase: str = ""
    done: int = 0
    total: int = 0
    eta_s: float | None = None
    pid: int | None = None
    pid_started: float | None = None  # tells a recycled pid from the worker's
    host: str = ""
    created: float = 0.0
    queued: float = 0.0  # the order of the queue; a resumed run joins its end
    started: float | None = None
    ended: float | None = None
    heartbeat: float | None = None
    cancel_asked: float | None = None
    digest: str | None = None
    error: dict[str, str] | None = None
    v: int = VERSION

    @property
    def active(self) -> bool:
        """Waiting, at work or on its way out."""
        return self.state in ACTIVE

    @property
    def resumable(self) -> bool:
        """Stopped before its end, so that `jobs.resume` can go on with it."""
        return self.state in RESUMABLE

    @property
    def seconds(self) -> float | None:
        """Time at work: of the last start, up to now for a run at work."""
        if self.started is None:
            return None
        return max(0.0, (self.ended or time.time()) - self.started)


KNOWN = {item.name for item in fields(Status)}


def read_status(folder: Path) -> Status | None:
    """The record of a run folder; None where there is none that can be read. Fields of a newer Bitpress are ignored."""
    try:
        values = json.loads((folder / "status.json").read_text(encoding="utf8"))
        return Status(**{key: value for key, value in values.items() if key in KNOWN} | {"id": folder.name})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def write_status(folder: Path, status: Status) -> None:
    """Replace the record whole. Raises OSError when the disk is full; the old record then stays."""
    replace_json(folder / "status.json", asdict(status))


def replace_json(path: Path, values: Any) -> None:
    """Write a JSON file whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        part.write_text(json.dumps(finite(values), ensure_ascii=False, indent=1), encoding="utf8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def lock_of(folder: Path) -> FileLock:
    """The lock under which the folder's record is changed; held for milliseconds."""
    return FileLock(folder / ".lock", timeout=LOCK_SECONDS)


def change_status(folder: Path, change: Callable[[Status], dict[str, Any] | None]) -> Status | None:
    """Apply `change` to the record under the lock: it gets the record and gives the fields to set, or None to leave it.

    Gives the new record, or None when nothing was changed. Deciding inside `change` is what makes a transition safe.
    """
    with lock_of(folder):
        status = read_status(folder)
        wanted = change(status) if status else None
        if status is None or wanted is None:
            return None
        changed = replace(status, **wanted)
        write_status(folder, changed)
        return changed


def settled_state(folder: Path) -> str:
    """The state as it stands when no change is under way, "" where there is no record."""
    with lock_of(folder):
        status = read_status(folder)
        return status.state if status else ""


def worker_lock(folder: Path, wait: float = 0.0) -> FileLock:
    """The lock that a worker holds while it lives: at most one a folder, whatever the record says. Raises Timeout after `wait` seconds."""
    return FileLock(folder / ".worker", timeout=wait)


def has_worker(folder: Path) -> bool:
    """Whether a worker of this machine holds the folder."""
    try:
        with worker_lock(folder):
            return False
    except Timeout:
        return True


def process_started(pid: int) -> float | None:
    """When the process with this id began, None when there is none (a zombie counts as none)."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def process_alive(pid: int | None, began: float | None) -> bool:
    """Whether the very process that the record names still runs; a recycled pid has another start time."""
    found = process_started(pid) if pid else None
    return found is not None and (began is None or abs(found - began) < 1.0)
