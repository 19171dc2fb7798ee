"""Low-rank matrices: a left factor (N, r) times a right one (r, K), each stored in a layout of its own. Knows bytes; multiplies nothing."""

from torch import Tensor

from bitpress.kernels.formats import PackedTensor
from bitpress.kernels.layout import DenseLayout, PairLayout


def dense(weight_NK: Tensor) -> PackedTensor:
    """A matrix stored as it is, for a factor that is not quantised."""
    return PackedTensor(DenseLayout(weight_NK.element_size()), (weight_NK.shape[0], weight_NK.shape[1]), {"weight": weight_NK.contiguous()})


def pack_pair(left: PackedTensor, right: PackedTensor, layout: PairLayout) -> PackedTensor:
    """Both factors as one matrix. Raises ValueError when their layouts or their common rank are not those of the layout."""
    shape = (left.shape[0], right.shape[1])
    rank = layout.rank(*shape)
    if (left.layout, right.layout) != (layout.left, layout.right):
        raise ValueError(f"Factors of {left.layout} and {right.layout} do not fit a pair of {layout.left} and {layout.right}.")
    if (left.shape[1], right.shape[0]) != (rank, rank):
        raise ValueError(f"Factors of shapes {left.shape} and {right.shape} do not fit: this layout keeps rank {rank}.")
    tensors = {f"left_{name}": tensor for name, tensor in left.tensors.items()} | {f"right_{name}": tensor for name, tensor in right.tensors.items()}
    return PackedTensor(layout, shape, tensors)
