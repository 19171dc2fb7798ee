"""Wait for a run from a terminal: hand its events on, tell its progress, cancel it on Ctrl-C. Torch-free; owns no run."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from bitpress.engine.errors import BitpressError, Cancelled, InputError
from bitpress.engine.runs import jobs
from bitpress.engine.runs.events import Event
from bitpress.engine.runs.status import Status
from bitpress.engine.runs.store import Run

POLL_SECONDS = 0.1
PUMP_SECONDS = 1.0
PLAIN_SECONDS = 10.0  # between two lines where the progress cannot overwrite itself


class ProgressLine:
    """How a run stands, on one line of a terminal that is written over; elsewhere a plain line now and then."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self._live = self.stream.isatty()
        self._last, self._when = "", 0.0

    def show(self, status: Status) -> None:
        """Write the line if it says something new."""
        text = progress_text(status)
        new_phase = text.partition(":")[0] != self._last.partition(":")[0]
        due = self._live or new_phase or time.monotonic() - self._when > PLAIN_SECONDS
        if text != self._last and due:
            self.stream.write(f"\r\x1b[K{text}" if self._live else f"{text}\n")
            self.stream.flush()
            self._last, self._when = text, time.monotonic()

    def close(self) -> None:
        """Leave the line to what is printed next."""
        if self._live and self._last:
            self.stream.write("\r\x1b[K")
            self.stream.flush()


def progress_text(status: Status) -> str:
    """Such as `compressing: 12 of 210, 8 s left`."""
    if status.state == "queued":
        return "waiting for another run to end"
    if status.state == "cancelling":
        return "cancelling"
    counted = f": {status.done:,} of {status.total:,}" if status.total else ""
    left = f", {status.eta_s:.0f} s left" if status.eta_s is not None and status.total else ""
    return f"{status.phase or status.state}{counted}{left}"


def follow(run: Run, on_event: Callable[[Event], None] = lambda _: None, line: ProgressLine | None = None, after: int = 0) -> Status:
    """Wait for the run's end and give its last record; events numbered above `after` are handed on. Ctrl-C cancels the run,
    a second one leaves it to end by itself.

    Raises what the run failed with: InputError for bad input, Cancelled, BitpressError.
    """
    line, pumped, asked = line or ProgressLine(), 0.0, False
    while True:
        try:
            status = run.status()  # before the events, so that none of an ended run is missed
            for event in run.events(after):
                after = event.n
                on_event(event)
            if not status.active:
                line.close()
                return _judged(run, status)
            line.show(status)
            if time.monotonic() - pumped > PUMP_SECONDS:
                jobs.pump(run.path.parent.parent)
                pumped = time.monotonic()
            time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            if asked:
                raise Cancelled(remedy=f"The run ends by itself; `bitpress runs resume {run.id}` goes on with it.") from None
            asked = True
            _cancel(run)


def _cancel(run: Run) -> None:
    try:
        jobs.cancel(run.id, run.path.parent.parent)
    except InputError:
        return  # it ended just now


def _judged(run: Run, status: Status) -> Status:
    again = f"`bitpress runs resume {run.id}` goes on with it."
    if status.state == "finished":
        return status
    if status.state == "cancelled":
        raise Cancelled(remedy=f"Finished layers are kept; {again}")
    if status.state == "interrupted":
        raise BitpressError(f"The run {run.id} was interrupted.", "Its worker process is gone.", again)
    error = status.error or {}
    last = next((event for event in reversed(run.events()) if event.kind == "failed"), None)
    kind = InputError if last and last.data.get("exit_code") == InputError.exit_code else BitpressError
    raise kind(error.get("what", f"The run {run.id} failed."), error.get("why", ""), error.get("remedy", ""))
