"""Low-rank pairs: the break-even rank, both factors to the bit, and bad input."""

import pytest
import torch

from bitpress.kernels import reference
from bitpress.kernels.layout import DenseLayout, PairLayout, UniformLayout
from bitpress.kernels.packed import PackedLinear
from bitpress.kernels.pairs import dense, pack_pair

PLAIN = PairLayout(0.5, DenseLayout(4), DenseLayout(4))


def test_break_even_ranks() -> None:
    assert [PairLayout(1.0, DenseLayout(), DenseLayout()).rank(*shape) for shape in ((576, 576), (1536, 576), (192, 576))] == [288, 418, 144]
    assert PLAIN.rank(576, 576) == 144 and PLAIN.rank(2, 2) == 1


def test_the_product_of_the_factors() -> None:
    left, right = torch.randn(20, 7), torch.randn(7, 48)
    made = pack_pair(dense(left), dense(right), PLAIN)
    assert torch.equal(reference.dequantize(made, torch.float64), left.double() @ right.double())
    assert torch.equal(made.part("left").tensors["weight"], left) and torch.equal(made.part("right").tensors["weight"], right)


def test_a_layer_says_what_each_factor_runs_on(packed) -> None:
    linear = PackedLinear(packed((64, 128), PairLayout(0.5, UniformLayout(4, 0, True), UniformLayout(4, 0, True))))
    assert linear.kernel == "low-rank pair" and "rank 21" in linear.reason
    before = linear.resident_bytes
    linear(torch.randn(1, 128).bfloat16())
    assert linear.resident_bytes >= before == linear.stored_bytes


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="keeps rank 7"):
        pack_pair(dense(torch.randn(20, 6)), dense(torch.randn(6, 48)), PLAIN)
    with pytest.raises(ValueError, match="do not fit a pair"):
        pack_pair(dense(torch.randn(20, 7).bfloat16()), dense(torch.randn(7, 48)), PLAIN)
    with pytest.raises(TypeError, match="no parts"):
        dense(torch.randn(2, 2)).part("left")
