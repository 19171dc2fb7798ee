"""The C++ kernels for tables of levels, binary codes and zeros that are not stored. Know their layouts in memory; no model.

Each form holds a matrix as its kernel reads it (described at the head of `cpu_table.cpp`, `cpu_binary.cpp`, `cpu_sparse.cpp`).
`refusal` says in words which matrices they do not take. A row with NaN or infinity comes out NaN where a weight meets it.
Shape letters: M batch, N outputs, K inputs, G groups, T tiles of 16 outputs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bitpress.kernels import cpu_build, cpu_lowbit
from bitpress.kernels.binary import unpack_binary
from bitpress.kernels.formats import PackedTensor, unpack_bits, unpack_codes
from bitpress.kernels.layout import BinaryLayout, BitmapLayout, DenseLayout, Layout, TableLayout, TwoFourLayout, UniformLayout
from bitpress.kernels.pages import on_large_pages
from bitpress.kernels.tables import levels_of, unpack_table

TILE, TABLE_WORD, BINARY_CHUNK, SPARSE_WORD = 16, 8, 32, 32
CodedLayout = TableLayout | BinaryLayout | BitmapLayout | TwoFourLayout


def refusal(layout: Layout, dtype: torch.dtype, in_features: int) -> str:
    """Why these kernels cannot take a matrix with inputs of this type; empty when they can."""
    if dtype not in (torch.bfloat16, torch.float32):
        return f"the C++ kernels take bfloat16 and float32 inputs, not {str(dtype).removeprefix('torch.')}"
    step = {"table": TABLE_WORD, "binary": BINARY_CHUNK}.get(layout.name, 1)
    if isinstance(layout, TableLayout | BinaryLayout) and layout.group_size % step and 0 < layout.group_size < in_features:
        return f"the C++ kernels take groups of a multiple of {step} here, not {layout.group_size}"
    if isinstance(layout, BinaryLayout) and not 1 <= layout.bits <= 4:
        return f"the C++ kernels take up to 4 planes, not {layout.bits}"
    values = layout.values if isinstance(layout, TwoFourLayout) else layout
    if isinstance(values, UniformLayout) and (refused := cpu_lowbit.refusal(values.bits, values.group_size, in_features // 2)):
        return f"{refused} (of stored weights, half of the inputs)" if values.group_size else refused
    if isinstance(values, BitmapLayout | DenseLayout) and values.itemsize != 2 and dtype == torch.float32:
        return "the C++ kernels would round 4-byte values to bfloat16"
    return "" if cpu_build.library() else cpu_build.why_not() or "the C++ kernels are not available"


@dataclass(frozen=True)
class TableTiles:
    """Codes as int32 words [T, K / 8, 16], scales float32 [T, G, 16]."""

    words: Tensor
    scales: Tensor
    levels: Tensor
    group: int
    shape: tuple[int, int]

    def matmul(self, x_MK: Tensor) -> Tensor:
        """x_MK: bfloat16 or float32, contiguous. Returns [M, N] in its type."""
        parts = (self.group, self.words.data_ptr(), self.scales.data_ptr(), self.levels.data_ptr())
        return _call("bitpress_table", x_MK, self.shape, parts, panel="bitpress_panel_table")

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return self.words.nbytes + self.scales.nbytes


@dataclass(frozen=True)
class BinaryTiles:
    """Signs uint8 [T / 2, K / 32, 2, planes, 64], factors bfloat16 [T / 2, G, 2, planes + 1, 16]: alphas and, last, the shift."""

    signs: Tensor
    factors: Tensor
    group: int
    shape: tuple[int, int]

    def matmul(self, x_MK: Tensor) -> Tensor:
        """x_MK: bfloat16 or float32, contiguous. Returns [M, N] in its type."""
        parts = (self.factors.shape[3] - 1, self.group, self.signs.data_ptr(), self.factors.data_ptr())
        return _call("bitpress_binary", x_MK, self.shape, parts, panel="bitpress_panel_binary")

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return self.signs.nbytes + self.factors.nbytes


@dataclass(frozen=True)
class BitmapRows:
    """Bits as int32 words [N, K / 32], bfloat16 values row after row with 32 to spare, where each row's begin: int64 [N]."""

    bits: Tensor
    values: Tensor
    starts: Tensor
    shape: tuple[int, int]

    def matmul(self, x_MK: Tensor) -> Tensor:
        """x_MK: bfloat16 or float32, contiguous. Returns [M, N] in its type."""
        return _call("bitpress_bitmap", x_MK, self.shape, (self.bits.data_ptr(), self.values.data_ptr(), self.starts.data_ptr()))

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return self.bits.nbytes + self.values.nbytes + self.starts.nbytes


@dataclass(frozen=True)
class TwoFourTiles:
    """Two bfloat16 values as an int32 word [T, K / 4, 16], places as int32 words [T, K / 32, 16]."""

    values: Tensor
    places: Tensor
    shape: tuple[int, int]

    def matmul(self, x_MK: Tensor) -> Tensor:
        """x_MK: bfloat16 or float32, contiguous. Returns [M, N] in its type."""
        return _call("bitpress_two_four", x_MK, self.shape, (self.values.data_ptr(), self.places.data_ptr()))

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return self.values.nbytes + self.places.nbytes


@dataclass(frozen=True)
class TwoFourCodes:
    """The stored codes of a 2:4 matrix as low-bit tiles, and their places as tiles of 2-bit codes. shape: of the matrix."""

    stored: cpu_lowbit.Tiles
    places: Tensor
    shape: tuple[int, int]

    def matmul(self, x_MK: Tensor) -> Tensor:
        """x_MK: bfloat16 or float32, contiguous. Returns [M, N] in its type."""
        tiles = self.stored
        zeros = 0 if tiles.zeros is None else tiles.zeros.data_ptr()
        parts = (tiles.codes.data_ptr(), tiles.scales.data_ptr(), zeros, self.places.data_ptr())
        return _call("bitpress_two_four_codes", x_MK, self.shape, (tiles.bits, tiles.group, *parts))

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return self.stored.nbytes + self.places.nbytes


def _call(name: str, x_MK: Tensor, shape: tuple[int, int], rest: tuple[int, ...], panel: str = "") -> Tensor:
    """Run a kernel of the library. panel: the one for many rows, where there is one."""
    lib = cpu_build.library()
    if lib is None:
        raise RuntimeError(cpu_build.why_not())
    outputs, inputs = shape
    out = torch.empty(len(x_MK), outputs, dtype=x_MK.dtype)
    if panel and cpu_build.panels(len(x_MK), x_MK.dtype):
        getattr(lib, panel)(x_MK.data_ptr(), out.data_ptr(), len(x_MK), inputs, outputs, *rest, torch.get_num_threads())
        return out
    getattr(lib, name)(x_MK.data_ptr(), out.data_ptr(), x_MK.dtype == torch.bfloat16, len(x_MK), inputs, outputs, *rest, torch.get_num_threads())
    return out


def table_tiles(packed: PackedTensor) -> TableTiles:
    """Lay a table matrix out: word bits 4j hold the code of input 2j, bits 16 + 4j that of input 2j + 1."""
    layout, (rows, columns) = packed.layout, packed.shape
    assert isinstance(layout, TableLayout)
    codes_NK, scales_NG = unpack_table(packed)
    fours = _padded(codes_NK, TABLE_WORD).unflatten(-1, (-1, 2, 2, 2)).permute(0, 1, 4, 2, 3)  # row, word, half, byte, low or high
    words = (fours[..., 0] | fours[..., 1] << 4).flatten(2).contiguous().view(torch.int32).squeeze(-1)
    return TableTiles(on_large_pages(_lanes(words)), _lanes(scales_NG), levels_of(packed), _group(layout.group_size, columns, TABLE_WORD), (rows, columns))


def binary_tiles(packed: PackedTensor) -> BinaryTiles:
    """Lay a binary matrix out: four signs a nibble, 32 inputs of 16 rows 64 bytes."""
    layout, (rows, columns) = packed.layout, packed.shape
    assert isinstance(layout, BinaryLayout)
    plus_NBK, alphas_NGB, shifts_NG = unpack_binary(packed)
    fours = _padded(plus_NBK.to(torch.uint8), BINARY_CHUNK).unflatten(-1, (-1, 2, 4, 4))  # row, plane, chunk, half, column, sign
    nibbles = (fours << torch.arange(4, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    both = nibbles[..., 0, :] | nibbles[..., 1, :] << 4
    signs = _pairs(both).permute(0, 4, 1, 3, 2, 5).contiguous()  # pair, chunk, tile, plane, row, column
    factors = _pairs(torch.cat((alphas_NGB, shifts_NG.unsqueeze(-1)), -1)).permute(0, 3, 1, 4, 2).contiguous()  # pair, group, tile, plane, row
    return BinaryTiles(on_large_pages(signs), on_large_pages(factors), _group(layout.group_size, columns, BINARY_CHUNK), (rows, columns))


def _pairs(values: Tensor) -> Tensor:
    """[N, ...] as [T / 2, 2, 16, ...], zeros under the rows."""
    whole = torch.cat((values, values.new_zeros(-len(values) % (2 * TILE), *values.shape[1:])))
    return whole.unflatten(0, (-1, 2, TILE))


def bitmap_rows(packed: PackedTensor) -> BitmapRows:
    """Lay a bitmap matrix out: its bytes as words, its values with room behind them."""
    bits, columns = packed.tensors["bitmap"], packed.shape[1]
    counts = unpack_bits(bits, columns).sum(-1)
    words = F.pad(bits, (0, -bits.shape[1] % 4)).contiguous().view(torch.int32)
    return BitmapRows(words, on_large_pages(F.pad(packed.tensors["values"].bfloat16(), (0, SPARSE_WORD))), counts.cumsum(0) - counts, packed.shape)


def two_four_form(packed: PackedTensor) -> TwoFourTiles | TwoFourCodes:
    """Lay a 2:4 matrix out: plain values, or codes as the low-bit kernels have them."""
    layout = packed.layout
    assert isinstance(layout, TwoFourLayout)
    if isinstance(layout.values, DenseLayout):
        return _two_four_tiles(packed)
    half = packed.shape[1] // 2
    places = cpu_lowbit.tile(unpack_codes(packed.tensors["places"], 2, half), torch.zeros(packed.shape[0], 1), None, 2, 0, abreast=1)
    return TwoFourCodes(cpu_lowbit.tiles_of(packed.part("values"), abreast=1), places.codes, packed.shape)


def _two_four_tiles(packed: PackedTensor) -> TwoFourTiles:
    places, values = packed.tensors["places"], packed.tensors["values_weight"].bfloat16()
    pairs = _padded(values, SPARSE_WORD // 2).view(torch.int32)
    return TwoFourTiles(on_large_pages(_lanes(pairs)), _lanes(F.pad(places, (0, -places.shape[1] % 4)).contiguous().view(torch.int32)), packed.shape)


def _padded(values: Tensor, step: int) -> Tensor:
    """Zeros behind the inputs up to a multiple of `step`, and under the rows up to whole tiles."""
    filled = F.pad(values, (0, -values.shape[-1] % step))
    return torch.cat((filled, filled.new_zeros(-len(filled) % TILE, *filled.shape[1:])))


def _lanes(values: Tensor) -> Tensor:
    """[N, ...] as [T, ..., 16]: the rows of a tile side by side."""
    whole = torch.cat((values, values.new_zeros(-len(values) % TILE, *values.shape[1:])))
    return whole.unflatten(0, (-1, TILE)).movedim(1, -1).contiguous()


def _group(group_size: int, columns: int, step: int) -> int:
    """The group as a kernel counts it: inputs, the padded row where there is one group."""
    return columns + -columns % step if group_size == 0 or group_size >= columns else group_size
