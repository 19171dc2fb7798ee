"""Layers whose weights really are packed codes. Know how to multiply and to look up; not how the codes were chosen.

The canonical tensors are the truth: they are what is stored, counted and dequantised. A kernel's own layout is built from
them when a small batch first needs it, and forgotten when the layer moves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from bitpress.kernels import cpu, cpu_coded, cpu_lowbit, dispatch, gpu_choice, gpu_ops
from bitpress.kernels.activations import quantize_rows
from bitpress.kernels.formats import PackedTensor, concat
from bitpress.kernels.layout import PairLayout, words_of


class Form(Protocol):
    """A matrix in the layout of one kernel."""

    def matmul(self, x_MK: Tensor) -> Tensor:
        """x_MK: contiguous, in a type that the kernel takes. Returns [M, N] in it."""

    @property
    def nbytes(self) -> int:
        """Bytes held beside the stored ones."""


class _Packed(nn.Module):
    """Canonical tensors as buffers that move between devices and are never cast: their types are the format."""

    def __init__(self, packed: PackedTensor) -> None:
        super().__init__()
        self.layout, self.shape = packed.layout, packed.shape
        self._names = tuple(packed.tensors)
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, tensor)

    @property
    def packed(self) -> PackedTensor:
        """The canonical form; shares this layer's storage."""
        return PackedTensor(self.layout, self.shape, {name: tensor for name in self._names if (tensor := self._buffers[name]) is not None})

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.packed.device

    @property
    def stored_bytes(self) -> int:
        """Canonical bytes of codes, scales and zeros; a bias is dense and counted elsewhere."""
        return self.packed.nbytes

    @property
    def resident_bytes(self) -> int:
        """Bytes that the layer holds in memory now, a kernel's own layout included."""
        return self.stored_bytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix that the codes stand for, [N, K]."""
        return cpu.dequantize(self.packed, dtype)

    def hold(self, packed: PackedTensor) -> None:
        """Keep these tensors instead: the same values in another storage (rows of a joined matrix)."""
        for name, tensor in packed.tensors.items():
            self._buffers[name] = tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = self.packed.tensors
        super()._apply(fn, recurse)
        device = self.device  # `fn` moves and casts: the place is kept, the type is not
        for name, tensor in kept.items():
            self._buffers[name] = tensor.to(device)
        return self


class PackedLinear(_Packed):
    """y = x W^T + b with W packed, in whatever layout. Same inputs, same bits out.

    packed: W of shape (N, K). bias: [N] or None. activation_bits: 8 or 4 rounds every row of x as it comes, None leaves x alone.
    outliers: with it, columns of x in which a number is as large as this are not rounded (LLM.int8(), METHODS 15.5).
    """

    def __init__(self, packed: PackedTensor, bias: Tensor | None = None, activation_bits: int | None = None, outliers: float | None = None) -> None:
        super().__init__(packed)
        self.out_features, self.in_features = packed.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.activation_bits, self.outliers = activation_bits, outliers
        self._forms: dict[Callable[[PackedTensor], Form], Form] = {}  # of its kernels; some share a layout
        self._kernels: dict[tuple[int, torch.dtype], str] = {}  # a decode step asks thousands of times

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] in a float type. Returns [..., N] in the same type."""
        x_MK = x.reshape(-1, self.in_features).contiguous()
        if not len(x_MK):
            return x.new_zeros(*x.shape[:-1], self.out_features)
        y_MN = self._product(x_MK) if self.activation_bits is None else self._mixed_product(x_MK, self.activation_bits)
        if self.bias is not None:
            y_MN = y_MN + self.bias.to(y_MN.dtype)
        return y_MN.view(*x.shape[:-1], self.out_features)

    def _product(self, x_MK: Tensor) -> Tensor:
        kernel = self._kernels.get((len(x_MK), x_MK.dtype)) or self._choose(len(x_MK), x_MK.dtype)
        return cpu.dequantized_matmul(x_MK, self.packed) if kernel == dispatch.DEQUANTIZE else self.form(kernel).matmul(x_MK)

    def _mixed_product(self, x_MK: Tensor, bits: int) -> Tensor:
        """The rounded product, and beside it the plain one of the columns that hold outliers."""
        large_K = None if self.outliers is None else (x_MK.abs() >= self.outliers).any(0)
        if large_K is None or not bool(large_K.any()):
            return self._rounded_product(x_MK, bits)
        return self._rounded_product(x_MK.masked_fill(large_K, 0.0), bits) + self._product(x_MK.masked_fill(~large_K, 0.0))

    def _rounded_product(self, x_MK: Tensor, bits: int) -> Tensor:
        """The C++ kernels round by themselves. Elsewhere: levels are whole numbers that every float type holds; their scale comes in afterwards."""
        kernel = self._kernels.get((len(x_MK), x_MK.dtype)) or self._choose(len(x_MK), x_MK.dtype)
        if kernel == dispatch.LOWBIT and isinstance(form := self.form(kernel), cpu_lowbit.Tiles):
            return form.rounded_matmul(x_MK, bits)
        levels_MK, scale_M1 = quantize_rows(x_MK, bits)
        return (self._product(levels_MK.to(x_MK.dtype)) * scale_M1).to(x_MK.dtype)

    def _choose(self, batch: int, dtype: torch.dtype) -> str:
        return self._kernels.setdefault((batch, dtype), self.kernel_for(batch, dtype).kernel)

    def kernel_for(self, batch: int, dtype: torch.dtype = torch.bfloat16) -> dispatch.Choice:
        """What runs for activations [batch, K] of this type, and why."""
        return dispatch.choose(self.layout, self.shape, self.device, dtype, batch, self.activation_bits)

    @property
    def kernel(self) -> str:
        """What runs in decoding: one row of bfloat16 activations."""
        return self.kernel_for(1).kernel

    @property
    def reason(self) -> str:
        """Why that kernel, and why not a faster one."""
        return self.kernel_for(1).reason

    def form(self, kernel: str) -> Form:
        """The matrix in the layout of a kernel, built at the first call."""
        builder = FORMS[kernel]
        if builder not in self._forms:
            self._forms[builder] = builder(self.packed)
        return self._forms[builder]

    def settle(self, kernel: str, form: Form) -> None:
        """Keep this form, the same values elsewhere in memory."""
        self._forms[FORMS[kernel]] = form

    @property
    def resident_bytes(self) -> int:
        """Bytes that the layer holds in memory now: canonical ones and, once a small batch was multiplied, the kernel's layout."""
        return self.stored_bytes + sum(form.nbytes for form in self._forms.values())

    def extra_repr(self) -> str:
        """Shape and layout, for `print(model)`."""
        return f"{self.in_features} -> {self.out_features}, {words_of(self.layout)}, {self.kernel}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._forms.clear()
        self._kernels.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forms.clear()
        super()._load_from_state_dict(*args, **kwargs)


def fuse(linears: Sequence[PackedLinear]) -> PackedLinear:
    """One layer for several with the same inputs and layout (q, k, v; gate, up). The parts go on working as rows of its storage.

    Raises ValueError when inputs, layouts, activation widths or the presence of a bias differ.
    """
    if len({(linear.bias is None, linear.activation_bits, linear.outliers) for linear in linears}) > 1:
        raise ValueError("Layers with and without a bias, or with unlike activations, cannot be joined.")
    packed = concat([linear.packed for linear in linears])
    start = 0
    for linear in linears:
        linear.hold(packed.rows(start, start + linear.out_features))
        start += linear.out_features
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    return PackedLinear(packed, torch.cat(biases) if biases else None, linears[0].activation_bits, linears[0].outliers)


@dataclass(frozen=True)
class PairForm:
    """A low-rank matrix as two layers on its own storage, beside a third where their product is added to one."""

    left: PackedLinear
    right: PackedLinear
    base: PackedLinear | None = None

    def matmul(self, x_MK: Tensor) -> Tensor:
        """x_MK: any float type. Returns [M, N] in its type."""
        product_MN = self.left(self.right(x_MK))
        return product_MN if self.base is None else self.base(x_MK) + product_MN

    @property
    def nbytes(self) -> int:
        """Bytes held beside the stored ones."""
        return sum(layer.resident_bytes - layer.stored_bytes for layer in (self.left, self.right, self.base) if layer is not None)


def _pair_form(packed: PackedTensor) -> PairForm:
    base = PackedLinear(packed.part("base")) if isinstance(packed.layout, PairLayout) and packed.layout.base else None
    return PairForm(PackedLinear(packed.part("left")), PackedLinear(packed.part("right")), base)


FORMS: dict[str, Callable[[PackedTensor], Form]] = {
    dispatch.LOWBIT: cpu_lowbit.tiles_of,
    dispatch.INT4: cpu.int4_form,
    dispatch.INT4_SPLIT: cpu.int4_form,
    dispatch.INT8: cpu.int8_form,
    dispatch.DENSE: cpu.dense_form,
    dispatch.PAIR: _pair_form,
    dispatch.TABLE: cpu_coded.table_tiles,
    dispatch.BINARY: cpu_coded.binary_tiles,
    dispatch.BITMAP: cpu_coded.bitmap_rows,
    dispatch.TWO_FOUR: cpu_coded.two_four_form,
    gpu_choice.TRITON: gpu_choice.GpuForm.of,
    gpu_choice.TRITON_DENSE: gpu_choice.GpuForm.of,
    **{name: op.form for name, op in gpu_ops.OPS.items()},
}


class PackedEmbedding(_Packed):
    """An embedding of packed rows. dtype: what it returns, the type the model computes in."""

    def __init__(self, packed: PackedTensor, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(packed)
        self.num_embeddings, self.embedding_dim = packed.shape
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """ids: integers [...]. Returns [..., K] in `dtype`; only the named rows are dequantised."""
        rows = cpu.dequantize(self.packed.take(ids.reshape(-1)), self.dtype)
        return rows.view(*ids.shape, self.embedding_dim)

    def head(self, bias: Tensor | None = None) -> PackedLinear:
        """The tied output head: a layer on the same storage."""
        return PackedLinear(self.packed, bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype  # casting the model casts what it returns
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Shape and layout, for `print(model)`."""
        return f"{self.num_embeddings} x {self.embedding_dim}, {words_of(self.layout)}"
