"""The screen's side of a resident worker: find or start the desk of a model, give it orders, read what it says. Torch-free.

A desk is a run of kind `desk`: its folder holds `orders.jsonl` and `events.jsonl`, its worker keeps the model in memory
and ends by itself when nothing was asked for a while. An order given to an ended desk starts it again.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

from bitpress.engine.errors import InputError
from bitpress.engine.runs import jobs
from bitpress.engine.runs.events import Event
from bitpress.engine.runs.orders import append_order
from bitpress.engine.runs.status import ACTIVE, Status, settled_state
from bitpress.engine.runs.store import Run, Store

KINDS = ("generate", "scheme", "stop", "ping")
WORN_BYTES = 16 << 20  # a desk whose events have grown beyond this is not used again


class Desk:
    """A handle on the desk of one model. Holds no open file; `session` keeps one tab's orders apart from another's."""

    def __init__(self, run: Run, session: str = "", home: Path | None = None) -> None:
        self.run, self.session, self._home = run, session, home
        self.id, self.path = run.id, run.path

    def status(self) -> Status:
        """State and phase: `loading`, `ready`, `generating`."""
        return self.run.status()

    def order(self, kind: str, args: dict[str, Any] | None = None) -> str:
        """Ask for something; gives the order's id, which its events carry. Starts the worker again when it had ended.

        `generate {sides: ["dense", run id...], prompt, sampling: {max_new, temperature, top_p, seed, stop}}`, `scheme {recipe}` with
        the digest of a recipe kept under `recipes/`, `stop {}`, `ping {}`. Raises InputError for another kind or an order above 4 KiB.
        """
        if kind not in KINDS:
            raise InputError(f"A desk has no order '{kind}'.", "", f"It knows {', '.join(KINDS)}.")
        order = append_order(self.path, kind, args or {}, self.session)
        self.wake()
        return order.id

    def events(self, after: int = 0) -> list[Event]:
        """The events numbered above `after`, of all orders."""
        return self.run.events(after)

    def events_of(self, order: str, after: int = 0) -> list[Event]:
        """Only the events of one order."""
        return [event for event in self.events(after) if event.data.get("order") == order]

    def wake(self) -> None:
        """Start the worker if it is not there. A worker that is about to end sees the order first: both look under the same lock."""
        if settled_state(self.path) not in ACTIVE:
            with contextlib.suppress(InputError):  # another tab was faster
                jobs.resume(self.id, self._home)
        else:
            jobs.pump(self._home)

    def close(self) -> None:
        """End the worker and free its memory. A desk that has ended already is no error."""
        with contextlib.suppress(InputError):
            jobs.cancel(self.id, self._home)


def open_desk(model_id: str, run_id: str | None = None, session: str = "", home: Path | None = None) -> Desk:
    """The desk of a model, its worker starting or at work. `run_id` is a side that a new desk loads at once.

    Found again by every tab; of more desks than `BITPRESS_DESKS` (default 2) the one longest unused is closed.
    """
    store = Store(home)
    desks = store.list(kind="desk", limit=50)
    found = next((status for status in desks if status.model == model_id and status.state != "cancelling" and not _is_worn(store, status)), None)
    if found is None:
        run = jobs.submit("desk", {"model": model_id, "sides": [run_id] if run_id else []}, title=f"Desk {model_id}", home=home)
        _close_others(store, run.id, home)
        return Desk(run, session, home)
    desk = Desk(Run(store.folder / found.id), session, home)
    if not found.active:
        _close_others(store, found.id, home)
    desk.wake()
    return desk


def _is_worn(store: Store, status: Status) -> bool:
    try:
        return not status.active and (store.folder / status.id / "events.jsonl").stat().st_size > WORN_BYTES
    except OSError:
        return True


def _close_others(store: Store, keep: str, home: Path | None) -> None:
    limit = max(1, int(os.environ.get("BITPRESS_DESKS", "2")))
    others = [status for status in store.list(kind="desk", state=ACTIVE) if status.id != keep]
    for status in sorted(others, key=lambda status: _last_order(store, status), reverse=True)[limit - 1 :]:
        Desk(Run(store.folder / status.id), home=home).close()


def _last_order(store: Store, status: Status) -> float:
    try:
        return (store.folder / status.id / "orders.jsonl").stat().st_mtime
    except OSError:
        return status.created
