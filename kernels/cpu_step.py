"""What a block does between its matrix products, each a single call into C++. Knows rows of bfloat16 on a CPU; no model.

The oracle of each is a line or two of torch, in the tests. Where `available` or `takes` is false the caller has that path anyway.
"""

import torch
from torch import Tensor

from bitpress.kernels import cpu_build


def available() -> bool:
    """Whether the compiled kernels are there."""
    return cpu_build.library() is not None


def takes(*parts: Tensor) -> bool:
    """Whether `rms_norm` and `gated_silu` are there for these tensors: bfloat16 on a CPU, rows that lie together, no gradient asked for."""
    if any(part.dtype != torch.bfloat16 or part.device.type != "cpu" or part.stride(-1) != 1 or part.numel() == 0 for part in parts):
        return False
    return available() and not (torch.is_grad_enabled() and any(part.requires_grad for part in parts))


def rms_norm(x_MD: Tensor, weight_D: Tensor, epsilon: float, rounded: bool = False) -> Tensor:
    """Rows over their root mean square, times `weight_D`, in any shape [..., D]. bfloat16 in and out, summed in float32.

    rounded: rows are rounded to bfloat16 before they meet the weight, which is what transformers' Llama norm does.
    """
    x_MD = x_MD.contiguous()
    out, width = torch.empty_like(x_MD), x_MD.shape[-1]
    sizes = x_MD.numel() // width, width
    _library().bitpress_rms_norm(x_MD.data_ptr(), weight_D.data_ptr(), out.data_ptr(), *sizes, epsilon, rounded, torch.get_num_threads())
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


def turn_rows(qkv_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor, new: Tensor, heads: int) -> Tensor:
    """Rotary turn of many positions, whose turned keys and values go to `new`, their rows of a cache; returns the turned queries [T, heads, C].

    qkv_THC: bfloat16 [T, heads + 2 kv, C], contiguous; its queries are turned in place. cos_TC, sin_TC: float32, contiguous, the sine's
    first half negated. new: bfloat16 [2 kv, T, C], keys first, the rows of a head contiguous.
    """
    planes, length, channels = new.shape
    sizes = length, new.stride(0), heads, planes // 2, channels
    _library().bitpress_turn_rows(qkv_THC.data_ptr(), cos_TC.data_ptr(), sin_TC.data_ptr(), new.data_ptr(), *sizes, torch.get_num_threads())
    return qkv_THC[:, :heads]


def turn_rounded(x_BTHC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Heads of many positions turned, [B, T, H, C]: x * cos + rotated half * sin, every product and sum rounded as in transformers' operations.

    All bfloat16, the tables contiguous; cos and sin are those of transformers, nothing negated. Raises ValueError for another type.
    """
    if any(part.dtype != torch.bfloat16 for part in (x_BTHC, cos_TC, sin_TC)):
        raise ValueError("Heads and tables are turned in bfloat16 only.")
    x_BTHC = x_BTHC.contiguous()
    out, (batch, length, heads, channels) = torch.empty_like(x_BTHC), x_BTHC.shape
    places = x_BTHC.data_ptr(), cos_TC.data_ptr(), sin_TC.data_ptr(), out.data_ptr()
    _library().bitpress_turn_rounded(*places, batch * length, length, heads, channels, torch.get_num_threads())
    return out


def gated_silu(gate_MF: Tensor, up_MF: Tensor, rounded: bool = False) -> Tensor:
    """silu(gate) * up, contiguous, for bfloat16 [..., F] of one shape: contiguous, or two halves of the rows of one [M, 2 F].

    rounded: silu(gate) is rounded to bfloat16 before it meets the other, as in torch's two operations.
    """
    if gate_MF.stride() != up_MF.stride() or gate_MF.ndim != 2:
        gate_MF, up_MF = gate_MF.contiguous(), up_MF.contiguous()
    out, width = torch.empty(gate_MF.shape, dtype=gate_MF.dtype), gate_MF.shape[-1]
    apart = gate_MF.stride(0) if gate_MF.ndim == 2 else width
    sizes = gate_MF.numel() // width, width, apart
    _library().bitpress_gated_silu(gate_MF.data_ptr(), up_MF.data_ptr(), out.data_ptr(), *sizes, rounded, torch.get_num_threads())
    return out


def _library() -> cpu_build.ctypes.CDLL:
    lib = cpu_build.library()
    if lib is None:
        raise RuntimeError(cpu_build.why_not())
    return lib
