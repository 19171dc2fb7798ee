"""Binary-coded matrices: a weight is a shift plus or minus an alpha for every bit plane. Knows bytes; multiplies nothing.

Every uniform grid is one of these: alphas are powers of two times the scale (METHODS 1.5, `from_uniform`). Shape letters:
N outputs, K inputs, G groups a row, B planes.
"""

import torch
from torch import Tensor

from bitpress.kernels.formats import PackedTensor, as_stored, pack_bits, unpack_bits, unpack_codes
from bitpress.kernels.layout import BinaryLayout


def pack_binary(plus_NBK: Tensor, alphas_NGB: Tensor, shifts_NG: Tensor, layout: BinaryLayout) -> PackedTensor:
    """Signs, alphas and shifts in their stored form.

    plus_NBK: bool, true where a plane adds its alpha and false where it takes it away. alphas_NGB, shifts_NG: already rounded to
    bfloat16 (any float type that holds them exactly). Raises ValueError when shapes or precision do not fit.
    """
    rows, planes, columns = plus_NBK.shape
    groups = layout.groups(columns)
    if planes != layout.bits or plus_NBK.dtype != torch.bool:
        raise ValueError(f"A layout of {layout.bits} planes takes bool signs [rows, {layout.bits}, inputs], not {plus_NBK.dtype} {tuple(plus_NBK.shape)}.")
    tensors = {"planes": pack_bits(plus_NBK), "alphas": as_stored(alphas_NGB, (rows, groups, planes), "alphas")}
    return PackedTensor(layout, (rows, columns), {**tensors, "shifts": as_stored(shifts_NG, (rows, groups), "shifts")})


def unpack_binary(packed: PackedTensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `pack_binary`: (plus bool [N, B, K], alphas bfloat16 [N, G, B], shifts bfloat16 [N, G])."""
    return unpack_bits(packed.tensors["planes"], packed.shape[1]), packed.tensors["alphas"], packed.tensors["shifts"]


def from_uniform(packed: PackedTensor) -> tuple[Tensor, Tensor, Tensor]:
    """A uniform matrix as binary code: (plus bool [N, B, K], alphas float32 [N, G, B], shifts float32 [N, G]), exact before rounding.

    Plane b adds or takes away scale * 2**(bits - 2 - b), around the middle of the grid.
    """
    layout, columns = packed.uniform, packed.shape[1]
    codes_NK, scales_NG = unpack_codes(packed.tensors["codes"], layout.bits, columns), packed.tensors["scales"].float()
    places = torch.arange(layout.bits - 1, -1, -1, dtype=torch.uint8, device=codes_NK.device)
    plus_NBK = ((codes_NK[:, None] >> places[:, None]) & 1).bool()
    middle = (2**layout.bits - 1) / 2
    zeros_NG = torch.full_like(scales_NG, 2 ** (layout.bits - 1)) if packed.zeros_NG is None else packed.zeros_NG.float()
    return plus_NBK, scales_NG[..., None] * 2.0 ** (places.float() - 1), scales_NG * (middle - zeros_NG)
