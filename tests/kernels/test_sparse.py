"""Zeros that are not stored come back as zeros, whatever else a matrix holds comes back to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.kernels import reference
from bitpress.kernels.layout import BitmapLayout, DenseLayout, TwoFourLayout, UniformLayout
from bitpress.kernels.sparse import pack_bitmap, pack_two_four, pack_two_four_codes


@given(rows=st.integers(1, 9), columns=st.integers(1, 70), ratio=st.floats(0.1, 0.95), zeros=st.floats(0, 1), seed=st.integers(0, 999))
@settings(max_examples=80, deadline=None)
def test_a_bitmap_loses_nothing_whatever_the_zeros(rows: int, columns: int, ratio: float, zeros: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).bfloat16()
    weight[torch.rand(rows, columns, generator=generator) < zeros] = 0
    made = pack_bitmap(weight, BitmapLayout(ratio))
    assert torch.equal(reference.dequantize(made, torch.bfloat16), weight)
    assert made.nbytes == made.layout.nbytes(rows, columns)
    enough = int((weight == 0).sum()) >= rows * columns - BitmapLayout(ratio).kept(rows, columns)
    assert (made.layout == BitmapLayout(ratio)) == enough or made.layout.kept(rows, columns) == BitmapLayout(ratio).kept(rows, columns)


@pytest.mark.parametrize("scope", ["layer", "row"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.55, 0.9])
def test_a_ratio_met_anyhow_has_the_bytes_of_the_ratio(scope: str, ratio: float) -> None:
    weight = torch.randn(6, 70).bfloat16()
    flat = weight.view(1, -1) if scope == "layer" else weight
    gone = round(ratio * flat.shape[1])
    flat.scatter_(1, flat.abs().topk(gone, largest=False).indices, 0)
    made = pack_bitmap(weight, BitmapLayout(ratio))
    assert made.layout == BitmapLayout(ratio) and made.nbytes == BitmapLayout(ratio).nbytes(6, 70)


def test_golden_two_of_four() -> None:
    """METHODS 0.6: the magnitude mask [1,0,0,1,1,0,0,1]."""
    weight = torch.tensor([[0.9, 0, 0, -1.2, 0.45, 0, 0, 0.7]]).bfloat16()
    made = pack_two_four(weight, TwoFourLayout(DenseLayout()))
    assert made.tensors["places"].tolist() == [[0b11001100]]
    assert torch.equal(made.tensors["values_weight"], weight[weight != 0].view(1, 4))
    assert torch.equal(reference.dequantize(made, torch.bfloat16), weight)


@pytest.mark.parametrize("zero_too", [False, True])
def test_two_of_four_with_fewer_than_two(zero_too: bool) -> None:
    weight = torch.randn(5, 40).view(5, 10, 4)
    weight[..., 1] = weight[..., 2] = 0
    if zero_too:
        weight[:, ::3, :] = 0
    weight = weight.view(5, 40)
    assert torch.equal(reference.dequantize(pack_two_four(weight, TwoFourLayout(DenseLayout(4)))), weight)


@pytest.mark.parametrize("inner", [UniformLayout(4, 16), UniformLayout(3, 0), UniformLayout(8, 8, True), UniformLayout(5, 12)])
def test_two_of_four_codes_stand_for_what_the_dense_codes_do(packed, inner: UniformLayout) -> None:
    made = packed((6, 80), TwoFourLayout(inner))
    dense = reference.dequantize(made)
    assert (dense.view(6, -1, 4) != 0).sum(-1).max() == 2
    whole = UniformLayout(inner.bits, 2 * inner.group_size, inner.symmetric)
    assert TwoFourLayout(inner).nbytes(6, 80) < whole.nbytes(6, 80)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="more than two"):
        pack_two_four(torch.ones(1, 8).bfloat16(), TwoFourLayout(DenseLayout()))
    with pytest.raises(ValueError, match="multiple of 4"):
        pack_two_four(torch.zeros(1, 6).bfloat16(), TwoFourLayout(DenseLayout()))
    with pytest.raises(ValueError, match="float32"):
        pack_two_four(torch.zeros(1, 8), TwoFourLayout(DenseLayout()))
    with pytest.raises(ValueError, match="integer zeros"):
        pack_two_four_codes(torch.zeros(1, 8).byte(), torch.ones(1, 1), torch.zeros(1, 1), TwoFourLayout(UniformLayout(4, 0, zero="float")))
    with pytest.raises(ValueError, match="4-byte"):
        pack_bitmap(torch.zeros(1, 8).bfloat16(), BitmapLayout(0.5, itemsize=4))
