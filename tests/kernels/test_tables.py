"""NF4 and FP4 against the golden vector of METHODS 0.6, the nearest level by brute force, and bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.kernels import reference
from bitpress.kernels.layout import TableLayout
from bitpress.kernels.tables import levels, levels_of, nearest, pack_table, round_scales, scales_of, unpack_table

GOLDEN = torch.tensor([[0.9, -0.3, 0.1, -1.2, 0.45, 0, -0.05, 0.7]])


def test_golden_nf4() -> None:
    codes = nearest(GOLDEN / 1.2, "nf4")
    assert codes.tolist() == [[14, 4, 8, 0, 11, 7, 7, 13]]
    made = levels("nf4")[codes.long()] * 1.2
    assert torch.allclose(made, torch.tensor([[0.867548, -0.34133, 0.095496, -1.2, 0.405498, 0, 0, 0.67514]]), atol=1e-5)
    assert float((made - GOLDEN).square().mean()) == pytest.approx(0.000984993, rel=1e-4)


def test_fp4_levels() -> None:
    assert [round(12 * level, 4) for level in levels("fp4").tolist()] == [-12, -8, -6, -4, -3, -2, -0.0625, 0, 0, 0.0625, 2, 3, 4, 6, 8, 12]


@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=50), st.sampled_from(["nf4", "fp4"]))
@settings(max_examples=60, deadline=None)
def test_no_level_is_nearer(values: list[float], table: str) -> None:
    x, steps = torch.tensor(values), levels(table)
    chosen = steps[nearest(x, table).long()]
    assert torch.equal((x - chosen).abs(), (x[:, None] - steps).abs().amin(1))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("width", [64, 100, 16 * 300])
def test_scales_survive_and_stay_near_the_largest(double: bool, width: int) -> None:
    layout = TableLayout("nf4", 16, double)
    largest = torch.rand(3, layout.groups(width)) + 0.01
    largest[1, 0] = 0
    scales, supers = round_scales(largest, layout)
    made = pack_table(torch.zeros(3, width, dtype=torch.uint8), scales, layout, supers)
    assert torch.equal(unpack_table(made)[1], scales_of(scales, supers))
    assert ((scales_of(scales, supers) - largest).abs() <= largest * 2**-8 + 0.003).all() and scales_of(scales, supers)[1, 0] == 0
    assert made.nbytes == layout.nbytes(3, width)


def test_a_group_of_zeros_stays_zero() -> None:
    layout = TableLayout("nf4", 0)
    scales, supers = round_scales(torch.zeros(1, 1), layout)
    made = pack_table(torch.full((1, 8), 3, dtype=torch.uint8), scales, layout, supers)
    assert not reference.dequantize(made).any()


def test_what_does_not_fit_is_refused() -> None:
    layout, codes = TableLayout("nf4", 4), torch.zeros(2, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"0\.\.15"):
        pack_table(codes + 16, torch.ones(2, 2), layout)
    with pytest.raises(ValueError, match="rounded to bfloat16"):
        pack_table(codes, torch.full((2, 2), 1.001), layout)
    with pytest.raises(ValueError, match="one a row and group"):
        pack_table(codes, torch.ones(2, 3), layout)
    with pytest.raises(ValueError, match="double scales"):
        pack_table(codes, torch.ones(2, 2), layout, torch.ones(2, 1))
    with pytest.raises(ValueError, match="2 rows of 2 groups"):
        pack_table(codes, torch.ones(2, 3), TableLayout("nf4", 4, True), torch.ones(2, 1))


def test_a_codebook_has_levels_of_its_own() -> None:
    layout, codes, own = TableLayout("codebook", 4), torch.arange(16, dtype=torch.uint8).view(2, 8), torch.linspace(-1, 1, 16).bfloat16().float()
    made = pack_table(codes, torch.full((2, 2), 2.0), layout, own=own)
    assert torch.equal(reference.dequantize(made), 2 * own[codes.long()]) and torch.equal(levels_of(made), own)
    assert torch.equal(reference.dequantize(made.take(torch.tensor([1]))), reference.dequantize(made)[1:])
    with pytest.raises(ValueError, match="belong to a codebook"):
        pack_table(codes, torch.ones(2, 2), layout)
    with pytest.raises(ValueError, match="belong to a codebook"):
        pack_table(codes, torch.ones(2, 2), TableLayout("nf4", 4), own=own)
    with pytest.raises(ValueError, match="must ascend"):
        pack_table(codes, torch.ones(2, 2), layout, own=own.flip(0))
    with pytest.raises(ValueError, match="rounded to bfloat16"):
        pack_table(codes, torch.ones(2, 2), layout, own=own + 1e-4)
