"""Packed matrices on a GPU: the words that the Triton kernels read, and how those are called. Knows tensors; which kernel runs is `dispatch`'s to say.

Triton is optional: `why_not` says why there are no such kernels, and nothing here fails to import. `Words` is built from the
canonical form and kept beside it. Shape letters: M batch, N outputs, K inputs, G groups a row, C chunks of 256 inputs.
"""

import functools
import importlib.util
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitpress.kernels.binary import unpack_binary
from bitpress.kernels.formats import PackedTensor, unpack_codes
from bitpress.kernels.layout import BinaryLayout, Layout, TableLayout, UniformLayout, words_of
from bitpress.kernels.tables import levels_of, unpack_table

CHUNK, SLOTS, SLOT = 256, 8, 32
PLANES = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (4, 4)}  # bits of a code's low and high plane
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # eight fields of so many bits
BIG = 0x4B000000  # the bits of the float32 2**23
TYPES = (torch.bfloat16, torch.float16)


@functools.cache
def why_not() -> str:
    """Why the Triton kernels cannot run in this process; empty when they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not torch.cuda.is_available() and not interpreted():
        return "there is no CUDA device"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "the Triton kernels need compute capability 8.0, whose tensor cores take bfloat16"
    return ""


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU, which is for tests only."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refusal(layout: Layout, columns: int, dtype: torch.dtype) -> str:
    """Why the Triton kernels do not take a matrix of `columns` inputs with activations of this type; empty when they do."""
    if not isinstance(layout, UniformLayout | TableLayout | BinaryLayout):
        return f"there is no Triton kernel for {words_of(layout)}"
    if layout.group_size % SLOT and 0 < layout.group_size < columns:
        return f"the Triton kernels take groups of a multiple of {SLOT}, not {layout.group_size}"
    if dtype not in TYPES:
        return f"the Triton kernels take bfloat16 and float16 inputs, not {str(dtype).removeprefix('torch.')}"
    return why_not()


@dataclass(frozen=True)
class Words:
    """A matrix as the Triton kernels read it.

    name: the layout, spelt out. kind: "uniform", "table" or "binary". shape: (N, K). low, high: words [C, N, 32] of a code's low and
    high bits, high empty where there are none; binary: planes uint8 [C, bits, N, 32]. scales [G, N]; binary: alphas [G, bits, N].
    zeros, shifts [G, N] or empty. table: float32 [16] or empty.
    """

    name: str
    kind: str
    bits: int
    group: int
    shape: tuple[int, int]
    low: Tensor
    high: Tensor
    scales: Tensor
    zeros: Tensor
    shifts: Tensor
    table: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(part.nbytes for part in (self.low, self.high, self.scales, self.zeros, self.shifts, self.table))

    @property
    def run(self) -> int:
        """Slots of a chunk that always share a group: the kernels add them up before they scale."""
        return math.gcd(self.group // SLOT, SLOTS)

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernels are compiled for."""
        low, high = PLANES[self.bits] if self.kind != "binary" else (1, 0)
        return {"KIND": ("uniform", "table", "binary").index(self.kind), "LOW": low, "HIGH": high, "PLANES": self.bits if self.kind == "binary" else 0,
                "MIDDLE": float(2 ** (self.bits - 1)), "ZEROS": bool(self.zeros.numel()), "WHOLE": self.zeros.dtype == torch.uint8,
                "INTERPRETED": interpreted()}  # fmt: skip


def words(packed: PackedTensor) -> Words:
    """A stored matrix in words. Raises ValueError for a layout that `refusal` names."""
    refused = refusal(packed.layout, packed.shape[1], torch.bfloat16) if isinstance(packed.layout, UniformLayout | TableLayout | BinaryLayout) else "it"
    if refused and refused != why_not():
        raise ValueError(f"A {packed.layout.name} matrix of shape {packed.shape} cannot be laid out for the Triton kernels: {refused}.")
    match packed.layout:
        case TableLayout():
            return _table_words(packed, packed.layout)
        case BinaryLayout():
            return _binary_words(packed, packed.layout)
    return _uniform_words(packed)


def _group(group_size: int, columns: int) -> int:
    """Inputs a group, a whole number of chunks where a group is the row."""
    return -(-columns // CHUNK) * CHUNK if group_size == 0 or group_size >= columns else group_size


def _uniform_words(packed: PackedTensor) -> Words:
    layout, zeros = packed.uniform, packed.zeros_NG
    codes_NK = unpack_codes(packed.tensors["codes"], layout.bits, packed.shape[1])
    none = codes_NK.new_empty(0)
    kept = none if zeros is None else zeros.T.contiguous()
    return Words(str(layout), "uniform", layout.bits, _group(layout.group_size, packed.shape[1]), packed.shape, *_planes(codes_NK, layout.bits),
                 packed.tensors["scales"].T.contiguous(), kept, none, none)  # fmt: skip


def _table_words(packed: PackedTensor, layout: TableLayout) -> Words:
    """Double scales become the float32 numbers that they stand for: the kernels know one kind of scale."""
    codes_NK, scales_NG = unpack_table(packed)
    none = codes_NK.new_empty(0)
    scales_GN = (scales_NG if layout.double_scales else packed.tensors["scales"]).T.contiguous()
    return Words(str(layout), "table", 4, _group(layout.group_size, packed.shape[1]), packed.shape, *_planes(codes_NK, 4), scales_GN, none, none,
                 levels_of(packed))  # fmt: skip


def _binary_words(packed: PackedTensor, layout: BinaryLayout) -> Words:
    plus_NBK, alphas_NGB, shifts_NG = unpack_binary(packed)
    planes = torch.stack([_plane(plus_NK.to(torch.uint8), 1) for plus_NK in plus_NBK.unbind(1)], 1)
    none = planes.new_empty(0)
    return Words(str(layout), "binary", layout.bits, _group(layout.group_size, packed.shape[1]), packed.shape, planes, none,
                 alphas_NGB.permute(1, 2, 0).contiguous(), none, shifts_NG.T.contiguous(), none)  # fmt: skip


def _planes(codes_NK: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    low, high = PLANES[bits]
    return _plane(codes_NK & ((1 << low) - 1), low), _plane(codes_NK >> low, high) if high else codes_NK.new_empty(0)


def _plane(fields_NK: Tensor, width: int) -> Tensor:
    """Fields of `width` bits as words [C, N, 32]."""
    rows, columns = fields_NK.shape
    slots = F.pad(fields_NK, (0, -columns % CHUNK)).view(rows, -1, SLOTS, SLOT).permute(2, 1, 0, 3)
    word = torch.zeros(slots.shape[1:], dtype=torch.int32, device=fields_NK.device)
    for slot in range(SLOTS):
        word |= slots[slot].int() << (width * slot)
    return word.to(WORDS[width])


@dataclass(frozen=True)
class Tile:
    """How a product is cut. outputs, batch: of a tile. splits: programs that share the inputs of one. scaled: weights are scaled before the product."""

    outputs: int = 32
    batch: int = 16
    splits: int = 1
    warps: int = 2
    stages: int = 3
    scaled: bool = False


def product(x_MK: Tensor, matrix: Words, tile: Tile) -> Tensor:
    """x_MK times the matrix, [M, N] in its type. x_MK: bfloat16 or float16, contiguous. Raises ValueError for other types or widths."""
    if x_MK.dtype not in TYPES or x_MK.shape[1] != matrix.shape[1]:
        raise ValueError(f"The Triton kernels take bfloat16 or float16 rows of {matrix.shape[1]}; got {x_MK.dtype} of {x_MK.shape[1]}.")
    (batch, columns), rows = x_MK.shape, matrix.shape[0]
    chunks = len(matrix.low)
    share = -(-chunks // min(tile.splits, chunks))
    splits = -(-chunks // share)
    grid = (-(-rows // tile.outputs), -(-batch // tile.batch), splits)
    y_MN = x_MK.new_empty(batch, rows)
    partials = x_MK.new_empty(splits * batch * rows if splits > 1 else 0, dtype=torch.float32)
    scaled = tile.scaled or matrix.kind == "table"  # a table's levels are no whole numbers
    _kernels().linear[grid](
        x_MK, y_MN, partials, _arrivals(x_MK.device, grid[0] * grid[1]), matrix.low, matrix.high, BIG, matrix.table, matrix.scales,
        matrix.zeros, matrix.shifts, batch, rows, columns, chunks, len(matrix.scales), matrix.group // SLOT, share, **matrix.constants,
        RUN=matrix.run, EVEN=columns % CHUNK == 0, SCALED=scaled, SPLITS=splits, BLOCK_N=tile.outputs, BLOCK_M=tile.batch,
        STAGES=1 if matrix.kind == "table" else tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return y_MN


def dequantize(matrix: Words, dtype: torch.dtype) -> Tensor:
    """The matrix that the words stand for, [N, K]: computed in float32, rounded to `dtype`."""
    (rows, columns), block = matrix.shape, 32
    out_NK = matrix.low.new_empty(rows, columns, dtype=dtype)
    _kernels().dequantize[(-(-rows // block), len(matrix.low))](
        out_NK, matrix.low, matrix.high, BIG, matrix.table, matrix.scales, matrix.zeros, matrix.shifts, rows, columns, len(matrix.scales),
        matrix.group // SLOT, **matrix.constants, BLOCK_N=block,
    )  # fmt: skip
    return out_NK


_counters: dict[torch.device, Tensor] = {}
_outgrown: list[Tensor] = []  # a captured graph may go on counting in them


def _arrivals(device: torch.device, tiles: int) -> Tensor:
    """Zeros to count the programs of a tile in; a kernel leaves them zero. One buffer a device, for one stream."""
    held = _counters.get(device)
    if held is None or len(held) < tiles:
        _outgrown.extend([] if held is None else [held])
        held = _counters[device] = torch.zeros(max(tiles, 1 << 14), dtype=torch.int32, device=device)
    return held


@functools.cache
def _kernels() -> Any:
    from bitpress.kernels import gpu_kernels

    return gpu_kernels
