"""What one decoding step does between its matrix products, each a single call into C++. Knows rows of bfloat16 on a CPU; no model.

The oracle of each is a line or two of torch, in the tests. Where `available` is false the caller has that path anyway.
"""

import torch
from torch import Tensor

from bitpress.kernels import cpu_build


def available() -> bool:
    """Whether the compiled kernels are there."""
    return cpu_build.library() is not None


def rms_norm(x_1D: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """One row over its root mean square, times `weight_D`. bfloat16 in and out, summed in float32."""
    out = torch.empty_like(x_1D)
    _library().bitpress_rms_norm(x_1D.data_ptr(), weight_D.data_ptr(), out.data_ptr(), x_1D.shape[-1], epsilon)
    return out


def attend_one(qkv: Tensor, cos_C: Tensor, sin_C: Tensor, cache: Tensor, position: int, heads: int, scale: float) -> Tensor:
    """Rotary turn, cache write and attention of the token at `position`.

    qkv: bfloat16 [1, (heads + 2 kv) * C]. cos_C, sin_C: float32 [C] of that position, the sine's first half negated. cache:
    bfloat16 [2 kv, capacity, C], contiguous, keys first; row `position` is written. Returns bfloat16 [1, heads * C].
    """
    planes, capacity, channels = cache.shape
    out = qkv.new_empty(1, heads * channels)
    _library().bitpress_attend_one(
        qkv.data_ptr(), cos_C.data_ptr(), sin_C.data_ptr(), cache.data_ptr(), out.data_ptr(),
        position, capacity, heads, planes // 2, channels, scale, torch.get_num_threads(),
    )  # fmt: skip
    return out


def gated_silu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of one row [1, 2 F], bfloat16: [1, F]."""
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(1, width)
    _library().bitpress_gated_silu(gate_up.data_ptr(), out.data_ptr(), width)
    return out


def _library() -> cpu_build.ctypes.CDLL:
    lib = cpu_build.library()
    if lib is None:
        raise RuntimeError(cpu_build.why_not())
    return lib
