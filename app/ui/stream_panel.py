"""An answer as it streams from the desk, folded from the events of one order. Knows the event kinds; draws through `token_diff`.

States: `waiting` (nothing said yet), `writing`, then `done`, `stopped`, `superseded` or `failed`, which are final.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bitpress.app.ui.numbers import THIN, amount
from bitpress.app.ui.token_diff import Side
from bitpress.engine.runs.events import Event

OPEN = ("waiting", "writing")
ENDS = {"order_done": "done", "order_superseded": "superseded", "order_failed": "failed"}


@dataclass
class Stream:
    """One order and what came of it. `tokens` by side in the order asked; `speeds` in tokens/s where the desk told them."""

    order: str
    sides: tuple[str, ...]
    prompt: str
    cursor: int = 0
    state: str = "waiting"
    tokens: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    speeds: dict[str, float] = field(default_factory=dict)
    error: dict[str, str] = field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Whether more is to come."""
        return self.state in OPEN


def fold(stream: Stream, events: Iterable[Event]) -> Stream:
    """Take events into the stream, in place. Events of other orders and kinds of a newer Bitpress are passed over."""
    for event in events:
        if event.n <= stream.cursor:
            continue
        stream.cursor = event.n
        if event.data.get("order") != stream.order:
            continue
        if event.kind == "sample":
            _token(stream, event)
        elif event.kind in ENDS:
            _end(stream, event)
    return stream


def _token(stream: Stream, event: Event) -> None:
    side = str(event.data.get("side"))
    token = dict(event.data) | {"id": event.data.get("token", event.data.get("id"))}
    stream.tokens.setdefault(side, []).append(token)
    stream.state = "writing"


def _end(stream: Stream, event: Event) -> None:
    stream.state = "stopped" if event.data.get("stopped") else ENDS[event.kind]
    if event.kind == "order_failed":
        stream.error = {part: str(event.data.get(part, "")) for part in ("what", "why", "remedy")}
    told: Any = event.data.get("sides")
    for side, summary in told.items() if isinstance(told, Mapping) else ():
        if isinstance(summary, Mapping) and summary.get("tokens_per_s"):
            stream.speeds[str(side)] = float(summary["tokens_per_s"])


def panes(stream: Stream | None, sides: Sequence[str], titles: Mapping[str, str]) -> list[Side]:
    """The columns: those of the stream, or empty ones for the sides that are chosen."""
    if stream is None:
        return [Side(titles.get(side, side)) for side in sides]
    return [Side(titles.get(side, side), stream.tokens.get(side, ()), foot(stream, side), stream.open) for side in stream.sides]


def foot(stream: Stream, side: str) -> str:
    """Tokens so far, and how fast they came where the desk has told it."""
    count = len(stream.tokens.get(side, ()))
    if not count:
        return "waiting" if stream.open else ""
    speed = f" · {amount(stream.speeds[side])}{THIN}tokens/s" if side in stream.speeds else ""
    return f"{count} {'token' if count == 1 else 'tokens'}{speed}"


def words(stream: Stream) -> str:
    """How the answer stands, in a few words."""
    return {
        "waiting": "Waiting for the first token", "writing": "Writing", "done": "Done", "stopped": "Stopped",
        "superseded": "Replaced by a newer question", "failed": "Failed",
    }[stream.state]  # fmt: skip
