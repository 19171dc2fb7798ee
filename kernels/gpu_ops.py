"""Products on a GPU that others bring: torch's int4, int8 and 2:4 ops, and bitsandbytes' NF4. Know their layouts; whether one is worth it is measured.

Each op says what it cannot take. `gpu_choice` holds every one against the oracle before it may be chosen.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitpress.kernels import cpu, reference
from bitpress.kernels.formats import PackedTensor, unpack_codes
from bitpress.kernels.layout import DenseLayout, Layout, TableLayout, TwoFourLayout, UniformLayout
from bitpress.kernels.tables import levels

INT4_GROUPS, INT4_INNER = (32, 64, 128, 256), 8  # the op's groups; 16-wide tiles of inputs that a thread unpacks
TILE = 64  # rows and columns that the 2:4 op takes in multiples


@dataclass(frozen=True)
class Op:
    """refusal(layout, shape, dtype): why not, or empty. form(packed): the matrix in the op's layout."""

    refusal: Callable[[Layout, tuple[int, int], torch.dtype], str]
    form: Callable[[PackedTensor], Any]


@dataclass(frozen=True)
class OpForm:
    """A matrix in an op's layout: the call, and what it reads."""

    call: Callable[[Tensor], Tensor]
    held: tuple[Tensor, ...]

    def matmul(self, x_MK: Tensor) -> Tensor:
        """[M, N] in the type of x_MK."""
        return self.call(x_MK)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(tensor.nbytes for tensor in self.held)


def _refuse_int4(layout: Layout, shape: tuple[int, int], dtype: torch.dtype) -> str:
    if not isinstance(layout, UniformLayout) or layout.bits != 4 or dtype != torch.bfloat16:
        return "torch's int4 op takes uniform 4-bit codes and bfloat16 inputs"
    if layout.group_size not in INT4_GROUPS or shape[1] % max(layout.group_size, 16 * INT4_INNER) or shape[0] % 8:
        return f"torch's int4 op takes groups of {', '.join(map(str, INT4_GROUPS))} that divide a row, not {layout.group_size} of {shape[1]}"
    return ""


def _int4(packed: PackedTensor) -> OpForm:
    """The op stands for scale * (code - 8) + zero; the zero term is rounded so that errors along a row do not add up."""
    layout = packed.uniform
    codes_NK = unpack_codes(packed.tensors["codes"], 4, packed.shape[1])
    scales_NG, zeros_NG = packed.tensors["scales"].float(), packed.zeros_NG
    terms = torch.zeros_like(scales_NG) if zeros_NG is None else cpu.diffuse(scales_NG * (8 - zeros_NG.float()))
    pairs = torch.stack((scales_NG, terms), -1).bfloat16().transpose(0, 1).contiguous()
    codes = torch.ops.aten._convert_weight_to_int4pack((codes_NK[:, ::2] << 4 | codes_NK[:, 1::2]).contiguous(), INT4_INNER)
    return OpForm(lambda x_MK: torch.ops.aten._weight_int4pack_mm(x_MK, codes, layout.group_size, pairs), (codes, pairs))


def _refuse_int8(layout: Layout, shape: tuple[int, int], dtype: torch.dtype) -> str:
    fits = isinstance(layout, UniformLayout) and layout.bits == 8 and layout.symmetric and layout.groups(shape[1]) == 1 and dtype == torch.bfloat16
    return "" if fits else "torch's int8 op takes symmetric 8-bit codes with one scale a row and bfloat16 inputs"


def _refuse_two_four(layout: Layout, shape: tuple[int, int], dtype: torch.dtype) -> str:
    if not isinstance(layout, TwoFourLayout) or not isinstance(layout.values, DenseLayout):
        return "the sparse tensor cores take 2:4 matrices of plain values"
    return "" if not shape[0] % TILE and not shape[1] % TILE else f"the sparse tensor cores take multiples of {TILE} outputs and inputs"


def _two_four(packed: PackedTensor) -> OpForm:
    dense_NK = reference.dequantize(packed, torch.bfloat16)
    sparse: Any = torch.sparse.to_sparse_semi_structured(dense_NK)
    return OpForm(lambda x_MK: F.linear(x_MK.bfloat16(), sparse).to(x_MK.dtype), (packed.part("values").tensors["weight"], packed.tensors["places"]))


def _refuse_bitsandbytes(layout: Layout, shape: tuple[int, int], dtype: torch.dtype) -> str:
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    fits = isinstance(layout, TableLayout) and layout.table == "nf4" and not layout.double_scales
    whole = isinstance(layout, TableLayout) and layout.group_size in (64, 128, 256) and not shape[1] % layout.group_size
    return "" if fits and whole else "bitsandbytes takes NF4 with groups of 64, 128 or 256 that divide a row"


def _bitsandbytes(packed: PackedTensor) -> OpForm:
    import bitsandbytes

    layout = packed.layout
    assert isinstance(layout, TableLayout)
    codes_NK = unpack_codes(packed.tensors["codes"], 4, packed.shape[1])
    pairs = (codes_NK[:, ::2] << 4 | codes_NK[:, 1::2]).reshape(-1, 1).contiguous()
    scales = packed.tensors["scales"].float().flatten()
    state = bitsandbytes.functional.QuantState(absmax=scales, shape=torch.Size(packed.shape), code=levels("nf4").to(packed.device),
                                               blocksize=layout.group_size, quant_type="nf4", dtype=torch.bfloat16)  # fmt: skip
    return OpForm(functools.partial(_bitsandbytes_product, pairs=pairs, state=state), (pairs, scales))


def _bitsandbytes_product(x_MK: Tensor, pairs: Tensor, state: Any) -> Tensor:
    import bitsandbytes

    state.dtype = x_MK.dtype
    return bitsandbytes.matmul_4bit(x_MK, pairs.t(), quant_state=state)


OPS: dict[str, Op] = {
    "torch int4": Op(_refuse_int4, _int4),
    "torch int8": Op(_refuse_int8, cpu.int8_form),
    "torch 2:4": Op(_refuse_two_four, _two_four),
    "bitsandbytes": Op(_refuse_bitsandbytes, _bitsandbytes),
}
