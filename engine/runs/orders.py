"""What a screen asks of a resident worker: one JSON line an order in `orders.jsonl`. Knows files; nothing of models.

`{v, id, session, t, kind, args}`, each appended in one write under 4 KiB, so that several tabs may ask at once. Every
order ends in exactly one event `order_done`, `order_superseded` or `order_failed` with its id.
"""

import json
import os
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bitpress.engine.errors import InputError
from bitpress.engine.runs.events import ORDER_ENDS, json_line, read_events

VERSION = 1
MAX_BYTES = 4096
FILE = "orders.jsonl"


@dataclass(frozen=True)
class Order:
    """One wish. A newer one of the same session and kind supersedes an older one."""

    id: str
    session: str
    t: float
    kind: str
    args: dict[str, Any] = field(default_factory=dict)
    v: int = VERSION


def append_order(folder: Path, kind: str, args: dict[str, Any], session: str = "") -> Order:
    """Write an order down. Raises InputError when it does not fit in 4 KiB, OSError when the disk is full."""
    order = Order(str(uuid.uuid4()), session, time.time(), kind, args)
    line = json_line(asdict(order))
    if len(line) > MAX_BYTES:
        raise InputError("This prompt is too long to be sent.", f"The order has {len(line):,} bytes; the limit is {MAX_BYTES:,}.", "Shorten the prompt.")
    file = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line)
    finally:
        os.close(file)
    return order


class Inbox:
    """Reads `orders.jsonl` as it grows. A look at an unchanged file costs one stat."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._offset = 0

    def has_mail(self) -> bool:
        """Whether the file has grown since the last `take`."""
        try:
            return self.path.stat().st_size > self._offset
        except FileNotFoundError:
            return False

    def take(self) -> list[Order]:
        """The orders that came since the last call, oldest first. A line still being written waits; one that is no order is skipped."""
        if not self.has_mail():
            return []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            read = file.read()
        whole = read[: read.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [order for line in whole.splitlines() if (order := _parsed(line))]


def _parsed(line: bytes) -> Order | None:
    try:
        values = json.loads(line)
        return Order(str(values["id"]), str(values.get("session", "")), float(values.get("t", 0.0)), str(values["kind"]), dict(values.get("args") or {}))
    except (ValueError, KeyError, TypeError):
        return None


def ended_orders(folder: Path) -> set[str]:
    """Ids of the orders that already have their end event."""
    return {str(event.data.get("order")) for event in read_events(folder / "events.jsonl") if event.kind in ORDER_ENDS}


def has_waiting(folder: Path) -> bool:
    """Whether an order has no end event yet."""
    ended = ended_orders(folder)
    return any(order.id not in ended for order in Inbox(folder).take())
