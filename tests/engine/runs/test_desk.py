"""A desk with a real worker on the tiny model: orders in, tokens out, every order ended exactly once."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bitpress.engine.errors import InputError
from bitpress.engine.home import home
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs import jobs
from bitpress.engine.runs.desk import Desk, open_desk
from bitpress.engine.runs.events import ORDER_ENDS, Event
from bitpress.engine.runs.follow import follow
from bitpress.engine.runs.orders import Inbox, append_order
from bitpress.engine.runs.status import process_started
from bitpress.engine.runs.store import Store

PROMPT = "Once upon a time there was"
SHORT = {"max_new": 6, "temperature": 0.0, "seed": 0}
LONG = {"max_new": 110, "temperature": 0.0, "seed": 0}


@pytest.fixture
def desk(tiny_home: str) -> Iterator[Desk]:
    """A desk of the tiny model; its worker is ended afterwards."""
    opened = open_desk(tiny_home)
    yield opened
    opened.close()
    until(lambda: not opened.status().active)


def until(true: Callable[[], Any], seconds: float = 120.0) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "it never became so"
        jobs.pump()
        time.sleep(0.05)


def end_of(desk: Desk, order: str) -> Event:
    """The one event that ends an order."""
    until(lambda: any(event.kind in ORDER_ENDS for event in desk.events_of(order)))
    (end,) = [event for event in desk.events_of(order) if event.kind in ORDER_ENDS]
    return end


def tokens_of(desk: Desk, order: str) -> list[dict[str, Any]]:
    return [event.data for event in desk.events_of(order) if event.kind == "sample"]


def test_dense_and_compressed_stream_side_by_side(desk: Desk, tiny_recipe: Callable[..., Recipe]) -> None:
    run = jobs.submit("compress", {"samples": 0}, tiny_recipe(8))
    follow(run)
    end = end_of(desk, desk.order("generate", {"sides": ["dense", run.id], "prompt": PROMPT, "sampling": SHORT}))
    assert end.kind == "order_done", end.data
    tokens = tokens_of(desk, end.data["order"])
    assert [token["side"] for token in tokens[:4]] == ["dense", run.id, "dense", run.id]
    for side in ("dense", run.id):
        mine = [token for token in tokens if token["side"] == side]
        assert [token["index"] for token in mine] == list(range(6))
        assert all(token.keys() >= {"order", "side", "token", "text", "logprob", "rank", "top"} for token in mine)
        assert end.data["sides"][side]["tokens"] == 6
        assert end.data["sides"][side]["tokens_per_s"] > 0
    assert all(token["kl"] >= 0 for token in tokens if token["side"] == run.id)
    again = end_of(desk, desk.order("generate", {"sides": [run.id], "prompt": PROMPT, "sampling": SHORT}))
    alone = [token["token"] for token in tokens_of(desk, again.data["order"])]
    assert alone == [token["token"] for token in tokens if token["side"] == run.id]


def test_a_newer_order_supersedes_and_stop_stops(desk: Desk) -> None:
    other = Desk(desk.run, session="another tab")
    first = desk.order("generate", {"prompt": PROMPT, "sampling": LONG})
    elsewhere = other.order("generate", {"prompt": PROMPT, "sampling": SHORT})
    second = desk.order("generate", {"prompt": PROMPT, "sampling": LONG})
    ping = desk.order("ping")
    assert end_of(desk, ping).kind == "order_done"
    superseded = end_of(desk, first)
    assert (superseded.kind, superseded.data["by"]) == ("order_superseded", second)
    assert len(tokens_of(desk, first)) < 110
    until(lambda: tokens_of(desk, second) or any(event.kind in ORDER_ENDS for event in desk.events_of(second)))
    stop = desk.order("stop")
    assert end_of(desk, stop).kind == "order_done"
    assert end_of(desk, second).kind == "order_done"
    assert end_of(desk, elsewhere).kind == "order_done"
    assert len(tokens_of(desk, elsewhere)) == 6
    ends = [event.data["order"] for event in desk.events() if event.kind in ORDER_ENDS]
    assert sorted(ends) == sorted([first, second, elsewhere, ping, stop])


def test_what_cannot_be_answered_fails_in_words_and_the_desk_lives(desk: Desk) -> None:
    too_long = end_of(desk, desk.order("generate", {"prompt": "Once " * 200, "sampling": SHORT}))
    assert too_long.kind == "order_failed"
    unknown = end_of(desk, desk.order("generate", {"sides": ["20260101-000000-abcd"], "prompt": PROMPT, "sampling": SHORT}))
    assert unknown.kind == "order_failed"
    assert "no run" in unknown.data["what"]
    assert unknown.data.keys() >= {"what", "why", "remedy"}
    strange = append_order(desk.path, "juggle", {})
    assert end_of(desk, strange.id).kind == "order_failed"
    assert end_of(desk, desk.order("ping")).kind == "order_done"
    with pytest.raises(InputError, match="too long"):
        desk.order("generate", {"prompt": "x" * 5000})
    with pytest.raises(InputError, match="no order"):
        desk.order("juggle")


def test_a_killed_desk_starts_again_and_loses_no_order(desk: Desk) -> None:
    assert open_desk(desk.status().model or "").id == desk.id
    begun = desk.order("generate", {"prompt": PROMPT, "sampling": LONG})
    until(lambda: tokens_of(desk, begun))
    pid = desk.status().pid
    assert pid is not None
    os.killpg(pid, signal.SIGSTOP)
    waiting = append_order(desk.path, "generate", {"prompt": PROMPT, "sampling": SHORT}, session="another tab")
    os.killpg(pid, signal.SIGKILL)
    until(lambda: process_started(pid) is None and desk.status().state == "interrupted")
    assert open_desk(desk.status().model or "").id == desk.id
    assert end_of(desk, waiting.id).kind == "order_done"
    assert end_of(desk, begun).kind in ("order_failed", "order_done")  # done only if its last token came before the kill
    assert [event.n for event in desk.events()] == list(range(1, len(desk.events()) + 1))


def test_an_idle_desk_ends_and_an_order_wakes_it(tiny_home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITPRESS_DESK_IDLE", "0.2")
    desk = open_desk(tiny_home)
    until(lambda: desk.status().state == "finished")
    assert end_of(desk, desk.order("ping")).kind == "order_done"
    until(lambda: desk.status().state == "finished")
    assert [status.id for status in Store().list(kind="desk")] == [desk.id]


def test_orders_are_read_whole_and_once(tmp_path: Any) -> None:
    inbox = Inbox(tmp_path)
    assert inbox.take() == []
    first = append_order(tmp_path, "ping", {}, "tab")
    with (tmp_path / "orders.jsonl").open("ab") as file:
        file.write(b"not an order\n")
    second = append_order(tmp_path, "generate", {"prompt": "a"})
    assert inbox.take() == [first, second]
    with (tmp_path / "orders.jsonl").open("ab") as file:
        file.write(b'{"v": 1, "id": "x", "kin')
    assert inbox.take() == []
    with (tmp_path / "orders.jsonl").open("ab") as file:
        file.write(b'd": "ping", "newer": true}\n')
    assert [order.id for order in inbox.take()] == ["x"]
    assert inbox.take() == []


def windows_of(desk: Desk, order: str) -> list[dict[str, Any]]:
    return [event.data for event in desk.events_of(order) if event.kind == "window"]


def kept(recipe: Recipe) -> str:
    path = home() / "recipes" / f"{recipe.digest()}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(recipe.to_yaml())
    return recipe.digest()


def test_a_recipe_is_shown_live_window_by_window(desk: Desk, tiny_recipe: Callable[..., Recipe]) -> None:
    eight, two = kept(tiny_recipe(8)), kept(tiny_recipe(2))
    end = end_of(desk, desk.order("scheme", {"recipe": eight}))
    assert end.kind == "order_done", end.data
    windows = windows_of(desk, end.data["order"])
    assert [window["index"] for window in windows] == list(range(len(windows)))
    assert windows[-1].keys() >= {"nll_dense", "nll", "ratio", "low", "high"}
    metrics = end.data["metrics"]
    assert metrics["compressed"].keys() >= {"perplexity", "perplexity_ratio", "kl_mean", "same_top1", "bytes"}
    assert metrics["dense"]["perplexity"] > 0
    first = desk.order("scheme", {"recipe": two})
    second = desk.order("scheme", {"recipe": eight})
    assert end_of(desk, second).data["metrics"]["compressed"]["perplexity"] == pytest.approx(metrics["compressed"]["perplexity"], rel=1e-3)
    assert end_of(desk, first).kind in ("order_superseded", "order_done")
    assert end_of(desk, desk.order("scheme", {"recipe": "../../etc/passwd"})).kind == "order_failed"
    assert end_of(desk, desk.order("ping")).kind == "order_done"
