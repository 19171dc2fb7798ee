"""Random matrices in any layout, for timing: their bytes are those of real ones, their values are not. Knows no method of rounding."""

import torch
from torch import Tensor

from bitpress.kernels.binary import pack_binary
from bitpress.kernels.formats import PackedTensor, pack
from bitpress.kernels.layout import LEVEL_COUNT, BinaryLayout, BitmapLayout, DenseLayout, Layout, PairLayout, TableLayout, TwoFourLayout, UniformLayout
from bitpress.kernels.pairs import dense, pack_pair
from bitpress.kernels.sparse import pack_bitmap, pack_two_four, pack_two_four_codes
from bitpress.kernels.tables import pack_table

SCALE = 2.0**-7


def random_packed(shape: tuple[int, int], layout: Layout) -> PackedTensor:
    """A matrix (N, K) of random codes or values."""
    match layout:
        case UniformLayout():
            return pack(*_codes(shape, layout), layout)
        case TableLayout():
            return _table(shape, layout)
        case BinaryLayout():
            groups = layout.groups(shape[1])
            alphas, plus = torch.full((shape[0], groups, layout.bits), SCALE), torch.rand(shape[0], layout.bits, shape[1]) < 0.5
            return pack_binary(plus, alphas, torch.zeros(shape[0], groups), layout)
        case BitmapLayout():
            weight_NK = torch.rand(shape) + 0.5
            weight_NK.view(-1)[torch.randperm(weight_NK.numel())[layout.kept(*shape) :]] = 0
            return pack_bitmap(weight_NK.to(torch.bfloat16 if layout.itemsize == 2 else torch.float32), layout)
        case TwoFourLayout(values=values):
            return _two_four(shape, layout, values)
        case PairLayout():
            rank = layout.rank(*shape)
            base = random_packed(shape, layout.base) if layout.base else None
            return pack_pair(random_packed((shape[0], rank), layout.left), random_packed((rank, shape[1]), layout.right), layout, base)
    return dense(torch.randn(shape).to(torch.bfloat16 if layout.itemsize == 2 else torch.float32))


def _codes(shape: tuple[int, int], layout: UniformLayout) -> tuple[Tensor, Tensor, Tensor | None]:
    top = 2**layout.bits
    scales = torch.full((shape[0], layout.groups(shape[1])), SCALE)
    zeros = None if layout.symmetric else torch.randint(0, top, scales.shape, dtype=torch.uint8)
    if zeros is not None and layout.zero == "float":
        zeros = zeros.bfloat16()
    return torch.randint(0, top, shape, dtype=torch.uint8), scales, zeros


def _table(shape: tuple[int, int], layout: TableLayout) -> PackedTensor:
    codes, scales = torch.randint(0, 16, shape, dtype=torch.uint8), torch.full((shape[0], layout.groups(shape[1])), SCALE)
    own = torch.linspace(-1, 1, LEVEL_COUNT).bfloat16() if layout.own_levels else None
    if not layout.double_scales:
        return pack_table(codes, scales, layout, own=own)
    return pack_table(codes, torch.randint(1, 256, scales.shape, dtype=torch.uint8), layout, torch.full((shape[0], -(-scales.shape[1] // 256)), SCALE), own)


def _two_four(shape: tuple[int, int], layout: TwoFourLayout, values: UniformLayout | DenseLayout) -> PackedTensor:
    rows, columns = shape
    gone = torch.rand(rows, columns // 4, 4).argsort(-1)[..., :2]
    if isinstance(values, DenseLayout):
        weight_NK = (torch.rand(rows, columns // 4, 4) + 0.5).scatter_(-1, gone, 0.0).view(shape)
        return pack_two_four(weight_NK.to(torch.bfloat16 if values.itemsize == 2 else torch.float32), layout)
    middle = 2 ** (values.bits - 1)
    codes = torch.randint(0, 2**values.bits, (rows, columns // 4, 4), dtype=torch.uint8).scatter_(-1, gone, middle).view(shape)
    scales = torch.full((rows, values.groups(columns // 2)), SCALE)
    return pack_two_four_codes(codes, scales, None if values.symmetric else torch.full_like(scales, middle), layout)
