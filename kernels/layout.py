"""How a matrix is laid out in bytes: shapes and sizes of every stored format. Knows no values and imports no torch.

A *group* is a run of consecutive inputs of one output row that shares a scale (and a zero). A row that the group does
not divide ends in a short group. Codes of a row are bit-packed together, rows start on a byte. A layout
is a frozen record: its `name` and fields are what a file keeps of it, and `nbytes` needs nothing but a shape.
"""

from dataclasses import asdict, dataclass
from math import ceil, floor
from typing import Any

BITS = (2, 3, 4, 5, 6, 8)
SCALE_BYTES = 2  # scales are stored as bfloat16
TABLES = ("nf4", "fp4", "codebook")
LEVEL_COUNT = 16  # of a table
SUPER_GROUP = 256  # scales that share a scale of their own when scales are stored as codes
NEAR = 1e-9  # a share times a count is not cut down a whole for the rounding of the product


def group_count(group_size: int, in_features: int) -> int:
    """Groups in a row of `in_features` weights; `group_size` 0 is the whole row."""
    return 1 if group_size == 0 else ceil(in_features / group_size)


@dataclass(frozen=True)
class UniformLayout:
    """Evenly spaced levels: code c of a group stands for (c - zero) * scale.

    bits: code width. group_size: inputs a group, 0 for the whole row. symmetric: no zeros are stored, the zero is
    2**(bits - 1); otherwise one zero a group: an integer of `bits` bits, packed beside the scales, or, where `zero` is
    "float", a bfloat16 number that need not be a level.
    """

    bits: int
    group_size: int = 64
    symmetric: bool = False
    zero: str = "integer"
    name: str = "uniform"

    def groups(self, in_features: int) -> int:
        """Groups in a row of `in_features` weights."""
        return group_count(self.group_size, in_features)

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Stored bytes of codes, scales and zeros of an (out_features, in_features) matrix."""
        groups = self.groups(in_features)
        codes = ceil(in_features * self.bits / 8)
        zeros = 0 if self.symmetric else groups * SCALE_BYTES if self.zero == "float" else ceil(groups * self.bits / 8)
        return out_features * (codes + zeros + groups * SCALE_BYTES)


@dataclass(frozen=True)
class DenseLayout:
    """Weights stored as they are, `itemsize` bytes each (2 for bfloat16)."""

    itemsize: int = 2
    name: str = "dense"

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Stored bytes of an (out_features, in_features) matrix."""
        return out_features * in_features * self.itemsize


@dataclass(frozen=True)
class TableLayout:
    """Sixteen levels in [-1, 1]: code c of a group stands for table[c] * scale, the scale being the group's largest |w|.

    table: "nf4" or "fp4", fixed levels, or "codebook": the matrix has levels of its own, stored beside the codes. double_scales: the scales
    are 8-bit codes themselves, with one bfloat16 scale for every 256 of a row.
    """

    table: str
    group_size: int = 64
    double_scales: bool = False
    name: str = "table"

    @property
    def own_levels(self) -> bool:
        """Whether the levels are stored with the matrix."""
        return self.table == "codebook"

    def groups(self, in_features: int) -> int:
        """Groups in a row of `in_features` weights."""
        return group_count(self.group_size, in_features)

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Stored bytes of codes and scales, and of levels that are the matrix's own."""
        groups = self.groups(in_features)
        scales = groups + SCALE_BYTES * ceil(groups / SUPER_GROUP) if self.double_scales else groups * SCALE_BYTES
        return out_features * (ceil(in_features / 2) + scales) + (LEVEL_COUNT * SCALE_BYTES if self.own_levels else 0)


@dataclass(frozen=True)
class BinaryLayout:
    """Binary-coded levels: a weight is shift + sum over `bits` planes of +alpha or -alpha, one alpha a plane and group, one shift a group."""

    bits: int
    group_size: int = 64
    name: str = "binary"

    def groups(self, in_features: int) -> int:
        """Groups in a row of `in_features` weights."""
        return group_count(self.group_size, in_features)

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Stored bytes of planes, alphas and shifts."""
        return out_features * (self.bits * ceil(in_features / 8) + self.groups(in_features) * SCALE_BYTES * (self.bits + 1))


@dataclass(frozen=True)
class BitmapLayout:
    """Weights that are not zero, in order, `itemsize` bytes each, beside one bit a weight that says where they are.

    ratio: the share of zeros that counts. There is room for what it leaves of each row, rounded up, whatever the rows
    hold; a matrix with more zeros fills the room with some of them.
    """

    ratio: float
    itemsize: int = 2
    name: str = "bitmap"

    def kept(self, out_features: int, in_features: int) -> int:
        """Values stored of an (out_features, in_features) matrix."""
        return out_features * (in_features - floor(self.ratio * in_features + NEAR))

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Stored bytes of bitmap and values."""
        return out_features * ceil(in_features / 8) + self.itemsize * self.kept(out_features, in_features)


@dataclass(frozen=True)
class TwoFourLayout:
    """Two of every four consecutive inputs, with a 2-bit place each. The values are an (N, K / 2) matrix of a layout of their own."""

    values: UniformLayout | DenseLayout
    name: str = "2:4"

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Stored bytes of values and places."""
        return self.values.nbytes(out_features, in_features // 2) + out_features * ceil(in_features / 8)


FactorLayout = UniformLayout | DenseLayout | TableLayout | BinaryLayout


@dataclass(frozen=True)
class PairLayout:
    """A matrix as a product of two: left (N, r) times right (r, K), each in a layout of its own.

    keep: share of the break-even rank. exact: the rank itself where it is not 0, and keep says nothing. base: a matrix (N, K) to which the
    product is added, if there is one.
    """

    keep: float
    left: FactorLayout
    right: FactorLayout
    exact: int = 0
    name: str = "pair"
    base: FactorLayout | None = None

    def rank(self, out_features: int, in_features: int) -> int:
        """r for an (out_features, in_features) matrix: the share of NK / (N + K), rounded down, at least 1 (METHODS 17.1)."""
        if self.exact:
            return self.exact
        return max(1, floor(self.keep * out_features * in_features / (out_features + in_features) + NEAR))

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Stored bytes of both factors and of what they are added to."""
        rank = self.rank(out_features, in_features)
        beside = self.base.nbytes(out_features, in_features) if self.base else 0
        return beside + self.left.nbytes(out_features, rank) + self.right.nbytes(rank, in_features)


Layout = UniformLayout | DenseLayout | TableLayout | BinaryLayout | BitmapLayout | TwoFourLayout | PairLayout
KINDS: dict[str, type[Any]] = {
    "uniform": UniformLayout,
    "dense": DenseLayout,
    "table": TableLayout,
    "binary": BinaryLayout,
    "bitmap": BitmapLayout,
    "2:4": TwoFourLayout,
    "pair": PairLayout,
}


def words_of(layout: Layout) -> str:
    """A layout in a few words, such as `4 bits, group 64`."""
    match layout:
        case UniformLayout() | BinaryLayout():
            kind = "binary, " if isinstance(layout, BinaryLayout) else ""
            zeros = ", float zeros" if isinstance(layout, UniformLayout) and not layout.symmetric and layout.zero == "float" else ""
            return f"{kind}{layout.bits} bits, group {layout.group_size or 'row'}{zeros}"
        case TableLayout():
            return f"{layout.table}, group {layout.group_size or 'row'}{', double scales' if layout.double_scales else ''}"
        case BitmapLayout():
            return f"bitmap, {layout.ratio:.0%} zeros"
        case TwoFourLayout():
            return f"2:4, {words_of(layout.values)}"
        case PairLayout():
            size = f"rank {layout.exact}" if layout.exact else f"low rank {layout.keep:g}"
            return f"{f'{words_of(layout.base)}, beside it ' if layout.base else ''}{size}, factors {words_of(layout.left)}"
    return f"dense, {8 * layout.itemsize} bits"


def layout_to_dict(layout: Layout) -> dict[str, Any]:
    """Plain values, for a file's metadata."""
    return asdict(layout)


def layout_from_dict(values: dict[str, Any]) -> Layout:
    """Inverse of `layout_to_dict`. Raises ValueError for a name that no layout has."""
    if values.get("name") not in KINDS:
        raise ValueError(f"Unknown layout {values.get('name')!r}; known: {', '.join(KINDS)}.")
    return KINDS[values["name"]](**{key: layout_from_dict(value) if isinstance(value, dict) else value for key, value in values.items()})
