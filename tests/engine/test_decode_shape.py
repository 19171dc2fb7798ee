"""A model of a shape, with random weights, is decoded dense and packed; large shapes want a GPU."""

import json

import pytest
import torch

from bitpress.engine import decode_shape
from bitpress.kernels.packed import PackedLinear


def test_a_tiny_shape_is_measured_at_each_batch(capsys: pytest.CaptureFixture[str]) -> None:
    assert decode_shape.main(["--shape", "tiny"]) == 0
    told = capsys.readouterr()
    rows = json.loads(told.out)["rows"]
    assert [(row["batch"], row["side"]) for row in rows] == [(batch, side) for batch in decode_shape.BATCHES for side in ("dense", "4-bit")]
    assert all(row["decode_tokens_per_s"] > 0 and row["conditions"]["batch"] == row["batch"] for row in rows)
    assert "4-bit" in told.err


def test_every_linear_is_packed_in_storage_of_its_own() -> None:
    model = decode_shape.random_packed_model(decode_shape.SHAPES["tiny"], "cpu")
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == 7 * 2 + 1 and not any(type(module) is torch.nn.Linear for module in model.modules())
    assert len({layer.packed.tensors["codes"].data_ptr() for layer in layers}) == len(layers)


def test_a_large_shape_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert decode_shape.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
