"""Lines that a run has to say: written whole, numbered, read back for ever."""

import errno
import json
import math
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.engine.runs.events import EventWriter, json_line, last_number, read_events

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
DATA = st.dictionaries(st.text(max_size=8), PLAIN, max_size=4)


@given(items=st.lists(st.tuples(st.sampled_from(["progress", "sample", "kind-of-2031"]), DATA), max_size=12))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read_back_in_order(tmp_path_factory: pytest.TempPathFactory, items: list[tuple[str, dict[str, object]]]) -> None:
    path = tmp_path_factory.mktemp("events") / "events.jsonl"
    with EventWriter(path) as events:
        for kind, data in items:
            events.write(kind, data)
    found = read_events(path)
    assert [event.n for event in found] == list(range(1, len(items) + 1))
    assert [(event.kind, event.data) for event in found] == [(kind, _as_read(data)) for kind, data in items]


def _as_read(data: dict[str, object]) -> object:
    """Lone surrogates cannot be stored in UTF-8; they come back as question marks."""
    return json.loads(json.dumps(data, ensure_ascii=False).encode("utf8", "replace"))


@given(cut=st.integers(0, 400), after=st.integers(0, 12))
@settings(max_examples=80, deadline=None)
def test_a_file_cut_anywhere_gives_its_whole_lines_and_goes_on(tmp_path_factory: pytest.TempPathFactory, cut: int, after: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "events.jsonl"
    with EventWriter(path) as events:
        for index in range(8):
            events.write("layer_done", {"layer": f"model.layers.{index}"})
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    kept = whole[:cut].count(b"\n")
    assert [event.n for event in read_events(path, after)] == list(range(after + 1, kept + 1))
    with EventWriter(path) as events:
        assert events.write("queued").n == kept + 1
    assert [event.n for event in read_events(path)] == list(range(1, kept + 2))


@pytest.mark.parametrize("after", [0, 1, 17, 2500, 4998, 4999, 5000, 9999])
def test_a_tail_of_a_long_file_is_found_by_number(tmp_path: Path, after: int) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path) as events:
        for index in range(5000):
            events.write("sample", {"text": "x" * (index % 97)})
    assert [event.n for event in read_events(path, after)] == list(range(after + 1, 5001))


def test_a_tail_survives_damaged_lines_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path) as events:
        for index in range(900):
            events.write("sample", {"index": index})
    lines = path.read_bytes().splitlines(keepends=True)
    for index in range(300, 500):
        lines[index] = b"\x00\xff not an event\n"
    path.write_bytes(b"".join(lines))
    for after in (250, 300, 400, 500, 700):
        assert [event.n for event in read_events(path, after)] == [n for n in range(after + 1, 901) if not 301 <= n <= 500]


def test_numbers_go_on_over_writers(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for expected in (1, 2, 3):
        with EventWriter(path) as events:
            assert events.write("queued").n == expected
    assert last_number(path) == 3


def test_threads_share_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path) as events:
        threads = [threading.Thread(target=lambda: [events.write("resources", {"rss": 1}) for _ in range(200)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [event.n for event in read_events(path)] == list(range(1, 801))


def test_numbers_that_json_cannot_hold_are_absent() -> None:
    values = json.loads(json_line({"a": math.inf, "b": {"c": math.nan, "d": 1.5}, "e": [math.nan, 2]}))
    assert values == {"b": {"d": 1.5}, "e": [None, 2]}


def test_a_failed_write_uses_no_number_and_harms_no_other_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path) as events:
        events.write("progress", {"done": 1})
        real = os.write

        def full(file: int, data: bytes) -> int:
            real(file, data[:7])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            events.write("progress", {"done": 2})
        monkeypatch.setattr(os, "write", real)
        assert events.write("progress", {"done": 3}).n == 2
    assert [event.data["done"] for event in read_events(path)] == [1, 3]


def test_an_absent_file_holds_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path / "none.jsonl", 3) == []
    assert last_number(tmp_path / "none.jsonl") == 0
