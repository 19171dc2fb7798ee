"""Round to nearest in groups, and codes back to numbers, on a CPU. Knows matrices and grids; refuses to know methods.

The plain operations of whoever calls are the oracle, equal to the bit, and what other devices and processors without a compiler have.
"""

import torch
from torch import Tensor

from bitpress.kernels import cpu_build


def round_groups(weight_NK: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Codes [N, K] uint8, scales [N, G] bfloat16 and whole zeros [N, G] uint8 (None for a symmetric grid); None where there is no kernel.

    weight_NK: float32, finite. group_size 0 is the whole row. The grid is that of METHODS 15.1: a range widened to hold zero, its scale
    rounded to bfloat16 before the zero is computed with it.
    """
    lib = _library(weight_NK)
    if lib is None or weight_NK.dtype != torch.float32:
        return None
    rows, columns = weight_NK.shape
    weight_NK, size = weight_NK.contiguous(), group_size or columns
    groups = -(-columns // size)
    codes_NK, scales_NG = torch.empty((rows, columns), dtype=torch.uint8), torch.empty((rows, groups), dtype=torch.bfloat16)
    zeros_NG = None if symmetric else torch.empty((rows, groups), dtype=torch.uint8)
    places = codes_NK.data_ptr(), scales_NG.data_ptr(), None if zeros_NG is None else zeros_NG.data_ptr()
    lib.bitpress_round_groups(weight_NK.data_ptr(), rows, columns, size, bits, *places, torch.get_num_threads())
    return codes_NK, scales_NG, zeros_NG


def widen_codes(codes_NK: Tensor, scales_NG: Tensor, zeros_NG: Tensor, group_size: int) -> Tensor | None:
    """(code - zero) * scale, float32 [N, K]; zeros in any type. None where there is no kernel."""
    lib = _library(codes_NK)
    if lib is None or scales_NG.dtype != torch.bfloat16 or codes_NK.dtype != torch.uint8:
        return None
    codes_NK, scales_NG, zeros_NG = codes_NK.contiguous(), scales_NG.contiguous(), zeros_NG.float().contiguous()
    (rows, columns), out_NK = codes_NK.shape, torch.empty(codes_NK.shape)
    sizes = rows, columns, group_size or columns
    lib.bitpress_widen_codes(codes_NK.data_ptr(), scales_NG.data_ptr(), zeros_NG.data_ptr(), *sizes, out_NK.data_ptr(), torch.get_num_threads())
    return out_NK


def _library(matrix: Tensor) -> cpu_build.ctypes.CDLL | None:
    return cpu_build.library() if matrix.device.type == "cpu" and matrix.numel() else None
