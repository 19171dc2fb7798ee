"""The kernel table has a full row for every format, its figures follow from its seconds and bytes, and the impossible is a problem."""

import pytest

from bitpress.kernels import bench, rates
from bitpress.kernels.layout import layout_from_dict, words_of
from bitpress.kernels.random_weights import random_packed


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    monkeypatch.setattr(bench, "QUICK_SHAPES", ((64, 128),))
    monkeypatch.setattr(bench, "QUICK_LAYOUTS", bench.LAYOUTS)
    monkeypatch.setattr(bench, "QUICK_COLD_BYTES", 1 << 16)
    monkeypatch.setattr(bench, "QUICK_ROUNDS", 2)
    monkeypatch.setattr(rates, "COLD", 8 << 20)
    monkeypatch.setattr(rates, "WINDOW", 1 << 20)
    monkeypatch.setattr(rates, "SQUARE", 64)


def test_a_table_of_one_small_shape() -> None:
    table = bench.kernel_table(quick=True)
    machine = table["machine"]
    assert all(machine[key] > 0 for key in ("read_gb_per_s", "copy_gb_per_s", "bfloat16_gflop_per_s", "float32_gflop_per_s"))
    assert len(table["rows"]) == 1 + len(bench.LAYOUTS)
    assert len({row["format"] for row in table["rows"]}) == len(table["rows"]), "no two rows go by one name"
    dense, *packed = table["rows"]
    assert dense["bytes"] == 64 * 128 * 2 and dense["dense_ratio"] == 1
    for row, layout in zip(packed, bench.LAYOUTS, strict=True):
        assert row["format"] == words_of(layout) and layout_from_dict(row["layout"]) == layout
        assert row["bytes"] == layout.nbytes(64, 128) and row["kernel"] != "dequantize" and row["reason"]
        assert row["p10_s"] <= row["p50_s"] and row["gb_per_s"] == pytest.approx(row["bytes"] / row["p10_s"] / 1e9)
        assert row["bits"] == pytest.approx(8 * row["bytes"] / (64 * 128)) and row["bound"] in ("memory", "other")


def test_reading_faster_than_the_machine_is_a_problem() -> None:
    rows = [{"format": "4 bits", "shape": [1, 1], "read_fraction": fraction} for fraction in (0.9, 1.01)]
    assert bench.problems(rows) == ["4 bits at [1, 1]: 1.01 of the read rate cannot be"]


def test_random_matrices_have_the_bytes_of_their_layout(any_layout) -> None:
    made = random_packed((16, 64), any_layout)
    assert made.layout == any_layout and made.nbytes == any_layout.nbytes(16, 64)
