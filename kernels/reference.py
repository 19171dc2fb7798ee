"""The oracle: every format in the plainest torch. Slow and obviously right; the fast kernels are tested against it."""

import torch
from torch import Tensor

from bitpress.kernels.activations import quantize_rows
from bitpress.kernels.binary import unpack_binary
from bitpress.kernels.formats import PackedTensor, unpack_codes
from bitpress.kernels.layout import BinaryLayout, BitmapLayout, DenseLayout, PairLayout, TableLayout, TwoFourLayout
from bitpress.kernels.sparse import spread, unpack_bitmap
from bitpress.kernels.tables import levels_of, unpack_table


def dequantize(packed: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix that the codes stand for, [N, K]: computed in float32 (float64 when asked for), then cast to `dtype`."""
    return _values(packed, torch.float64 if dtype == torch.float64 else torch.float32).to(dtype)


def _values(packed: PackedTensor, exact: torch.dtype) -> Tensor:
    match packed.layout:
        case DenseLayout():
            return packed.tensors["weight"].to(exact)
        case BitmapLayout():
            return unpack_bitmap(packed).to(exact)
        case TwoFourLayout():
            return spread(_values(packed.part("values"), exact), packed)
        case PairLayout():
            product_NK = _values(packed.part("left"), exact) @ _values(packed.part("right"), exact)
            return product_NK + _values(packed.part("base"), exact) if packed.layout.base else product_NK
        case TableLayout():
            return _table(packed, exact)
        case BinaryLayout():
            return _binary(packed, exact)
    return _uniform(packed, exact)


def _uniform(packed: PackedTensor, exact: torch.dtype) -> Tensor:
    """`(code - zero) * scale`."""
    layout, columns = packed.uniform, packed.shape[1]
    span = layout.group_size or columns
    codes_NK = unpack_codes(packed.tensors["codes"], layout.bits, columns).to(exact)
    zeros_NG = packed.zeros_NG
    centred = codes_NK - (2 ** (layout.bits - 1) if zeros_NG is None else per_input(zeros_NG.to(exact), span, columns))
    return centred * per_input(packed.tensors["scales"].to(exact), span, columns)


def _table(packed: PackedTensor, exact: torch.dtype) -> Tensor:
    """`levels[code] * scale`."""
    layout, columns = packed.layout, packed.shape[1]
    assert isinstance(layout, TableLayout)
    codes_NK, scales_NG = unpack_table(packed, exact)
    return levels_of(packed, exact)[codes_NK.long()] * per_input(scales_NG, layout.group_size or columns, columns)


def _binary(packed: PackedTensor, exact: torch.dtype) -> Tensor:
    """`shift + sum of +alpha or -alpha over the planes`, planes in order."""
    layout, columns = packed.layout, packed.shape[1]
    assert isinstance(layout, BinaryLayout)
    plus_NBK, alphas_NGB, shifts_NG = unpack_binary(packed)
    span = layout.group_size or columns
    values_NK = per_input(shifts_NG.to(exact), span, columns)
    for plane in range(layout.bits):
        alphas_NK = per_input(alphas_NGB[..., plane].to(exact), span, columns)
        values_NK = values_NK + torch.where(plus_NBK[:, plane], alphas_NK, -alphas_NK)
    return values_NK


def per_input(values_NG: Tensor, group: int, columns: int) -> Tensor:
    """One value an input, [N, K], from one value a group."""
    return values_NG.repeat_interleave(group, dim=1)[:, :columns]


def matmul(x: Tensor, packed: PackedTensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float64, activation_bits: int | None = None) -> Tensor:
    """x [..., K] times the dequantised matrix, plus bias [N]: [..., N], all in `dtype` (float64 for an oracle).

    activation_bits: round x first, one symmetric scale a row, as `quantize_rows` does.
    """
    if activation_bits is not None:
        levels_MK, scale_M1 = quantize_rows(x.reshape(-1, x.shape[-1]), activation_bits)
        x = (levels_MK.to(dtype) * scale_M1.to(dtype)).view(x.shape)
    y = x.to(dtype) @ dequantize(packed, dtype).T
    return y if bias is None else y + bias.to(dtype)
