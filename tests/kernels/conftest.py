"""A plain round-to-nearest packer: what the kernel tests multiply with."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitpress.kernels.formats import PackedTensor, pack
from bitpress.kernels.layout import UniformLayout


def _round_to_nearest(weight_NK: Tensor, layout: UniformLayout) -> PackedTensor:
    rows, columns = weight_NK.shape
    groups, top = layout.groups(columns), 2**layout.bits - 1
    span = layout.group_size or columns
    parts = F.pad(weight_NK, (0, groups * span - columns)).view(rows, groups, span)
    high, low = parts.amax(-1).clamp(min=0), parts.amin(-1).clamp(max=0)
    if layout.symmetric:
        scales = (torch.maximum(high, -low) / (2 ** (layout.bits - 1) - 0.5)).bfloat16().float()
        zeros = torch.full_like(scales, 2 ** (layout.bits - 1))
    else:
        scales = ((high - low) / top).bfloat16().float()
        zeros = (-low / scales).round().clamp(0, top)
    codes = (parts / scales[..., None] + zeros[..., None]).round().clamp(0, top).view(rows, -1)[:, :columns]
    return pack(codes, scales, None if layout.symmetric else zeros, layout)


@pytest.fixture(scope="session")
def packed() -> Callable[..., PackedTensor]:
    """`packed((N, K), layout, seed=0)`: random weights rounded to a layout."""

    def make(shape: tuple[int, int], layout: UniformLayout, seed: int = 0) -> PackedTensor:
        return _round_to_nearest(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05, layout)

    return make
