"""Matrices of random codes in any packed layout, for timing: no weights are rounded, so a large one takes no time. Knows layouts and bytes."""

import torch
from torch import Tensor

from bitpress.kernels.binary import pack_binary
from bitpress.kernels.formats import PackedTensor, pack
from bitpress.kernels.layout import BinaryLayout, BitmapLayout, DenseLayout, Layout, PairLayout, TableLayout, TwoFourLayout, UniformLayout
from bitpress.kernels.pairs import dense, pack_pair
from bitpress.kernels.sparse import pack_bitmap, pack_two_four, pack_two_four_codes
from bitpress.kernels.tables import pack_table, round_scales


def random_packed(layout: Layout, shape: tuple[int, int], device: torch.device | str = "cpu") -> PackedTensor:
    """A matrix whose weights are about 0.05 in size and average to about nothing."""
    rows, columns = shape
    match layout:
        case DenseLayout():
            return dense(_normal(shape, device).bfloat16())
        case PairLayout():
            rank = layout.rank(rows, columns)
            return pack_pair(random_packed(layout.left, (rows, rank), device), random_packed(layout.right, (rank, columns), device), layout)
        case BitmapLayout():
            gone = torch.rand(shape, device=device) < layout.ratio + 0.05
            return pack_bitmap(_normal(shape, device).masked_fill(gone, 0).to(torch.bfloat16 if layout.itemsize == 2 else torch.float32), layout)
        case TwoFourLayout():
            return _two_four(layout, shape, device)
        case TableLayout():
            scales, supers = round_scales(0.05 + 0.1 * torch.rand(rows, layout.groups(columns), device=device), layout)
            return pack_table(_codes(shape, 4, device), scales, layout, supers)
        case BinaryLayout():
            groups = layout.groups(columns)
            plus_NBK = torch.rand(rows, layout.bits, columns, device=device) < 0.5
            alphas = (0.05 * 0.5 ** torch.arange(layout.bits, device=device)).expand(rows, groups, -1)
            return pack_binary(plus_NBK, alphas.bfloat16(), torch.zeros(rows, groups, device=device), layout)
    return _uniform(layout, shape, device)


def _uniform(layout: UniformLayout, shape: tuple[int, int], device: torch.device | str) -> PackedTensor:
    scales = torch.full((shape[0], layout.groups(shape[1])), 2.0 ** (-2 - layout.bits), device=device)
    middle = torch.full_like(scales, 2 ** (layout.bits - 1))
    return pack(_codes(shape, layout.bits, device), scales, None if layout.symmetric else middle, layout)


def _two_four(layout: TwoFourLayout, shape: tuple[int, int], device: torch.device | str) -> PackedTensor:
    """The first two of every four."""
    first = torch.arange(shape[1], device=device) % 4 < 2
    if isinstance(layout.values, DenseLayout):
        return pack_two_four((_normal(shape, device) * first).bfloat16(), layout)
    inner = layout.values
    scales = torch.full((shape[0], inner.groups(shape[1] // 2)), 2.0 ** (-2 - inner.bits), device=device)
    middle = 2 ** (inner.bits - 1)
    codes_NK = torch.where(first, _codes(shape, inner.bits, device), middle)
    return pack_two_four_codes(codes_NK, scales, None if inner.symmetric else torch.full_like(scales, middle), layout)


def _codes(shape: tuple[int, int], bits: int, device: torch.device | str) -> Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, device=device)


def _normal(shape: tuple[int, int], device: torch.device | str) -> Tensor:
    return 0.05 * torch.randn(shape, device=device)
