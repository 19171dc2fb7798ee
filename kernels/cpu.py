"""Products with packed weights on a CPU: torch's int4 and int8 pack ops in layouts that fit them, a fast dequantise, plain weights.

Knows how to lay codes out for an op and how to call it; which one a layer should use is `dispatch`'s to say. Both ops are
fast with bfloat16 activations only, multiply with float32 accumulation, and read their own layout of the codes, kept in
memory beside the canonical one (which larger batches dequantise). Shape letters: M batch, N outputs, K inputs, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bitpress.kernels import reference
from bitpress.kernels.formats import PackedTensor, unpack_codes
from bitpress.kernels.layout import UniformLayout

INT4_GROUPS = (256, 128, 64, 32)  # what the int4 op takes
INT4_ROWS = 16  # it works on blocks of 16 outputs
INT8_LANE = 16  # the int8 op reads 16 inputs at a time and has no tail
ALIGNMENT = 64  # bytes; the int8 op loads activations with aligned instructions
CHUNK = 1 << 20  # weights dequantised at a time: 4 MiB of float32, which a second-level or shared cache holds
SCRATCH = 1 << 23  # weights of a dequantised copy at most; a larger matrix is multiplied in slices of rows


@dataclass(frozen=True)
class Int4Form:
    """A matrix for the int4 op. codes: in the op's own order. group: inputs that share a scale there. pairs: bfloat16 [G, N, 2], scale and zero.

    pad: zero inputs to append. split: the codes are wider than 4 bits and lie as [high nibbles | low nibbles] along K.
    """

    codes: Tensor
    group: int
    pairs: Tensor
    pad: int
    split: bool

    def matmul(self, x_MK: Tensor) -> Tensor:
        """x_MK: bfloat16, contiguous. Returns bfloat16 [M, N]. Both nibbles of a split matrix add up in float32 within one call."""
        if self.pad:
            x_MK = F.pad(x_MK, (0, self.pad))
        if self.split:
            x_MK = torch.cat((x_MK, x_MK), dim=1)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x_MK, self.codes, self.group, self.pairs)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return self.codes.nbytes + self.pairs.nbytes


@dataclass(frozen=True)
class Int8Form:
    """A matrix for the int8 op. codes: int8 [N, K], the code less 128. scales: bfloat16 [N]."""

    codes: Tensor
    scales: Tensor

    def matmul(self, x_MK: Tensor) -> Tensor:
        """x_MK: bfloat16, contiguous. Returns bfloat16 [M, N]."""
        if x_MK.data_ptr() % ALIGNMENT:
            x_MK = x_MK.clone()
        return torch._weight_int8pack_mm(x_MK, self.codes, self.scales)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return self.codes.nbytes + self.scales.nbytes


@dataclass(frozen=True)
class DenseForm:
    """A matrix that is stored as it is, shared with the layer. weight: [N, K]."""

    weight: Tensor

    def matmul(self, x_MK: Tensor) -> Tensor:
        """x_MK: any float type. Returns [M, N] in its type."""
        return F.linear(x_MK, self.weight.to(x_MK.dtype))

    @property
    def nbytes(self) -> int:
        """Bytes held beside the stored ones."""
        return 0


def int4_group(layout: UniformLayout, columns: int) -> int | None:
    """The largest group of the int4 op into which every stored group splits, short last one included; None if there is none.

    Inputs are counted after padding to a multiple of 32.
    """
    padded = columns + _padding(columns)
    span = layout.group_size or padded
    return next((group for group in INT4_GROUPS if span % group == 0 and padded % group == 0), None)


def _padding(columns: int) -> int:
    return -columns % INT4_GROUPS[-1]


def int4_form(packed: PackedTensor) -> Int4Form:
    """Lay a matrix out for the int4 op. Raises ValueError where `int4_group` finds no group or N is not a multiple of 16.

    The op stands for `scale * (code - 8) + zero`. Up to 3 bits, `code - zero + 8` fits a slot, so the zero term vanishes and
    nothing is lost to its rounding; at 4 bits it is `scale * (8 - zero)`, rounded by `diffuse`. Wider codes become two 4-bit
    matrices: with value v = code - zero + c written as 16 high + low, w = 16s(high - 8) + s(low - 8) + s(136 - c).
    """
    layout, (rows, columns) = packed.uniform, packed.shape
    group = int4_group(layout, columns)
    if group is None or rows % INT4_ROWS:
        raise ValueError(f"The int4 op takes no {rows} x {columns} matrix with groups of {layout.group_size}.")
    values_NK, zeros_NG = _centred(packed)
    scales_NG, zeros_NG = (_per_kernel_group(part, layout, columns, group) for part in (packed.tensors["scales"].float(), zeros_NG))
    split = layout.bits > 4
    if split:
        codes = torch.cat((values_NK >> 4, values_NK & 15), dim=1)
        terms = scales_NG * zeros_NG
        rounded = terms.bfloat16().float()  # what rounding loses of it goes into the second slot
        pairs = torch.stack((torch.cat((16 * scales_NG, scales_NG), 1), torch.cat((rounded, terms - rounded), 1)), dim=-1)
    else:
        codes, pairs = values_NK, torch.stack((scales_NG, diffuse(scales_NG * zeros_NG)), dim=-1)
    op_codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return Int4Form(op_codes, group, pairs.bfloat16().transpose(0, 1).contiguous(), _padding(columns), split)


def _centred(packed: PackedTensor) -> tuple[Tensor, Tensor]:
    """(values [N, padded K] as uint8, what is left of the zero term in scales [N, G]) for the int4 op's 4- or 8-bit slots."""
    bits, columns = packed.uniform.bits, packed.shape[1]
    codes_NK = unpack_codes(packed.tensors["codes"], bits, columns)
    zeros_NG = packed.zeros_NG
    if zeros_NG is None:
        zeros_NG = torch.full_like(packed.tensors["scales"], 2 ** (bits - 1), dtype=torch.uint8)
    middle = 8 if bits <= 4 else 136
    if bits in (4, 8):  # every slot value is taken: the codes stay as they are
        left_NG = middle - zeros_NG.float()
    else:
        codes_NK = codes_NK + (middle - expand_groups(zeros_NG, packed.uniform, columns))
        left_NG = torch.zeros_like(zeros_NG, dtype=torch.float32)
    return F.pad(codes_NK, (0, _padding(columns))), left_NG


def expand_groups(values_NG: Tensor, layout: UniformLayout, columns: int) -> Tensor:
    """One value an input, [N, K], from one value a group."""
    return values_NG.repeat_interleave(layout.group_size or columns, dim=1)[:, :columns]


def _per_kernel_group(values_NG: Tensor, layout: UniformLayout, columns: int, group: int) -> Tensor:
    """One value for each of the op's groups, [N, padded K / group]."""
    padded = columns + _padding(columns)
    return values_NG.repeat_interleave((layout.group_size or padded) // group, dim=1)[:, : padded // group]


def diffuse(terms_NG: Tensor) -> Tensor:
    """Round to bfloat16 from left to right, each group taking on what the one before it lost.

    A zero term acts on the sum of a group's inputs. Plain rounding repeats its error in every group, and inputs with a mean
    add it up; here the errors of a row sum to less than one rounding.
    """
    out, lost = torch.empty_like(terms_NG), torch.zeros_like(terms_NG[:, 0])
    for group in range(terms_NG.shape[1]):
        wanted = terms_NG[:, group] + lost
        out[:, group] = wanted.bfloat16()
        lost = wanted - out[:, group]
    return out


def int8_form(packed: PackedTensor) -> Int8Form:
    """Lay an 8-bit, row-symmetric matrix out for the int8 op."""
    return Int8Form((packed.tensors["codes"] ^ 128).view(torch.int8), packed.tensors["scales"][:, 0].contiguous())


def dense_form(packed: PackedTensor) -> DenseForm:
    """A plain matrix as it lies."""
    return DenseForm(packed.tensors["weight"])


def dequantize(packed: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix that the codes stand for, [N, K]: the same values as `reference.dequantize`, uniform ones in chunks that stay in the cache."""
    if not isinstance(packed.layout, UniformLayout) or dtype == torch.float64:
        return reference.dequantize(packed, dtype)
    rows, columns = packed.shape
    out = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        _dequantize_into(out[start:stop], packed.rows(start, stop))
    return out


def _dequantize_into(out_NK: Tensor, packed: PackedTensor) -> None:
    layout, columns = packed.uniform, packed.shape[1]
    values_NK = out_NK if out_NK.dtype == torch.float32 else torch.empty(packed.shape, device=out_NK.device)
    values_NK.copy_(unpack_codes(packed.tensors["codes"], layout.bits, columns))
    zeros_NG = packed.zeros_NG
    if zeros_NG is None:
        values_NK.sub_(2 ** (layout.bits - 1))
    else:
        _by_group(values_NK, zeros_NG.float(), layout.group_size or columns, Tensor.sub_)
    _by_group(values_NK, packed.tensors["scales"].float(), layout.group_size or columns, Tensor.mul_)
    if values_NK is not out_NK:
        out_NK.copy_(values_NK)


def _by_group(values_NK: Tensor, operands_NG: Tensor, group: int, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Apply an in-place operation with one operand a group; the last group of a row may be short."""
    full = values_NK.shape[1] // group
    if full:
        operation(values_NK[:, : full * group].unflatten(1, (full, group)), operands_NG[:, :full, None])
    if values_NK.shape[1] > full * group:
        operation(values_NK[:, full * group :], operands_NG[:, full:])


def dequantized_matmul(x_MK: Tensor, packed: PackedTensor) -> Tensor:
    """x_MK times the dequantised matrix, [M, N] in the dtype of x_MK. Never holds more than SCRATCH dequantised weights (or one row)."""
    rows, columns = packed.shape
    step = max(1, SCRATCH // columns)
    if step >= rows:
        return F.linear(x_MK, dequantize(packed, x_MK.dtype))
    y_MN = x_MK.new_empty(len(x_MK), rows)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        y_MN[:, start:stop] = F.linear(x_MK, dequantize(packed.rows(start, stop), x_MK.dtype))
    return y_MN
