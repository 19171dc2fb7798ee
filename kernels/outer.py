"""Sums of outer products of rows, left^T right: what second moments are made of. Knows rows of numbers; refuses to know what they are of.

On processors with bfloat16 dot products rows of bfloat16 are multiplied as they are, several times faster than as float32; both ways
take exact products, sum in float32 within a call and in float64 over calls.
"""

import torch
from torch import Tensor

from bitpress.kernels import cpu_build

SPAN = 256  # columns of left whose products with all later columns of right are one matrix product


def add_outer(total_NK: Tensor, left_MN: Tensor, right_MK: Tensor, upper: bool = False) -> None:
    """total_NK += left_MN^T right_MK, for float64 totals. With `upper` only what lies on or above the diagonal need be right; the rest may hold anything."""
    lib = cpu_build.library() if left_MN.dtype == right_MK.dtype == torch.bfloat16 and total_NK.device.type == "cpu" and len(left_MN) else None
    if lib is None or not lib.bitpress_has_panels():
        by_torch(total_NK, left_MN, right_MK, upper)
        return
    left_MN, right_MK = left_MN.contiguous(), right_MK.contiguous()
    sizes = *left_MN.shape, right_MK.shape[1]
    lib.bitpress_outer(left_MN.data_ptr(), right_MK.data_ptr(), *sizes, upper, total_NK.data_ptr(), torch.get_num_threads())


def by_torch(total_NK: Tensor, left_MN: Tensor, right_MK: Tensor, upper: bool = False) -> None:
    """As `add_outer`, by torch: on any device and in any type."""
    left_MN, right_MK = left_MN.float(), right_MK.float()
    for start in range(0, left_MN.shape[1], SPAN):
        later = start if upper else 0
        total_NK[start : start + SPAN, later:] += left_MN[:, start : start + SPAN].t() @ right_MK[:, later:]
