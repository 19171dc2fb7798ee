"""What a kind of run gets to work with: its request, a voice, progress with time left, and the wish to stop. Torch-free."""

import importlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from bitpress.engine.errors import Cancelled, InputError
from bitpress.engine.runs.events import EventWriter
from bitpress.engine.runs.status import change_status, replace_json
from bitpress.engine.runs.store import Run

QUIET_SECONDS = 0.25  # between two progress events of a phase
RATE_SECONDS = 30.0  # the time left follows the rate of the last half minute
PHASES = {"perplexity": "measuring quality", "latency": "measuring speed"}  # stages of the engine in words for a person


class Task:
    """One run at work. Safe to use from the heartbeat's thread and the worker's own."""

    def __init__(self, run: Run, events: EventWriter) -> None:
        self.run = run
        self.args: dict[str, Any] = run.request().get("args", {})
        self._events = events
        self._stopped = threading.Event()
        self._phase, self._done, self._total = "starting", 0, 0
        self._marks: deque[tuple[float, int]] = deque()
        self._told_eta: float | None = None
        self._said = 0.0

    def do(self) -> None:
        """Run the request's kind. Raises InputError for a kind that this Bitpress does not know."""
        kinds: dict[str, Callable[[Task], None]] = importlib.import_module("bitpress.engine.runs.kinds").KINDS
        kind = self.run.request().get("kind")
        if kind not in kinds:
            raise InputError(f"There is no run of kind '{kind}'.", "", f"This Bitpress knows {', '.join(kinds)}.")
        kinds[kind](self)

    def emit(self, kind: str, data: dict[str, Any] | None = None, **more: Any) -> None:
        """Say something. A `progress` is thinned out and gets its time left; a `stage_started` begins a phase."""
        values = {**(data or {}), **more}
        if kind == "progress":
            self.progress(int(values["done"]), values.get("total"), values.get("eta_s"))
        elif kind == "stage_started":
            self.phase(PHASES.get(values["stage"], values["stage"]), values.get("total", 0))
        else:
            self._events.write(kind, values)

    def phase(self, name: str, total: int = 0) -> None:
        """Begin a part of the run, of `total` units where they are known. Raises Cancelled when the run was asked to stop."""
        self.check()
        self._phase, self._done, self._total = name, 0, total
        self._told_eta = None
        self._marks.clear()
        self._events.write("stage_started", {"stage": name, "total": total})
        change_status(self.run.path, lambda _: self.standing())

    def progress(self, done: int, total: int | None = None, eta_s: float | None = None) -> None:
        """`done` of `total` units of the phase. `eta_s` None: the time left follows from the rate of late."""
        now = time.monotonic()
        self._done, self._total, self._told_eta = done, total or self._total, eta_s
        self._marks.append((now, done))
        while now - self._marks[0][0] > RATE_SECONDS and len(self._marks) > 2:
            self._marks.popleft()
        if now - self._said < QUIET_SECONDS and done != self._total:
            return
        self._said = now
        left = self.eta()
        known = {} if left is None else {"eta_s": round(left, 1)}
        self._events.write("progress", {"done": done, "total": self._total, "phase": self._phase, **known})

    def eta(self) -> float | None:
        """Seconds left of the phase: as the work itself told, else at the rate of late; None before two marks."""
        if self._told_eta is not None:
            return self._told_eta
        marks = list(self._marks)
        if len(marks) < 2 or marks[-1][1] <= marks[0][1]:
            return None
        rate = (marks[-1][1] - marks[0][1]) / max(1e-9, marks[-1][0] - marks[0][0])
        return max(0.0, (self._total - self._done) / rate)

    def standing(self) -> dict[str, Any]:
        """The fields of the record that say how far the run is."""
        return {"phase": self._phase, "done": self._done, "total": self._total, "eta_s": self.eta()}

    def stop(self) -> None:
        """Ask the work to stop where it next can."""
        self._stopped.set()

    def should_stop(self) -> bool:
        """Whether it was asked to."""
        return self._stopped.is_set()

    def check(self) -> None:
        """Raise Cancelled when it was."""
        if self.should_stop():
            raise Cancelled()

    def record(self, **fields: Any) -> None:
        """Set fields of the record, such as the digest."""
        change_status(self.run.path, lambda _: fields)

    def write(self, name: str, values: Any) -> None:
        """Keep a JSON file in the run's folder, whole or not at all."""
        replace_json(self.run.path / name, values)
