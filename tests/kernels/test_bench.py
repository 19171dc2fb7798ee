"""The kernel table has a full row for every width, and its figures follow from its seconds and bytes."""

import pytest

from bitpress.kernels import bench


def test_a_table_of_one_small_shape(monkeypatch) -> None:
    monkeypatch.setattr(bench, "QUICK_SHAPES", ((64, 128),))
    monkeypatch.setattr(bench, "QUICK_COLD_BYTES", 1 << 16)
    table = bench.kernel_table(quick=True)
    assert table["machine"]["read_gb_per_s"] > 0 and len(table["rows"]) == 1 + len(bench.LAYOUTS)
    dense, *packed = table["rows"]
    assert dense["bytes"] == 64 * 128 * 2 and dense["dense_ratio"] == 1
    for row, layout in zip(packed, bench.LAYOUTS, strict=True):
        assert row["bytes"] == layout.nbytes(64, 128) and row["kernel"] != "dequantize" and row["reason"]
        assert row["p10_s"] <= row["p50_s"] and row["gb_per_s"] == pytest.approx(row["bytes"] / row["p50_s"] / 1e9)
