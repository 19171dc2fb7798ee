"""Low-bit linear layers on the project's own C++ kernels: tile layout in, rows of activations through. Knows no model.

The layout and the arithmetic are described at the head of `cpu_lowbit.cpp`. Activations are rounded to 15-bit integers, one
scale a weight group, or to 8 or 4 bits where the scheme says so; weights, scales and zeros are used as stored. Results differ
from the float64 reference by less than a bfloat16 matmul does; a row with NaN or infinity comes out NaN.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from bitpress.kernels import cpu_build
from bitpress.kernels.formats import PackedTensor, unpack_codes
from bitpress.kernels.pages import together

TILE, CHUNK, QUADS = 16, 32, 8
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


@dataclass(frozen=True)
class Tiles:
    """A (outputs, inputs) matrix in tile layout. codes uint8, scales bf16 (tiles, groups, 16), zeros uint8 or bf16 like scales, or None."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group: int
    shape: tuple[int, int]

    def matmul(self, x_MK: Tensor) -> Tensor:
        """x_MK: bfloat16 or float32. Returns [M, N] in its dtype."""
        return panel_linear(x_MK, self) if cpu_build.panels(len(x_MK), x_MK.dtype) else linear(x_MK, self)

    def rounded_matmul(self, x_MK: Tensor, bits: int) -> Tensor:
        """The same with x rounded to 8 or 4 bits, one symmetric scale a row: half the dot products."""
        return linear(x_MK, self, activation_bits=bits)

    @cached_property
    def addresses(self) -> tuple[int, int, int, bool]:
        """Where codes, scales and zeros (0: none) are, and whether zeros are reals: asked for once, since a step passes hundreds."""
        zeros = self.zeros
        return self.codes.data_ptr(), self.scales.data_ptr(), 0 if zeros is None else zeros.data_ptr(), zeros is not None and zeros.dtype == torch.bfloat16

    @property
    def parts(self) -> list[Tensor]:
        """Codes, scales and, where they are stored, zeros."""
        return [part for part in (self.codes, self.scales, self.zeros) if part is not None]

    def moved(self, parts: list[Tensor]) -> "Tiles":
        """The same matrix with `parts` elsewhere in memory."""
        return replace(self, codes=parts[0], scales=parts[1], zeros=parts[2] if len(parts) > 2 else None)

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return sum(part.nbytes for part in self.parts)


def refusal(bits: int, group_size: int, in_features: int) -> str:
    """Why these kernels cannot take a matrix; empty when they can. A last group may be short."""
    if bits not in PLANES:
        return f"the C++ kernels have no {bits}-bit path"
    if group_size % CHUNK and 0 < group_size < in_features:
        return f"the C++ kernels take groups of a multiple of {CHUNK}, not {group_size}"
    return "" if cpu_build.library() else cpu_build.why_not() or "the C++ kernels are not available"


def tiles_of(packed: PackedTensor, abreast: int = 2) -> Tiles:
    """A stored matrix in tile layout."""
    layout = packed.uniform
    codes_NK = unpack_codes(packed.tensors["codes"], layout.bits, packed.shape[1])
    return tile(codes_NK, packed.tensors["scales"], packed.zeros_NG, layout.bits, layout.group_size, abreast)


def tile(codes_NK: Tensor, scales_NG: Tensor, zeros_NG: Tensor | None, bits: int, group_size: int, abreast: int = 2) -> Tiles:
    """Lay out codes (N, K) uint8, scales (N, G) and zeros (N, G) for the kernels. `group_size` 0 is the whole row.

    abreast: tiles that lie side by side, chunk by chunk.
    """
    outputs, inputs = codes_NK.shape
    padded = -(-inputs // CHUNK) * CHUNK
    group = padded if group_size == 0 or group_size >= inputs else group_size
    codes = torch.nn.functional.pad(codes_NK, (0, padded - inputs, 0, -outputs % (abreast * TILE)))
    by_tile = codes.view(-1, abreast, TILE, padded // CHUNK, QUADS, 4)
    quads = by_tile.permute(0, 3, 1, 4, 2, 5).reshape(-1, abreast * padded // CHUNK, QUADS, TILE * 4)
    zeros = None if zeros_NG is None else _by_tile(zeros_NG if zeros_NG.dtype == torch.bfloat16 else zeros_NG.to(torch.uint8))
    made = Tiles(_planes(quads, bits), _by_tile(scales_NG.to(torch.bfloat16)), zeros, bits, group, (outputs, inputs))
    return made.moved(together(made.parts))


def _by_tile(values_NG: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(values_NG, (0, 0, 0, -values_NG.shape[0] % TILE))
    return padded.view(-1, TILE, padded.shape[1]).transpose(1, 2).contiguous()


def _planes(quads: Tensor, bits: int) -> Tensor:
    """Bit planes of quads (pairs of tiles, chunks, 8, 64): each plane packs 8 / width quads into a byte."""
    parts, low = [], 0
    for width in PLANES[bits]:
        plane = (quads >> low) & ((1 << width) - 1)
        loads = plane.view(*quads.shape[:2], QUADS * width // 8, 8 // width, TILE * 4)
        shifts = torch.arange(8 // width, dtype=torch.uint8)[:, None] * width
        parts.append((loads << shifts).sum(-2, dtype=torch.uint8))
        low += width
    return torch.cat(parts, 2).contiguous()


def linear(x: Tensor, tiles: Tiles, bias: Tensor | None = None, activation_bits: int = 0) -> Tensor:
    """x (..., inputs) in bf16 or fp32 times the matrix: (..., outputs) in x's dtype. `bias` must be float32. activation_bits: 8 or 4 rounds x."""
    lib = cpu_build.library()
    if lib is None:
        raise RuntimeError(cpu_build.why_not())
    outputs, inputs = tiles.shape
    if x.dtype not in (torch.bfloat16, torch.float32) or x.shape[-1] != inputs:
        raise ValueError(f"The C++ kernels take bf16 or fp32 rows of {inputs}; got {x.dtype} of {x.shape[-1]}.")
    rows = x.reshape(-1, inputs).contiguous()
    out = torch.empty(rows.shape[0], outputs, dtype=x.dtype)
    lib.bitpress_linear(
        rows.data_ptr(), out.data_ptr(), x.dtype == torch.bfloat16, rows.shape[0], inputs, outputs, tiles.bits, tiles.group,
        activation_bits, *tiles.addresses, 0 if bias is None else bias.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out.view(*x.shape[:-1], outputs)


def panel_linear(x_MK: Tensor, tiles: Tiles) -> Tensor:
    """Many rows of bfloat16 x [M, K], contiguous, times the matrix through bfloat16 panels: [M, N]."""
    lib = cpu_build.library()
    if lib is None:
        raise RuntimeError(cpu_build.why_not())
    outputs, inputs = tiles.shape
    out = torch.empty(len(x_MK), outputs, dtype=torch.bfloat16)
    lib.bitpress_panel_linear(
        x_MK.data_ptr(), out.data_ptr(), len(x_MK), inputs, outputs, tiles.bits, tiles.group, *tiles.addresses, torch.get_num_threads(),
    )  # fmt: skip
    return out
