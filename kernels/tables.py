"""Sixteen levels times the largest weight of a group: those of NF4 and FP4, or a matrix's own. Knows tables and bytes; multiplies nothing.

Levels: NF4 from Dettmers et al. 2023, QLoRA (arXiv 2305.14314), quantiles of a normal distribution; FP4 as bitsandbytes
has it (METHODS 15.7). Codes number a table's levels from the lowest to the highest, so FP4 has a code for -0 and one for 0.
Shape letters: N outputs, K inputs, G groups a row.
"""

from math import ceil

import torch
from torch import Tensor

from bitpress.kernels.formats import LEVELS_NAME, PackedTensor, as_codes, as_stored, pack_codes, unpack_codes
from bitpress.kernels.layout import LEVEL_COUNT, SUPER_GROUP, TableLayout

_FP4_HALF = (0.0, 0.0625 / 12, 2 / 12, 3 / 12, 4 / 12, 6 / 12, 8 / 12, 1.0)
LEVELS: dict[str, tuple[float, ...]] = {
    "nf4": (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495,
            0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
            0.7229568362236023, 1.0),
    "fp4": (*(-level for level in reversed(_FP4_HALF)), *_FP4_HALF),
}  # fmt: skip
TOP = 255  # the highest 8-bit scale code


def levels(table: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sixteen levels of a fixed table, ascending."""
    return torch.tensor(LEVELS[table], dtype=dtype)


def levels_of(packed: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sixteen levels of a stored matrix, ascending, where it lies."""
    assert isinstance(packed.layout, TableLayout)
    own = packed.tensors[LEVELS_NAME].float() if packed.layout.own_levels else levels(packed.layout.table).to(packed.device)
    return own.to(dtype)


def nearest(values: Tensor, table: str) -> Tensor:
    """Codes of the nearest levels of a fixed table, uint8 of the same shape. A value half-way between two goes to the lower one."""
    return nearest_of(values, levels(table, values.dtype).to(values.device))


def nearest_of(values: Tensor, steps: Tensor) -> Tensor:
    """The same for any levels, ascending [16]."""
    return torch.bucketize(values, (steps[1:] + steps[:-1]) / 2).to(torch.uint8)


def round_scales(largest_NG: Tensor, layout: TableLayout) -> tuple[Tensor, Tensor | None]:
    """Scales as they are stored, for groups whose largest |weight| is given: (scales, super scales or None).

    Round weights on `scales_of` these. Plain scales are bfloat16 [N, G]. Double ones are uint8 codes [N, G], each times
    the bfloat16 super scale of its 256 groups of a row; a code of 0 is left to groups of zeros.
    """
    if not layout.double_scales:
        return largest_NG.to(torch.bfloat16), None
    rows, groups = largest_NG.shape
    padded = torch.nn.functional.pad(largest_NG.float(), (0, -groups % SUPER_GROUP)).view(rows, -1, SUPER_GROUP)
    supers = (padded.amax(-1) / TOP).to(torch.bfloat16)
    codes = (padded / torch.where(supers > 0, supers, 1.0).unsqueeze(-1).float()).round().clamp(0, TOP)
    codes = torch.where((padded > 0) & (codes == 0), 1.0, codes)
    return codes.to(torch.uint8).view(rows, -1)[:, :groups].contiguous(), supers


def scales_of(scales_NG: Tensor, supers: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that stored scales stand for, [N, G] in `dtype`."""
    if supers is None:
        return scales_NG.to(dtype)
    return scales_NG.to(dtype) * supers.to(dtype).repeat_interleave(SUPER_GROUP, dim=1)[:, : scales_NG.shape[1]]


def pack_table(codes_NK: Tensor, scales_NG: Tensor, layout: TableLayout, supers: Tensor | None = None, own: Tensor | None = None) -> PackedTensor:
    """Codes and scales in their stored form.

    codes_NK: integers below 16, numbers of levels in ascending order. scales_NG, supers: as `round_scales` gives them (plain
    scales in any float type that holds their bfloat16 values exactly). own: the matrix's own levels [16], ascending and rounded to bfloat16,
    for a codebook only. Raises ValueError when shapes, ranges or precision do not fit.
    """
    if (own is not None) != layout.own_levels:
        raise ValueError("Levels of its own belong to a codebook, and only to one.")
    made = _pack_scaled(codes_NK, scales_NG, layout, supers)
    if own is None:
        return made
    if bool((own.diff() < 0).any()):
        raise ValueError("The levels of a codebook must ascend.")
    return PackedTensor(layout, made.shape, {**made.tensors, LEVELS_NAME: as_stored(own, (LEVEL_COUNT,), "levels")})


def _pack_scaled(codes_NK: Tensor, scales_NG: Tensor, layout: TableLayout, supers: Tensor | None) -> PackedTensor:
    rows, columns = codes_NK.shape
    groups = layout.groups(columns)
    if (supers is not None) != layout.double_scales:
        raise ValueError("Super scales belong to double scales, and only to them.")
    tensors = {"codes": pack_codes(as_codes(codes_NK, 4), 4)}
    if supers is None:
        tensors["scales"] = as_stored(scales_NG, (rows, groups), "scales")
    else:
        if tuple(scales_NG.shape) != (rows, groups):
            raise ValueError(f"Scale codes of shape {tuple(scales_NG.shape)} do not fit {rows} rows of {groups} groups.")
        tensors |= {"scales": as_codes(scales_NG, 8), "super_scales": as_stored(supers, (rows, ceil(groups / SUPER_GROUP)), "super scales")}
    return PackedTensor(layout, (rows, columns), tensors)


def unpack_table(packed: PackedTensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(codes uint8 [N, K], scales [N, G] in `dtype`)."""
    codes_NK = unpack_codes(packed.tensors["codes"], 4, packed.shape[1])
    return codes_NK, scales_of(packed.tensors["scales"], packed.tensors.get("super_scales"), dtype)
