"""Packed matrices: named tensors in a layout, codes as a bit stream a row, and the uniform format. Knows bytes; multiplies nothing.

The other formats have a module each: `tables` (NF4, FP4), `binary` (binary-coded), `sparse` (bitmap, 2:4), `pairs` (low
rank). A uniform code stands for `(code - zero) * scale`. Symmetric layouts store no zeros: theirs is 2**(bits - 1). Shape
letters: N outputs, K inputs, G groups a row. Bit streams are little-endian, also inside the lanes that unpack them, so this module
assumes a little-endian machine (all that torch runs on today).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from bitpress.kernels.layout import BITS, BitmapLayout, Layout, PairLayout, TableLayout, TwoFourLayout, UniformLayout

LEVELS_NAME = "levels"
WHOLE = ("right_", LEVELS_NAME)  # tensors that are no row's own
# Codes are spread in *lanes*: an integer that holds `codes` of them in `bytes` bytes before, and in one byte each after.
LANES = {2: (4, 1, torch.int32), 3: (8, 3, torch.int64), 4: (2, 1, torch.int16), 5: (8, 5, torch.int64), 6: (4, 3, torch.int32)}


@dataclass(frozen=True)
class PackedTensor:
    """A matrix in its canonical, stored form.

    layout: how. shape: (N, K). tensors, by layout (first axis N unless said otherwise):
      uniform  "codes" uint8 [N, ceil(K * bits / 8)], "scales" bfloat16 [N, G]; unless symmetric "zeros", uint8 [N, ceil(G * bits / 8)] or
               bfloat16 [N, G] where they are floats
      table    "codes" uint8 [N, ceil(K / 2)], "scales" bfloat16 [N, G], or uint8 with "super_scales" bfloat16 [N, ceil(G / 256)]; where the matrix
               has levels of its own "levels" bfloat16 [16]
      binary   "planes" uint8 [N, bits, ceil(K / 8)], "alphas" bfloat16 [N, G, bits], "shifts" bfloat16 [N, G]
      bitmap   "bitmap" uint8 [N, ceil(K / 8)], "values" [kept], row after row
      2:4      "places" uint8 [N, ceil(K / 8)], and the tensors of the values' own layout with "values_" before their names
      pair     the tensors of both factors with "left_" and "right_" before their names; those of the right one have r rows; those of a matrix
               to which they are added with "base_"
      dense    "weight" [N, K]
    """

    layout: Layout
    shape: tuple[int, int]
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Stored bytes; equal to `layout.nbytes(N, K)`."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.tensors.values())).device

    def to(self, device: torch.device | str) -> "PackedTensor":
        """The same matrix on a device."""
        return PackedTensor(self.layout, self.shape, {name: tensor.to(device) for name, tensor in self.tensors.items()})

    @property
    def uniform(self) -> UniformLayout:
        """The layout of a uniform matrix. Raises TypeError for any other."""
        if not isinstance(self.layout, UniformLayout):
            raise TypeError(f"A {self.layout.name} matrix has no uniform codes.")
        return self.layout

    @property
    def zeros_NG(self) -> Tensor | None:
        """Zeros of a uniform matrix, uint8 or bfloat16 [N, G]; None for a symmetric layout."""
        layout = self.uniform
        if layout.symmetric:
            return None
        return self.tensors["zeros"] if layout.zero == "float" else unpack_codes(self.tensors["zeros"], layout.bits, layout.groups(self.shape[1]))

    def part(self, name: str) -> "PackedTensor":
        """A matrix inside this one: the `values` of a 2:4 matrix, the `left` or `right` factor of a pair. Shares the storage."""
        layout, (rows, columns) = self.layout, self.shape
        tensors = {key.removeprefix(f"{name}_"): tensor for key, tensor in self.tensors.items() if key.startswith(f"{name}_")}
        if isinstance(layout, PairLayout) and name == "base" and layout.base:
            return PackedTensor(layout.base, self.shape, tensors)
        if isinstance(layout, PairLayout):
            rank = next(len(tensor) for key, tensor in self.tensors.items() if key.startswith("right_"))
            return PackedTensor(layout.left, (rows, rank), tensors) if name == "left" else PackedTensor(layout.right, (rank, columns), tensors)
        if isinstance(layout, TwoFourLayout):
            return PackedTensor(layout.values, (rows, columns // 2), tensors)
        raise TypeError(f"A {layout.name} matrix has no parts.")

    def rows(self, start: int, stop: int) -> "PackedTensor":
        """Rows start:stop as views of the same storage."""
        tensors = {name: tensor if name.startswith(WHOLE) else tensor[start:stop] for name, tensor in self.tensors.items()}
        if isinstance(self.layout, BitmapLayout):
            before, within = count_bits(self.tensors["bitmap"][:start]), count_bits(tensors["bitmap"])
            tensors["values"] = self.tensors["values"][before : before + within]
        return PackedTensor(self.layout, (stop - start, self.shape[1]), tensors)

    def take(self, rows: Tensor) -> "PackedTensor":
        """A copy of the named rows of a uniform or table matrix, in that order. rows: integer [R]."""
        tensors = {name: tensor if name.startswith(WHOLE) else tensor[rows] for name, tensor in self.tensors.items()}
        return PackedTensor(self.layout, (len(rows), self.shape[1]), tensors)


def count_bits(stream: Tensor) -> int:
    """Ones in bytes. stream: uint8 of any shape."""
    return int(unpack_bits(stream.reshape(1, -1), 8 * stream.numel()).sum())


def pack_bits(bits_NK: Tensor) -> Tensor:
    """One bit a value, little-endian, each row starting on a byte. bits_NK: bool [..., K]. Returns uint8 [..., ceil(K / 8)]."""
    padded = F.pad(bits_NK.to(torch.uint8), (0, -bits_NK.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8, device=padded.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(stream: Tensor, columns: int) -> Tensor:
    """Inverse of `pack_bits`. stream: uint8 [..., ceil(K / 8)]. Returns bool [..., K]."""
    spread = (stream.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=stream.device)) & 1
    return spread.flatten(-2)[..., :columns].bool()


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"No format has codes of {bits} bits; known: {', '.join(map(str, BITS))}.")


def _halvings(bits: int, codes: int) -> list[tuple[int, int, int]]:
    """(low mask, high mask, shift) of each step that splits fields of a lane in two, from the whole lane to single codes."""
    steps, fields = [], 1
    while fields < codes:
        half = codes // fields // 2  # codes in half a field
        room, width = 8 * half, bits * half
        low = sum(((1 << width) - 1) << (2 * room * field) for field in range(fields))
        steps.append((low, low << width, room - width))
        fields *= 2
    return steps


def pack_codes(codes_NK: Tensor, bits: int) -> Tensor:
    """Codes as a little-endian bit stream a row, each row starting on a byte.

    codes_NK: uint8 [N, K], each below 2**bits. Returns uint8 [N, ceil(K * bits / 8)]. Raises ValueError for a width that no format has.
    """
    _check_bits(bits)
    if bits == 8:
        return codes_NK.clone(memory_format=torch.contiguous_format)
    per_lane, lane_bytes, lane = LANES[bits]
    rows, columns = codes_NK.shape
    lanes = ceil(columns / per_lane)
    field = F.pad(codes_NK, (0, lanes * per_lane - columns)).contiguous().view(-1).view(lane)
    for low, high, shift in reversed(_halvings(bits, per_lane)):
        field = (field & low) | ((field >> shift) & high)
    stream = field.view(torch.uint8).view(rows, lanes, per_lane)[..., :lane_bytes].reshape(rows, lanes * lane_bytes)
    return stream[:, : ceil(columns * bits / 8)].contiguous()


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack_codes`. packed: uint8 [N, ceil(K * bits / 8)]. Returns uint8 [N, K], possibly a view. Raises ValueError as it does."""
    _check_bits(bits)
    if bits == 8:
        return packed
    per_lane, lane_bytes, lane = LANES[bits]
    rows, lanes = len(packed), ceil(columns / per_lane)
    if packed.shape[1] != lanes * lane_bytes:
        packed = F.pad(packed, (0, lanes * lane_bytes - packed.shape[1]))
    field = packed.to(lane) if lane_bytes == 1 else F.pad(packed.reshape(rows, lanes, lane_bytes), (0, per_lane - lane_bytes)).view(lane)
    for low, high, shift in _halvings(bits, per_lane):
        field = (field & high).bitwise_left_shift_(shift).bitwise_or_(field.bitwise_and_(low))
    return field.view(torch.uint8).view(rows, lanes * per_lane)[:, :columns]


def pack(codes_NK: Tensor, scales_NG: Tensor, zeros_NG: Tensor | None, layout: UniformLayout) -> PackedTensor:
    """Uniform codes, scales and zeros in their stored form.

    codes_NK: integers below 2**bits. scales_NG: already rounded to bfloat16 (any float type that holds them exactly), since what is
    stored must be what the codes were rounded on. zeros_NG: integers below 2**bits, or numbers rounded to bfloat16 where the layout's
    zero is a float; None when the layout is symmetric. Raises ValueError when shapes, ranges or precision do not fit.
    """
    rows, columns = codes_NK.shape
    scales = as_stored(scales_NG, (rows, layout.groups(columns)), "scales")
    if (zeros_NG is None) != layout.symmetric:
        raise ValueError("A symmetric layout takes no zeros and an asymmetric one needs them.")
    tensors = {"codes": pack_codes(as_codes(codes_NK, layout.bits), layout.bits), "scales": scales}
    if zeros_NG is not None:
        floats = layout.zero == "float"
        tensors["zeros"] = as_stored(zeros_NG, tuple(scales.shape), "zeros") if floats else pack_codes(as_codes(zeros_NG, layout.bits), layout.bits)
    return PackedTensor(layout, (rows, columns), tensors)


def as_stored(values: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    """Values as bfloat16, after checking that they have this shape and lose nothing. Raises ValueError that says what they are."""
    if tuple(values.shape) != shape:
        raise ValueError(f"{what.capitalize()} of shape {tuple(values.shape)} do not fit: {shape} are needed, one a row and group.")
    stored = values.to(torch.bfloat16)
    if not torch.equal(stored.to(values.dtype), values) and not values.isnan().any():
        raise ValueError(f"{what.capitalize()} must be rounded to bfloat16 before weights are rounded on them.")
    return stored.contiguous()


def as_codes(values: Tensor, bits: int) -> Tensor:
    """Values as uint8, after checking that each is a code of `bits` bits: a stray one would spill into its neighbours."""
    if values.numel() and not (int(values.min()) >= 0 and int(values.max()) < 2**bits):
        raise ValueError(f"Codes of {bits} bits lie in 0..{2**bits - 1}; found {int(values.min())}..{int(values.max())}.")
    return values.to(torch.uint8)


def join_rows(parts: Sequence[Tensor]) -> Tensor:
    """Tensors stacked along the first axis: a view when they already lie one after the other in one storage, else a copy."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        together = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and part.data_ptr() == end
        if not (together and part.is_contiguous() and part.dtype == first.dtype):
            return torch.cat(tuple(parts))
        end += part.numel() * part.element_size()
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


def concat(parts: Sequence[PackedTensor]) -> PackedTensor:
    """Matrices with the same inputs and layout, one below the other (q, k, v or gate, up as one). Raises ValueError otherwise."""
    layout, columns = parts[0].layout, parts[0].shape[1]
    if not can_concat(layout) or any(part.layout != layout or part.shape[1] != columns for part in parts):
        raise ValueError("Only matrices with the same layout and number of inputs can be joined, and low-rank pairs and codebooks cannot.")
    tensors = {name: join_rows([part.tensors[name] for part in parts]) for name in parts[0].tensors}
    return PackedTensor(layout, (sum(part.shape[0] for part in parts), columns), tensors)


def can_concat(layout: Layout) -> bool:
    """Whether matrices of this layout can lie one below the other; low-rank pairs have right factors of their own, codebooks levels."""
    return not isinstance(layout, PairLayout) and not (isinstance(layout, TableLayout) and layout.own_levels)
