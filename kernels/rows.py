"""Several linear layers on the same input as one product: q, k, v or gate, up. Knows dense and packed layers; not what they are for.

Joining copies nothing twice: the joined storage becomes the layers' own, each keeping its rows as a view. Layers that cannot
be joined (unlike schemes, a mask, another kind of module) are called one by one.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitpress.kernels.formats import can_concat, join_rows
from bitpress.kernels.packed import PackedLinear, fuse


class DenseRows:
    """y = x W^T + b for stacked nn.Linear layers. W is kept in `dtype`; other inputs are met by a cast of W for that call."""

    def __init__(self, linears: Sequence[nn.Linear], dtype: torch.dtype) -> None:
        self.weight_NK = _join_weights(linears, dtype)
        self.bias_N = None
        if any(linear.bias is not None for linear in linears):
            zeros = (linear.weight.new_zeros(len(linear.weight)) for linear in linears)
            self.bias_N = torch.cat([zero if linear.bias is None else linear.bias.detach() for linear, zero in zip(linears, zeros, strict=True)]).to(dtype)

    def __call__(self, x_MK: Tensor) -> Tensor:
        bias_N = None if self.bias_N is None else self.bias_N.to(x_MK.dtype)
        return F.linear(x_MK, self.weight_NK.to(x_MK.dtype), bias_N)

    @property
    def resident_bytes(self) -> int:
        """Bytes held, whether shared with the layers or not."""
        return self.weight_NK.nbytes


class PackedRows:
    """The same for packed layers of one layout."""

    def __init__(self, linears: Sequence[PackedLinear]) -> None:
        self.linear = fuse(linears) if len(linears) > 1 else linears[0]

    def __call__(self, x_MK: Tensor) -> Tensor:
        return self.linear.forward(x_MK)

    @property
    def resident_bytes(self) -> int:
        """Bytes held, the kernel's own layout included once it is built."""
        return self.linear.resident_bytes


class SeparateRows:
    """Any modules, one by one; the outputs are put side by side."""

    def __init__(self, parts: "Sequence[Rows | nn.Module]") -> None:
        self.parts = parts

    def __call__(self, x_MK: Tensor) -> Tensor:
        outputs = [_call(part, x_MK) for part in self.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    @property
    def resident_bytes(self) -> int:
        """Bytes held by the parts."""
        return sum(_bytes_of(part) for part in self.parts)


Rows = DenseRows | PackedRows | SeparateRows


def join(modules: Sequence[nn.Module], dtype: torch.dtype) -> Rows:
    """One product for these modules. dtype: the type dense weights are kept in; where they already are, they are shared and not copied."""
    if all(type(module) is nn.Linear for module in modules):
        return DenseRows(cast(Sequence[nn.Linear], modules), dtype)
    if all(isinstance(module, PackedLinear) for module in modules):
        linears = cast(Sequence[PackedLinear], modules)
        kinds = {(each.layout, each.bias is None, each.activation_bits, each.outliers) for each in linears}
        if len(linears) == 1 or (can_concat(linears[0].layout) and len(kinds) == 1):
            return PackedRows(linears)
    if len(modules) == 1:
        return SeparateRows(modules)
    return SeparateRows([join([module], dtype) for module in modules])


def _join_weights(linears: Sequence[nn.Linear], dtype: torch.dtype) -> Tensor:
    """Weights stacked in `dtype`. Parameters that have this type become views of the stack, in every model that shares them."""
    weights = [linear.weight for linear in linears]
    joined = join_rows([weight.detach().to(dtype) for weight in weights])
    if all(weight.dtype == dtype for weight in weights):
        start = 0
        for weight in weights:
            weight.data = joined[start : start + len(weight)]
            start += len(weight)
    return joined


def _call(part: Rows | nn.Module, x_MK: Tensor) -> Tensor:
    if not isinstance(part, nn.Module):
        return part(x_MK)
    own = next((tensor.dtype for tensor in part.parameters() if tensor.is_floating_point()), x_MK.dtype)
    return part(x_MK.to(own)).to(x_MK.dtype)


def _bytes_of(part: Rows | nn.Module) -> int:
    if isinstance(part, nn.Module):
        return sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))
    return part.resident_bytes
