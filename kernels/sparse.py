"""Matrices with zeros that are not stored: a bitmap for zeros anywhere, 2-bit places for two of every four. Knows bytes; multiplies nothing.

Which weights are zero was decided before: these functions find them and refuse a matrix that has too few. Shape letters:
N outputs, K inputs.
"""

from dataclasses import replace
from math import ceil

import torch
from torch import Tensor

from bitpress.kernels.formats import PackedTensor, pack, pack_bits, pack_codes, unpack_bits, unpack_codes
from bitpress.kernels.layout import BitmapLayout, DenseLayout, TwoFourLayout, UniformLayout


def pack_bitmap(weight_NK: Tensor, layout: BitmapLayout) -> PackedTensor:
    """A matrix as bitmap and values in its own type, which must have the layout's item size.

    With fewer zeros than the layout's ratio (a method that rounds its budget otherwise) the stored ratio is the lower one that it meets.
    """
    rows, columns = weight_NK.shape
    if weight_NK.element_size() != layout.itemsize:
        raise ValueError(f"A bitmap of {layout.itemsize}-byte values does not take {weight_NK.dtype} weights.")
    kept_NK = weight_NK != 0
    found = int(kept_NK.sum())
    if found > layout.kept(rows, columns):
        layout = replace(layout, ratio=(columns - ceil(found / rows)) / columns)
    _fill(kept_NK, layout.kept(rows, columns) - found)
    return PackedTensor(layout, (rows, columns), {"bitmap": pack_bits(kept_NK), "values": weight_NK[kept_NK]})


def _fill(kept_NK: Tensor, missing: int) -> None:
    """Mark the first `missing` zeros as kept, so that the bytes are those of the layout."""
    if missing:
        kept_NK.view(-1)[(~kept_NK).view(-1).nonzero()[:missing, 0]] = True


def unpack_bitmap(packed: PackedTensor) -> Tensor:
    """Inverse of `pack_bitmap`: [N, K] in the type of the values."""
    values = packed.tensors["values"]
    kept_NK = unpack_bits(packed.tensors["bitmap"], packed.shape[1])
    return torch.zeros(packed.shape, dtype=values.dtype, device=values.device).masked_scatter_(kept_NK, values)


def pack_two_four(weight_NK: Tensor, layout: TwoFourLayout) -> PackedTensor:
    """A matrix as the two weights of every four that may differ from zero, in their own type. Raises ValueError where more than two do."""
    if not isinstance(layout.values, DenseLayout) or weight_NK.element_size() != layout.values.itemsize:
        raise ValueError(f"A {layout.name} layout of {layout.values} does not take plain {weight_NK.dtype} weights.")
    places = _places(weight_NK != 0)
    return _two_four(places, {"weight": _kept(weight_NK, places)}, layout)


def pack_two_four_codes(codes_NK: Tensor, scales_NG: Tensor, zeros_NG: Tensor | None, layout: TwoFourLayout) -> PackedTensor:
    """The same for uniform codes, of which those that equal their group's zero stand for zeros. Arguments as `formats.pack`; integer zeros only."""
    inner, columns = layout.values, codes_NK.shape[1]
    if not isinstance(inner, UniformLayout) or inner.zero != "integer":
        raise ValueError("A 2:4 matrix of codes needs uniform values with integer zeros.")
    zeros = torch.full_like(scales_NG, 2 ** (inner.bits - 1)) if zeros_NG is None else zeros_NG
    per_input = zeros.to(codes_NK.dtype).repeat_interleave(2 * inner.group_size or columns, dim=1)[:, :columns]
    places = _places(codes_NK != per_input)
    return _two_four(places, pack(_kept(codes_NK, places), scales_NG, zeros_NG, inner).tensors, layout)


def _two_four(places_NK: Tensor, values: dict[str, Tensor], layout: TwoFourLayout) -> PackedTensor:
    shape = (len(places_NK), 2 * places_NK.shape[1])
    return PackedTensor(layout, shape, {"places": pack_codes(places_NK, 2), **{f"values_{name}": tensor for name, tensor in values.items()}})


def _places(differs_NK: Tensor) -> Tensor:
    """Which two of every four are stored: uint8 [N, K / 2] of places 0..3, ascending in a pair. Where fewer differ, the first others fill up."""
    rows, columns = differs_NK.shape
    if columns % 4:
        raise ValueError(f"2:4 needs rows of a multiple of 4 inputs; this one has {columns}.")
    fours = differs_NK.reshape(rows, -1, 4)
    if int(fours.sum(-1).max()) > 2:
        raise ValueError("Some four consecutive inputs have more than two weights that are not zero; prune to 2:4 first.")
    order = fours.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :2]
    return order.sort(dim=-1).values.to(torch.uint8).reshape(rows, columns // 2)


def _kept(values_NK: Tensor, places: Tensor) -> Tensor:
    """The stored ones of each four, [N, K / 2]."""
    rows, columns = values_NK.shape
    return values_NK.reshape(rows, -1, 4).gather(-1, places.long().view(rows, -1, 2)).reshape(rows, columns // 2)


def spread(values_NH: Tensor, packed: PackedTensor) -> Tensor:
    """Stored values [N, K / 2] of a 2:4 matrix at their places among zeros, [N, K]."""
    rows, columns = packed.shape
    places = unpack_codes(packed.tensors["places"], 2, columns // 2).long().view(rows, -1, 2)
    fours = torch.zeros(rows, columns // 4, 4, dtype=values_NH.dtype, device=values_NH.device)
    return fours.scatter_(-1, places, values_NH.reshape(rows, -1, 2)).view(rows, columns)
