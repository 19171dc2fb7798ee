"""Attention of one token over a compressed cache as one call into C++. Knows rows, codes and factors on a CPU; no model and no recipe.

The oracle is torch's attention over what the rows' own `read` gives (`engine.kv_cache`), in the tests.
"""

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from bitpress.kernels import cpu_build

SPAN = 32  # tokens that are read at a time


class CacheSide(ctypes.Structure):
    """Keys or values of one block, in place: rows, codes of old tokens where it has them, the factor where it is a latent.

    count, filled: rows that are held as they are, and groups of codes (by channel) or coded tokens. The call appends to both.
    """

    _fields_ = [*((name, ctypes.c_void_p) for name in ("recent", "codes", "lows", "scales", "up")),
                *((name, ctypes.c_int32) for name in ("width", "count", "filled", "bits", "group", "by_channel", "window", "each"))]  # fmt: skip
    kept: tuple[Tensor, ...]  # what the addresses point at


def side(recent_LD: Tensor, up_NR: Tensor | None = None, each: bool = False) -> CacheSide:
    """A side whose rows [L, D], bfloat16, have room for all tokens. up_NR: bfloat16 [kv heads * C, D]. each: D is a run of numbers a head."""
    made = CacheSide(recent=recent_LD.data_ptr(), width=recent_LD.shape[1], each=each)
    made.kept = (recent_LD,)
    if up_NR is not None:
        padded = F.pad(up_NR.bfloat16(), (0, up_NR.shape[1] % 2)).contiguous()
        made.up, made.kept = padded.data_ptr(), (recent_LD, padded)
    return made


def with_codes(made: CacheSide, codes: tuple[Tensor, Tensor, Tensor], bits: int, group: int, by_channel: bool, window: int) -> CacheSide:
    """The same side with old tokens as codes, lows and scales of `engine.kv_cache.Coded`, room for all taken."""
    made.codes, made.lows, made.scales = (tensor.data_ptr() for tensor in codes)
    made.bits, made.group, made.by_channel, made.window = bits, group, by_channel, window
    made.kept = (*made.kept, *codes)
    return made


def fits(keys: CacheSide, values: CacheSide) -> bool:
    """Whether the kernel reads these forms: groups of tokens are its 32, and are of keys."""
    return not values.by_channel and (not keys.by_channel or keys.group == SPAN) and cpu_build.library() is not None


def turns_of(cos_PC: Tensor, sin_PC: Tensor) -> Tensor:
    """Cosines and sines of every 32 positions, tokens in neighbouring places: float32 [ceil(P / 32), 2, C / 2, 32]."""
    half = cos_PC.shape[1] // 2
    both_P2H = torch.stack((cos_PC[:, :half], sin_PC[:, half:]), 1).float()
    padded = F.pad(both_P2H, (0, 0, 0, 0, 0, -len(both_P2H) % SPAN))
    return padded.unflatten(0, (-1, SPAN)).permute(0, 2, 3, 1).contiguous()


def attend(qkv: Tensor, cos_C: Tensor, sin_C: Tensor, turns: Tensor, keys: CacheSide, values: CacheSide, heads: int, kv_heads: int, scale: float) -> Tensor:
    """Append a token's rows and mix: bfloat16 [1, heads * C], behind the values' factor.

    qkv: bfloat16 [1, heads * C + D of keys + D of values], latent rows as they come from the first factor. cos_C, sin_C: float32 [C] of its
    position, the sine's first half negated. turns: of all positions.
    """
    channels = cos_C.shape[-1]
    out = qkv.new_empty(1, heads * channels)
    lib = cpu_build.library()
    if lib is None:
        raise RuntimeError(cpu_build.why_not())
    places = [tensor.data_ptr() for tensor in (qkv, cos_C, sin_C, turns)]
    lib.bitpress_attend_cache(
        *places, ctypes.addressof(keys), ctypes.addressof(values), out.data_ptr(), heads, kv_heads, channels, scale, torch.get_num_threads()
    )
    return out
