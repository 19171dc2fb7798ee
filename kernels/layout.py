"""How a matrix is laid out in bytes: shapes and sizes of every stored format. Knows no values and imports no torch.

A *group* is a run of consecutive inputs of one output row that shares a scale (and a zero). A row that the group does
not divide ends in a short group. Codes of a row are bit-packed together, rows start on a byte.
"""

from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

BITS = (2, 3, 4, 5, 6, 8)
SCALE_BYTES = 2  # scales are stored as bfloat16


@dataclass(frozen=True)
class UniformLayout:
    """Evenly spaced levels: code c of a group stands for (c - zero) * scale.

    bits: code width. group_size: inputs a group, 0 for the whole row. symmetric: no zeros are stored, the zero is
    2**(bits - 1); otherwise one integer zero of `bits` bits a group is packed beside the scales.
    """

    bits: int
    group_size: int = 64
    symmetric: bool = False
    name: str = "uniform"

    def groups(self, in_features: int) -> int:
        """Groups in a row of `in_features` weights."""
        return 1 if self.group_size == 0 else ceil(in_features / self.group_size)

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Stored bytes of codes, scales and zeros of an (out_features, in_features) matrix."""
        groups = self.groups(in_features)
        codes = ceil(in_features * self.bits / 8)
        zeros = 0 if self.symmetric else ceil(groups * self.bits / 8)
        return out_features * (codes + zeros + groups * SCALE_BYTES)


@dataclass(frozen=True)
class DenseLayout:
    """Weights stored as they are, `itemsize` bytes each (2 for bfloat16)."""

    itemsize: int = 2
    name: str = "dense"

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Stored bytes of an (out_features, in_features) matrix."""
        return out_features * in_features * self.itemsize


Layout = UniformLayout | DenseLayout


def layout_to_dict(layout: Layout) -> dict[str, Any]:
    """Plain values, for a file's metadata."""
    return asdict(layout)


def layout_from_dict(values: dict[str, Any]) -> Layout:
    """Inverse of `layout_to_dict`. Raises ValueError for a name that no layout has."""
    kinds = {"uniform": UniformLayout, "dense": DenseLayout}
    if values.get("name") not in kinds:
        raise ValueError(f"Unknown layout {values.get('name')!r}; known: {', '.join(kinds)}.")
    return kinds[values["name"]](**values)
