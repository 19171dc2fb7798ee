"""The lines a run has to say: one JSON object a line, versioned, numbered, never rewritten. Knows files and JSON; nothing of models.

`{"v": 1, "n": 17, "t": 1763.2, "kind": "layer_done", "data": {...}}`. `n` rises by one within a folder, over resumes
too. A reader takes a file that is still being written: a torn last line is left for later, a line that a crash cut in
the middle is skipped, a kind of a newer Bitpress is handed on as it is.
"""

import json
import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

VERSION = 1
KINDS = (
    "queued", "started", "stage_started", "progress", "trial", "layer_done", "block_loss", "train_loss", "window", "metrics", "sample", "resources", "note",
    "order_done", "order_superseded", "order_failed", "cancelled", "interrupted", "failed", "finished",
)  # fmt: skip
CUT = b" (cut)\n"  # closes a torn line so that it stays unreadable, even one that lacks nothing but its newline
ORDER_ENDS = ("order_done", "order_superseded", "order_failed")


@dataclass(frozen=True)
class Event:
    """One line: `n` its number (from 1), `t` seconds since the epoch, `kind` and its `data`."""

    n: int
    t: float
    kind: str
    data: dict[str, Any] = field(default_factory=dict)
    v: int = VERSION

    def to_line(self) -> bytes:
        """The line as it stands in the file, its newline included."""
        return json_line({"v": self.v, "n": self.n, "t": round(self.t, 3), "kind": self.kind, "data": self.data})


def json_line(values: dict[str, Any]) -> bytes:
    """Strict JSON in UTF-8 with a newline. A number that is not finite is left out of its mapping: absent, never null."""
    return (json.dumps(finite(values), ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_plain) + "\n").encode("utf8", "replace")


def finite(value: Any) -> Any:
    """The same plain value without the numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items() if not _unwritable(item)}
    if isinstance(value, list | tuple):
        return [None if _unwritable(item) else finite(item) for item in value]
    return value


def _plain(value: Any) -> Any:
    """A scalar of numpy or torch as a Python number, anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _unwritable(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def parse_line(line: bytes) -> Event | None:
    """The event of a whole line; None for what is no event (cut by a crash, or of another program)."""
    try:
        values = json.loads(line)
        return Event(int(values["n"]), float(values["t"]), str(values["kind"]), dict(values.get("data") or {}), int(values.get("v", VERSION)))
    except (ValueError, KeyError, TypeError):
        return None


def read_events(path: Path, after: int = 0) -> list[Event]:
    """The events with a number above `after`, in order; none when the file is absent.

    The place in the file is found by bisection over bytes, so that a tail of a long file costs no more than its length.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(_start_of(file, after, size) if after > 0 else 0)
            return [event for event in _whole_events(file) if event.n > after]
    except FileNotFoundError:
        return []


def _whole_events(file: IO[bytes]) -> Iterator[Event]:
    for line in file:
        if line.endswith(b"\n") and (event := parse_line(line)):
            yield event


def _start_of(file: IO[bytes], after: int, size: int) -> int:
    """A byte offset at or before the first event numbered above `after`, at a line's start, near it."""
    low, high = 0, size
    while high - low > 4096:
        middle = (low + high) // 2
        file.seek(middle)
        file.readline()
        start = file.tell()
        event = next(_whole_events(file), None) if start < high else None
        if event is None or event.n > after:
            high = middle
        else:
            low = start
    return low


def last_number(path: Path) -> int:
    """The number of the last whole event in the file, 0 when there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for back in (1 << 16, size):
                file.seek(max(0, size - back))
                numbers = [event.n for event in _whole_events(file)]
                if numbers:
                    return max(numbers)
    except FileNotFoundError:
        pass
    return 0


class EventWriter:
    """Appends events to a file; each is one write, on disk for every reader before `write` returns. Safe between threads.

    One process writes at a time: the worker while it lives, the job engine before and after. A torn line that a killed
    writer left is closed first, and numbers go on from the last whole event.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._n = last_number(path)
        self._torn = not _ends_whole(path)

    def write(self, kind: str, data: dict[str, Any] | None = None, **more: Any) -> Event:
        """Append one event. Raises OSError when the disk is full; the number is then not used up."""
        with self._lock:
            event = Event(self._n + 1, time.time(), kind, {**(data or {}), **more})
            line = CUT * self._torn + event.to_line()
            self._torn = True
            while line:
                line = line[os.write(self._file, line) :]
            self._torn, self._n = False, event.n
            return event

    __call__ = write

    def close(self) -> None:
        """Give the file back; further writes fail."""
        os.close(self._file)

    def __enter__(self) -> "EventWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
