"""Low-rank matrices: a left factor (N, r) times a right one (r, K), each stored in a layout of its own. Knows bytes; multiplies nothing."""

from torch import Tensor

from bitpress.kernels.formats import PackedTensor
from bitpress.kernels.layout import DenseLayout, PairLayout


def dense(weight_NK: Tensor) -> PackedTensor:
    """A matrix stored as it is, for a factor that is not quantised."""
    return PackedTensor(DenseLayout(weight_NK.element_size()), (weight_NK.shape[0], weight_NK.shape[1]), {"weight": weight_NK.contiguous()})


def pack_pair(left: PackedTensor, right: PackedTensor, layout: PairLayout, base: PackedTensor | None = None) -> PackedTensor:
    """Both factors, and the matrix to which they are added, as one. Raises ValueError when layouts or the common rank are not those of the layout."""
    shape = (left.shape[0], right.shape[1])
    rank = layout.rank(*shape)
    if (left.layout, right.layout) != (layout.left, layout.right):
        raise ValueError(f"Factors of {left.layout} and {right.layout} do not fit a pair of {layout.left} and {layout.right}.")
    if (base.layout if base else None) != layout.base or (base is not None and base.shape != shape):
        raise ValueError(f"What the factors are added to does not fit: this layout has {layout.base} of shape {shape}.")
    if (left.shape[1], right.shape[0]) != (rank, rank):
        raise ValueError(f"Factors of shapes {left.shape} and {right.shape} do not fit: this layout keeps rank {rank}.")
    tensors = {f"left_{name}": tensor for name, tensor in left.tensors.items()} | {f"right_{name}": tensor for name, tensor in right.tensors.items()}
    tensors |= {f"base_{name}": tensor for name, tensor in base.tensors.items()} if base else {}
    return PackedTensor(layout, shape, tensors)
