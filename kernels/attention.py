"""Attention of many positions that look back, on a CPU with bfloat16 dot products. Knows queries, keys and values; refuses to know models.

Torch's own function is the oracle, and what a caller has wherever `attends` says no.
"""

import ctypes

import torch
from torch import Tensor

from bitpress.kernels import cpu_build

CHANNELS = 256  # of a head, at most


def attends(*sides_BHTC: Tensor) -> bool:
    """Whether `attend_back` is there for these queries, keys and values: bfloat16 on a CPU, as many queries as keys, no gradient asked for."""
    query, key, value = sides_BHTC
    if any(part.dtype != torch.bfloat16 or part.device.type != "cpu" or part.stride(-1) != 1 for part in sides_BHTC):
        return False
    if torch.is_grad_enabled() and any(part.requires_grad for part in sides_BHTC):
        return False
    same = query.shape[2] == key.shape[2] == value.shape[2] and query.shape[-1] == key.shape[-1] and query.shape[1] % key.shape[1] == 0
    pairs = query.shape[-1] % 2 == 0 and query.data_ptr() % 4 == 0 and all(step % 2 == 0 for step in query.stride()[:-1])  # as queries are read
    return same and pairs and query.shape[-1] <= CHANNELS and cpu_build.panels(query.shape[2], query.dtype)


def attend_back(query_BHTC: Tensor, key_BGTC: Tensor, value_BGTC: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v of each position over itself and those before it: [B, T, H, C'], contiguous; H a multiple of G key heads.

    Scores and sums are float32, shares are rounded to bfloat16 before they meet the values. Only where `attends`.
    """
    batch, heads, length, channels = query_BHTC.shape
    out = query_BHTC.new_empty(batch, length, heads, value_BGTC.shape[-1])
    sides = (query_BHTC, key_BGTC, value_BGTC)
    apart = (ctypes.c_int64 * 9)(*(step for side in sides for step in side.stride()[:-1]))
    lib = cpu_build.library()
    assert lib is not None
    sizes = (batch, heads, key_BGTC.shape[1], length, channels, value_BGTC.shape[-1])
    lib.bitpress_attend_back(*(side.data_ptr() for side in sides), apart, out.data_ptr(), *sizes, scale, torch.get_num_threads())
    return out
