"""The GPU bench without a GPU: it refuses, and its rows and its table say what they are given."""

import pytest
import torch

from bitpress.kernels import bench_gpu, gpu_choice
from bitpress.kernels.layout import UniformLayout

FOUND = gpu_choice.Found("Triton low-bit", 4e-6, {}, {"torch int4": 5e-6})


def test_without_a_gpu_it_refuses(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main() == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_rows_hold_ratios_and_the_share_of_the_read_rate(monkeypatch) -> None:
    monkeypatch.setattr(gpu_choice, "measured", lambda *_: FOUND)
    layout = UniformLayout(4)
    row = bench_gpu.row((4096, 4096), layout, 1, 12e-6, 3e12)
    assert row["dense_ratio"] == pytest.approx(3) and row["read_fraction"] == pytest.approx(layout.nbytes(4096, 4096) / 4e-6 / 3e12)
    assert "read_fraction" not in bench_gpu.row((4096, 4096), layout, bench_gpu.PREFILL, 1e-3, 3e12)
    shown = bench_gpu.text({"machine": {"device": "a card", "read_gb_per_s": 3000, "bfloat16_tflop_per_s": 700}, "rows": [row]})
    assert "3.00x dense" in shown and "Triton low-bit" in shown and "of the read rate" in shown


def test_faster_than_the_memory_is_a_problem(monkeypatch) -> None:
    monkeypatch.setattr(gpu_choice, "measured", lambda *_: FOUND)
    row = bench_gpu.row((4096, 4096), UniformLayout(4), 1, 12e-6, 1e12)
    assert bench_gpu.problems([row]) and not bench_gpu.problems([{**row, "read_fraction": 0.9}])
