"""Random matrices in every layout: what the tests of formats and kernels multiply with."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitpress.kernels.binary import pack_binary
from bitpress.kernels.formats import PackedTensor, pack
from bitpress.kernels.layout import BinaryLayout, BitmapLayout, DenseLayout, Layout, PairLayout, TableLayout, TwoFourLayout, UniformLayout, words_of
from bitpress.kernels.pairs import dense, pack_pair
from bitpress.kernels.sparse import pack_bitmap, pack_two_four, pack_two_four_codes
from bitpress.kernels.tables import levels, nearest_of, pack_table, round_scales, scales_of

LAYOUTS: tuple[Layout, ...] = (
    UniformLayout(4, 32), UniformLayout(3, 24, zero="float"), UniformLayout(5, 32, zero="float"), UniformLayout(8, 0, True),
    TableLayout("nf4"), TableLayout("fp4", 32), TableLayout("nf4", 16, double_scales=True), TableLayout("codebook", 32),
    TableLayout("codebook", 0, double_scales=True),
    BinaryLayout(2), BinaryLayout(3, 32), BinaryLayout(4, 0), BitmapLayout(0.5), BitmapLayout(0.83, itemsize=4), DenseLayout(),
    TwoFourLayout(DenseLayout()), TwoFourLayout(UniformLayout(4, 32)), TwoFourLayout(UniformLayout(3, 16)), TwoFourLayout(UniformLayout(8, 0, True)),
    PairLayout(0.5, DenseLayout(), DenseLayout()), PairLayout(0.7, UniformLayout(4, 32), UniformLayout(8, 0, True)),
)  # fmt: skip


def random_weight(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def made(shape: tuple[int, int], layout: Layout, seed: int = 0) -> PackedTensor:
    """A random matrix of this shape in this layout."""
    weight_NK = random_weight(shape, seed)
    match layout:
        case DenseLayout():
            return dense(weight_NK.bfloat16())
        case TableLayout():
            return _table(weight_NK, layout)
        case BinaryLayout():
            return _binary(weight_NK, layout, seed)
        case BitmapLayout():
            gone = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < layout.ratio + 0.1
            return pack_bitmap(weight_NK.masked_fill(gone, 0).to(torch.float32 if layout.itemsize == 4 else torch.bfloat16), layout)
        case TwoFourLayout():
            return _two_four(weight_NK, layout)
        case PairLayout():
            rank = layout.rank(*shape)
            return pack_pair(made((shape[0], rank), layout.left, seed), made((rank, shape[1]), layout.right, seed + 1), layout)
    return pack(*uniform_codes(weight_NK, layout), layout)


def uniform_codes(weight_NK: Tensor, layout: UniformLayout) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rounded to nearest: (codes, scales, zeros)."""
    rows, columns = weight_NK.shape
    top, parts = 2**layout.bits - 1, _groups(weight_NK, layout.group_size)
    high, low = parts.amax(-1).clamp(min=0), parts.amin(-1).clamp(max=0)
    if layout.symmetric:
        scales = (torch.maximum(high, -low) / (2 ** (layout.bits - 1) - 0.5)).bfloat16().float()
        zeros = torch.full_like(scales, 2 ** (layout.bits - 1))
    else:
        scales = ((high - low) / top).bfloat16().float()
        zeros = (-low / scales).bfloat16().float() if layout.zero == "float" else (-low / scales).round().clamp(0, top)
    codes = (parts / scales[..., None] + zeros[..., None]).round().clamp(0, top).view(rows, -1)[:, :columns]
    return codes, scales, None if layout.symmetric else zeros


def _groups(weight_NK: Tensor, group_size: int) -> Tensor:
    span = group_size or weight_NK.shape[1]
    return F.pad(weight_NK, (0, -weight_NK.shape[1] % span)).view(len(weight_NK), -1, span)


def _table(weight_NK: Tensor, layout: TableLayout) -> PackedTensor:
    parts = _groups(weight_NK, layout.group_size)
    scales, supers = round_scales(parts.abs().amax(-1), layout)
    own = torch.linspace(-1, 0.8, 16).bfloat16().float() if layout.own_levels else None
    steps = levels(layout.table) if own is None else own
    codes = nearest_of(parts / scales_of(scales, supers)[..., None], steps).view(len(weight_NK), -1)[:, : weight_NK.shape[1]]
    return pack_table(codes, scales, layout, supers, own)


def _binary(weight_NK: Tensor, layout: BinaryLayout, seed: int) -> PackedTensor:
    """The signs of greedy residuals; alphas and shifts that are the means of the groups and any small numbers."""
    rows, columns = weight_NK.shape
    left, planes, alphas = _groups(weight_NK, layout.group_size).clone(), [], []
    for _ in range(layout.bits):
        plus, alpha = left >= 0, left.abs().mean(-1).bfloat16().float()
        left -= torch.where(plus, alpha[..., None], -alpha[..., None])
        planes.append(plus.view(rows, -1)[:, :columns])
        alphas.append(alpha)
    shifts = (torch.randn(rows, layout.groups(columns), generator=torch.Generator().manual_seed(seed)) * 0.01).bfloat16()
    return pack_binary(torch.stack(planes, 1), torch.stack(alphas, -1), shifts, layout)


def _two_four(weight_NK: Tensor, layout: TwoFourLayout) -> PackedTensor:
    fours = weight_NK.view(len(weight_NK), -1, 4)
    pruned_NK = fours.scatter(-1, fours.abs().topk(2, largest=False).indices, 0.0).view(weight_NK.shape)
    if isinstance(layout.values, DenseLayout):
        return pack_two_four(pruned_NK.bfloat16(), layout)
    whole = replace(layout.values, group_size=2 * layout.values.group_size)
    return pack_two_four_codes(*uniform_codes(pruned_NK, whole), layout)


@pytest.fixture(scope="session")
def packed() -> Callable[..., PackedTensor]:
    """`packed((N, K), layout, seed=0)`: random weights rounded to a layout."""
    return made


@pytest.fixture(scope="session", params=LAYOUTS, ids=words_of)
def any_layout(request: pytest.FixtureRequest) -> Layout:
    """Every kind of layout, some of them twice."""
    return request.param
