"""The oracle: every format in the plainest torch. Slow and obviously right; the fast kernels are tested against it."""

import torch
from torch import Tensor

from bitpress.kernels.formats import PackedTensor, unpack_codes


def dequantize(packed: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix that the codes stand for, [N, K]: `(code - zero) * scale` in float32 (float64 when asked for), then cast to `dtype`."""
    layout, (_, columns) = packed.layout, packed.shape
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    span = layout.group_size or columns
    codes_NK = unpack_codes(packed.tensors["codes"], layout.bits, columns).to(exact)
    scales_NK = packed.tensors["scales"].to(exact).repeat_interleave(span, dim=1)[:, :columns]
    zeros_NG = packed.zeros_NG
    if zeros_NG is None:
        return ((codes_NK - 2 ** (layout.bits - 1)) * scales_NK).to(dtype)
    return ((codes_NK - zeros_NG.to(exact).repeat_interleave(span, dim=1)[:, :columns]) * scales_NK).to(dtype)


def matmul(x: Tensor, packed: PackedTensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """x [..., K] times the dequantised matrix, plus bias [N]: [..., N], all in `dtype` (float64 for an oracle)."""
    y = x.to(dtype) @ dequantize(packed, dtype).T
    return y if bias is None else y + bias.to(dtype)
