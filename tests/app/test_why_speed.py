"""What the panel says of a token's time, and what bounds each part."""

import pytest

from bitpress.app.ui.numbers import THIN, TIMES
from bitpress.app.ui.why_speed import parts_of, roofline_figure, sentences, split, split_figure, table


def part(name: str, seconds: float, size: int, calls: int = 30, kernel: str = "C++ low-bit") -> dict:
    counts = {"layers": calls, "calls": calls, "bytes": size, "flops": 2 * size}
    return {"part": name, "kernel": kernel, "reason": "reads codes as they are", **counts, "seconds": seconds}


def record(*parts: dict, rest: float) -> dict:
    token = sum(each["seconds"] for each in parts) + rest
    return {"token_parts": {"token_s": token, "read_bytes_per_s": 1e11, "call_s": 2e-6, "parts": [*parts, {"part": "rest", "bytes": 10**6, "seconds": rest}]}}


DENSE = record(part("q, k, v", 2e-3, 10**8), part("down", 3e-3, 2 * 10**8), part("head", 1e-3, 5 * 10**7, 1), rest=4e-3)
NOW = record(part("q, k, v", 1e-3, 8 * 10**7), part("down", 1e-3, 10**7), part("head", 1e-4, 10**5, 40), rest=2.9e-3)


def test_every_part_stands_beside_what_its_bytes_need() -> None:
    parts = {each.name: each for each in parts_of(NOW)}
    assert parts["q, k, v"].ideal_s == pytest.approx(8e-4) and parts["q, k, v"].fraction == pytest.approx(0.8)
    assert parts["q, k, v"].bound.startswith("memory-bound")
    assert parts["down"].bound.startswith("compute-bound")
    assert parts["output head"].bound.startswith("launch overhead")
    assert parts["attention, norms, calls between"].fraction is None and "does not shrink" in parts["attention, norms, calls between"].bound


def test_a_part_faster_than_memory_came_from_a_cache() -> None:
    assert parts_of(record(part("down", 1e-6, 10**6), rest=0.0))[0].bound.startswith("cache")


def test_the_sentences_are_amdahls() -> None:
    """Dense 10 ms, now 5 ms: the linears' 2 ms gone would leave 3 ms; all bytes at the read rate take 0.911 ms."""
    first, second, third = sentences(DENSE, NOW)
    assert first == f"A token takes 5.00{THIN}ms: 40.0{THIN}% linears, 2.00{THIN}% output head, 58.0{THIN}% attention, norms, calls between."
    assert f"Measured 2.00{TIMES} the speed of dense. Were the linears free, it would be 3.33{TIMES}" in second and f"11.0{TIMES}" in second
    assert third.startswith("100 products a token") and f"4.00{THIN}% of the token" in third


def test_without_a_dense_side_nothing_is_compared() -> None:
    assert len(sentences({}, NOW)) == 2
    assert table({}, NOW)["µs dense"] == [None] * 4


def test_a_step_that_is_one_call_has_no_launch_overhead() -> None:
    fused = {"token_parts": {**NOW["token_parts"], "call_s": 0.0}}
    assert "one call" in sentences(DENSE, fused)[-1] and parts_of(fused)[2].bound.startswith("compute-bound")


def test_products_slower_alone_than_in_the_step_are_told() -> None:
    scaled = {"token_parts": {**NOW["token_parts"], "excess": 1.4}}
    assert f"took 1.40{TIMES} the whole step" in sentences(DENSE, scaled)[0]


def test_a_record_without_parts_has_none() -> None:
    assert parts_of({"decode_tokens_per_s": 3.0}) == []


def test_figures_hold_the_numbers_and_tell_sides_apart_without_colour() -> None:
    sums = {"dense": split(parts_of(DENSE)), "compressed": split(parts_of(NOW))}
    bars = split_figure(sums)
    assert [list(bar.x) for bar in bars.data] == [pytest.approx([5.0, 2.0]), pytest.approx([1.0, 0.1]), pytest.approx([4.0, 2.9])]
    assert len({bar.marker.pattern.shape for bar in bars.data}) == 3
    dots = roofline_figure({"dense": parts_of(DENSE), "compressed": parts_of(NOW)})
    assert len({trace.marker.symbol for trace in dots.data}) == 2 and len(dots.data[1].x) == 3


def test_the_table_has_a_row_a_part() -> None:
    columns = table(DENSE, NOW)
    assert {len(values) for values in columns.values()} == {4}
    assert columns["share of read rate"][:2] == [0.8, 0.1] and columns["µs dense"][0] == 2000.0
