"""The queue: submit, cancel, resume, and the pump that starts what waits and notices what died. Knows run folders and pids, no models.

Nothing here stays in memory: every call reads the folders, so any process may call any of it at any time, several at
once. Whoever looks at runs calls `pump()` now and then; it does little and never waits for a worker.
"""

import hashlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from filelock import FileLock

from bitpress.engine.data.user_text import stamped
from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs.backends.base import Backend, Handle, Resources
from bitpress.engine.runs.backends.local import LocalBackend
from bitpress.engine.runs.status import ACTIVE, ALIVE, Status, change_status, has_worker, read_status
from bitpress.engine.runs.store import Run, Store

LIGHT_KINDS = ("install", "desk", "sweep")  # wait for the network, a person or other runs, so they take no slot
STALE_SECONDS = 15.0  # a heartbeat older than this is no sign of life
REMOTE_STALE_SECONDS = 120.0  # of a worker on another machine, whose pid says nothing here
GRACE_SECONDS = 10.0  # from a worker's SIGTERM to its SIGKILL
BACKEND: Backend = LocalBackend()


def slots() -> int:
    """How many job workers may run at once: `BITPRESS_SLOTS`, else one, so that no run disturbs another's timings."""
    return max(1, int(os.environ.get("BITPRESS_SLOTS", "1")))


def compress_digest(recipe: Recipe) -> str | None:
    """Digest of recipe, model and text: equal digests mean the stored run answers. None while the model was not inspected."""
    from bitpress.engine.data.texts import resolve_text
    from bitpress.engine.model import library

    try:
        entry = library.find(recipe.model)
        anatomy = Anatomy.load(library.anatomy_path(recipe.model))
        text, _ = resolve_text(recipe.measure.text, entry, "evaluation")
    except (BitpressError, OSError, ValueError):
        return None
    return digest_of(recipe, anatomy.fingerprint, text)


def digest_of(recipe: Recipe, fingerprint: str, text: str) -> str:
    """16 hex digits over all that decides a compress run's metrics but the machine."""
    return hashlib.sha256(json.dumps([recipe.digest(), fingerprint, stamped(text)]).encode()).hexdigest()[:16]


def submit(kind: str, args: dict[str, Any] | None = None, recipe: Recipe | None = None, title: str | None = None, home: Path | None = None) -> Run:
    """Put a run in the queue and start it if a slot is free. The same digest may be finished already: `Store.find_finished`.

    Raises BitpressError when the home folder cannot be written.
    """
    digest = compress_digest(recipe) if recipe is not None else None
    run = Store(home).create(kind, args or {}, recipe, title, digest)
    pump(home)
    return run


def submit_once(kind: str, args: dict[str, Any], recipe: Recipe | None = None, title: str | None = None, home: Path | None = None) -> Run:
    """As `submit`, but where the very same work waits or runs already that run is given back: a second press of a button asks for nothing new."""
    store = Store(home)
    same = (run for status in store.list(kind=kind, state=("queued", "running")) if _asks(run := Run(store.folder / status.id), args, recipe))
    return next(same, None) or submit(kind, args, recipe, title, home)


def _asks(run: Run, args: dict[str, Any], recipe: Recipe | None) -> bool:
    return run.request().get("args") == args and run.recipe() == recipe


def cancel(run_id: str, home: Path | None = None) -> Status:
    """Stop a run: at once when it waits, else its worker is asked to and a later `pump` sees to it. Raises InputError when it has ended."""
    run = Store(home).get(run_id)
    changed = change_status(run.path, _cancelled)
    if changed is None:
        raise InputError(f"The run {run.id} has ended.", f"Its state is {run.status().state}.", "Only a waiting or running one can be cancelled.")
    if changed.state == "cancelled":
        with run.writer() as events:
            events.write("cancelled", {"phase": "queued"})
    elif _is_here(changed):
        BACKEND.cancel(_handle(changed))
    return changed


def _cancelled(status: Status) -> dict[str, Any] | None:
    if status.state == "queued":
        return {"state": "cancelled", "ended": time.time()}
    return {"state": "cancelling", "cancel_asked": status.cancel_asked or time.time()} if status.state in ALIVE else None


def resume(run_id: str, home: Path | None = None) -> Status:
    """Put a cancelled, failed or interrupted run back in the queue, in its own folder. Raises InputError for any other state."""
    run = Store(home).get(run_id)

    def again(status: Status) -> dict[str, Any] | None:
        if not (status.resumable or (status.kind == "desk" and not status.active)):
            return None
        return {"state": "queued", "queued": time.time(), "ended": None, "error": None, "cancel_asked": None, "pid": None, "pid_started": None, "phase": ""}

    changed = change_status(run.path, again)
    if changed is None:
        raise InputError(f"The run {run.id} cannot be resumed.", f"Its state is {run.status().state}.", "Only a cancelled, failed or interrupted one can.")
    with run.writer() as events:
        events.write("queued", {"kind": changed.kind, "model": changed.model, "resumed": True})
    pump(home)
    return read_status(run.path) or changed


def pump(home: Path | None = None) -> None:
    """Bring the runs up to date: dead workers are marked, overdue ones ended, waiting ones started while slots are free.

    Idempotent and safe from several processes; when another one pumps right now this call leaves the work to it.
    """
    store = Store(home)
    if not store.folder.exists():
        return
    try:
        with FileLock(store.home / "jobs.lock", timeout=5.0):
            for status in store.list(state=ALIVE, limit=1000):
                _look_after(store, status)
            _start_waiting(store)
    except OSError:  # another process holds the lock (Timeout is one), or the home can only be read: nothing to do here
        return


def _look_after(store: Store, status: Status) -> None:
    run = Run(store.folder / status.id)
    if not _is_dead(run, status):
        if status.state == "cancelling" and _is_here(status) and time.time() - (status.cancel_asked or 0.0) > GRACE_SECONDS:
            BACKEND.cancel(_handle(status), force=True)
        return

    def close(now: Status) -> dict[str, Any] | None:
        if now.state not in ALIVE or now.pid != status.pid:
            return None
        return {"state": "cancelled" if now.state == "cancelling" else "interrupted", "ended": time.time(), "eta_s": None}

    changed = change_status(run.path, close)
    if changed is not None:
        with run.writer() as events:
            events.write(changed.state, {"phase": status.phase, "why": "The worker process is gone."})


def _is_here(status: Status) -> bool:
    return status.host in ("", socket.gethostname())


def _handle(status: Status) -> Handle:
    return Handle(status.pid or 0, status.pid_started)


def _is_dead(run: Run, status: Status) -> bool:
    silent = time.time() - (status.heartbeat or status.started or 0.0)
    if not _is_here(status):
        return silent > REMOTE_STALE_SECONDS
    if status.pid is None and silent < STALE_SECONDS:
        return False
    return not BACKEND.alive(_handle(status)) and not has_worker(run.path)


def _start_waiting(store: Store) -> None:
    """Oldest first. Light kinds start at once; the others while fewer than `slots()` are at work on this machine."""
    busy = sum(status.kind not in LIGHT_KINDS for status in store.list(state=ALIVE, limit=1000))
    for status in sorted(store.list(state="queued", limit=1000), key=lambda status: status.queued):
        light = status.kind in LIGHT_KINDS
        if (light or busy < slots()) and _start(Run(store.folder / status.id)):
            busy += not light


def _start(run: Run) -> bool:
    """Start the worker of a queued run, True when it runs. Its pid is on record before any other process can look."""
    command = [sys.executable, "-m", "bitpress.engine.runs.worker", str(run.path)]

    def claim(status: Status) -> dict[str, Any] | None:
        if status.state != "queued":
            return None
        now = time.time()
        try:
            handle = BACKEND.submit(command, run.path / "log.txt", Resources())
        except OSError as error:
            why = f"{error.strerror or error}."
            return {"state": "failed", "ended": now, "error": {"what": "The worker could not be started.", "why": why, "remedy": "Resume the run."}}
        return {"state": "running", "phase": "starting", "pid": handle.pid, "pid_started": handle.began, "host": socket.gethostname(),
                "started": now, "heartbeat": now, "ended": None}  # fmt: skip

    changed = change_status(run.path, claim)
    if changed is not None and changed.error:
        with run.writer() as events:
            events.write("failed", changed.error)
    return changed is not None and changed.state == "running"


def active(home: Path | None = None) -> list[Status]:
    """The runs that wait or work, without desks, the one at work first."""
    found = [status for status in Store(home).list(state=ACTIVE) if status.kind != "desk"]
    return sorted(found, key=lambda status: (status.state == "queued", status.queued))
