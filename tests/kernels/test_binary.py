"""Binary codes survive packing, hold every uniform grid (METHODS 1.5) and the golden vectors of METHODS 0.6."""

import pytest
import torch

from bitpress.kernels import reference
from bitpress.kernels.binary import from_uniform, pack_binary, unpack_binary
from bitpress.kernels.layout import BinaryLayout, UniformLayout


def test_golden_levels_of_three_uniform_bits() -> None:
    """alpha = [2, 1, .5] and shift 3.5 stand for 7, 6, ..., 0."""
    plus = torch.tensor([[code & 4 > 0, code & 2 > 0, code & 1 > 0] for code in range(7, -1, -1)]).T[None].contiguous()
    made = pack_binary(plus, torch.tensor([[[2, 1, 0.5]]]), torch.tensor([[3.5]]), BinaryLayout(3, 0))
    assert reference.dequantize(made).tolist() == [[7, 6, 5, 4, 3, 2, 1, 0]]


@pytest.mark.parametrize("columns", [8, 13, 70])
def test_signs_survive_the_round_trip(columns: int) -> None:
    plus = torch.rand(5, 3, columns) < 0.5
    made = pack_binary(plus, torch.ones(5, 1, 3), torch.zeros(5, 1), BinaryLayout(3, 0))
    assert torch.equal(unpack_binary(made)[0], plus)


@pytest.mark.parametrize("layout", [UniformLayout(2, 32), UniformLayout(3, 24), UniformLayout(4, 0, True), UniformLayout(4, 32, zero="float")])
def test_every_uniform_grid_is_a_binary_code(packed, layout: UniformLayout) -> None:
    made = packed((6, 64), layout)
    plus, alphas, shifts = from_uniform(made)
    binary = pack_binary(plus, alphas, shifts.bfloat16(), BinaryLayout(layout.bits, layout.group_size))
    exact, rounding = reference.dequantize(made, torch.float64), (shifts - shifts.bfloat16().float()).abs().max()
    assert (reference.dequantize(binary, torch.float64) - exact).abs().max() <= rounding + 1e-6


def test_what_does_not_fit_is_refused() -> None:
    layout, plus = BinaryLayout(2, 8), torch.ones(3, 2, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match="2 planes"):
        pack_binary(plus[:, :1], torch.ones(3, 2, 2), torch.zeros(3, 2), layout)
    with pytest.raises(ValueError, match="bool"):
        pack_binary(plus.float(), torch.ones(3, 2, 2), torch.zeros(3, 2), layout)
    with pytest.raises(ValueError, match="Alphas"):
        pack_binary(plus, torch.ones(3, 1, 2), torch.zeros(3, 2), layout)
    with pytest.raises(ValueError, match="Shifts must be rounded"):
        pack_binary(plus, torch.ones(3, 2, 2), torch.full((3, 2), 1.001), layout)
