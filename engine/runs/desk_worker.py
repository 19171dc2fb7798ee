"""The resident worker's side of a desk: read orders, stream answers, end every order in exactly one event. Knows order rules, no maths.

A newer order of the same session and kind supersedes an older one at the next token or window. Orders are looked for every
20 ms, and between two tokens or windows. Nothing asked for a while: the worker ends and its memory is free.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.runs import failures, samples
from bitpress.engine.runs.desk_live import LiveDesk
from bitpress.engine.runs.events import read_events
from bitpress.engine.runs.orders import Inbox, Order, ended_orders
from bitpress.engine.runs.resident import DENSE, Resident
from bitpress.engine.runs.task import Task

POLL_SECONDS = 0.02
IDLE_SECONDS = 600.0
DONE: tuple[str, dict[str, Any]] = ("order_done", {})
LOST = BitpressError("The answer was cut off.", "The worker ended while it was writing.", "Ask again.")
CLOSED = BitpressError("The desk was closed.", "Its worker was asked to end.", "Ask again: it starts anew.")


def idle_seconds() -> float:
    """How long a desk waits for an order: `BITPRESS_DESK_IDLE`, else ten minutes."""
    return float(os.environ.get("BITPRESS_DESK_IDLE", IDLE_SECONDS))


@dataclass
class Desk:
    """Orders that wait, and how the one at work was told to end before its last token."""

    task: Task
    resident: Resident
    waiting: list[Order] = field(default_factory=list)
    current: Order | None = None
    cut: tuple[str, dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        self.inbox = Inbox(self.task.run.path)
        self.ended = ended_orders(self.task.run.path)
        self.live = LiveDesk(self.resident)

    def end(self, order: Order, kind: str, data: dict[str, Any]) -> None:
        """The order's one end event."""
        self.task.emit(kind, {"order": order.id, "order_kind": order.kind, **data})
        self.ended.add(order.id)

    def look(self) -> bool:
        """Take new orders in; True when some came."""
        orders = [order for order in self.inbox.take() if order.id not in self.ended]
        for order in orders:
            self._receive(order)
        return bool(orders)

    def _receive(self, order: Order) -> None:
        if order.kind == "ping":
            self.end(order, "order_done", {"sides": self.resident.sides()})
        elif order.kind == "stop":
            self._cut(order, "order_done", {"stopped": True})
            self.end(order, "order_done", {})
        elif order.kind in ("generate", "scheme"):
            self._cut(order, "order_superseded", {"by": order.id})
            self.waiting.append(order)
        else:
            refusal = InputError(f"A desk has no order '{order.kind}'.", "", "It knows generate, scheme, stop and ping.")
            self.end(order, "order_failed", refusal.as_dict())

    def _cut(self, newer: Order, kind: str, data: dict[str, Any]) -> None:
        """End the session's earlier orders of the same kind, or of any at a stop: those that wait now, the one at work where it next looks."""
        for order in [order for order in self.waiting if _replaces(newer, order)]:
            self.waiting.remove(order)
            self.end(order, kind, data)
        if self.current is not None and _replaces(newer, self.current) and self.cut is None:
            self.cut = (kind, data)

    def answer(self, order: Order) -> None:
        """Do what was asked, and end the order whatever happens."""
        self.current, self.cut = order, None
        try:
            done = self._generate(order) if order.kind == "generate" else self._show(order)
            kind, data = self.cut or DONE
            self.end(order, kind, {**data, **done})
        except Exception as error:
            self.end(order, "order_failed", failures.explain(error).as_dict())
            if not isinstance(error, BitpressError):
                raise
        finally:
            self.current = None

    def _generate(self, order: Order) -> dict[str, Any]:
        """Token by token for each side in turn, so that all columns stream together."""
        names = [str(side) for side in order.args.get("sides") or [DENSE]]
        loaded, sampling = self.resident.loaded, samples.parse_sampling(order.args.get("sampling") or {})
        ids = samples.prompt_ids(loaded.tokenizer, str(order.args.get("prompt", "")), self.resident.entry.needs_bos)
        self.task.phase("loading")
        models = {name: self.resident.side(name) for name in dict.fromkeys(names)}
        chorus = samples.Chorus(loaded.tokenizer, loaded.model, models, ids, sampling)
        self.task.phase("generating")
        for side, token in self._until_cut(chorus.tokens()):
            self.task.emit("sample", {"order": order.id, "side": side, **token})
        return {"sides": chorus.summary()}

    def _show(self, order: Order) -> dict[str, Any]:
        """A recipe on the live twin, window by window."""
        self.task.phase("measuring")
        return self.live.perform(order, self.task.emit, self._is_cut)

    def _is_cut(self) -> bool:
        """Whether the order at work has to end before its last token or window."""
        self.look()
        if self.cut is None and self.task.should_stop():
            self.cut = ("order_failed", CLOSED.as_dict())
        return self.cut is not None

    def _until_cut(self, tokens: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
        for item in tokens:
            yield item
            if self._is_cut():
                return

    def close(self) -> None:
        """End what still waits, because the worker ends."""
        self.look()
        for order in self.waiting:
            self.end(order, "order_failed", CLOSED.as_dict())


def _replaces(newer: Order, order: Order) -> bool:
    return order.session == newer.session and newer.kind in ("stop", order.kind)


def serve(task: Task, resident: Resident) -> None:
    """Answer orders until none came for `idle_seconds()`. Raises Cancelled when the desk is closed."""
    desk = Desk(task, resident)
    _fail_lost(desk)
    task.phase("ready")
    last = time.monotonic()
    try:
        while time.monotonic() - last < idle_seconds():
            if desk.look():
                last = time.monotonic()
            if desk.waiting:
                desk.answer(desk.waiting.pop(0))
                task.phase("ready")
                last = time.monotonic()
            task.check()
            time.sleep(POLL_SECONDS)
    finally:
        desk.close()


def _fail_lost(desk: Desk) -> None:
    """Orders that a killed worker had begun: their tokens stand in the file already, so they are not begun again."""
    begun = {event.data.get("order") for event in read_events(desk.task.run.path / "events.jsonl") if event.kind in ("sample", "window")}
    for order in Inbox(desk.task.run.path).take():
        if order.id in begun and order.id not in desk.ended:
            desk.end(order, "order_failed", LOST.as_dict())
