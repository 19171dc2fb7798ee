"""What one weight matrix becomes: width, zeros, rank, rounded inputs, and what of that does not fit a matrix. Knows shapes; no weights."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, StrictBool, model_validator

from bitpress.engine.fields import BITS, Bits, GroupSize, Keep, Rank, Ratio, Strict, Whole, plain_number
from bitpress.engine.model.anatomy import Part

PATTERNS = ("unstructured", "2:4", "4:8")  # of zeros
Format = Literal["uniform", "nf4", "fp4", "codebook", "bcq"]
Zero = Literal["integer", "float"]
FORMAT_BITS: dict[str, tuple[int, ...]] = {"uniform": BITS, "nf4": (4,), "fp4": (4,), "codebook": (4,), "bcq": (2, 3, 4)}


class WeightScheme(Strict):
    """Codes of `bits` bits. `group_size` 0 (in YAML: row) shares one scale over a whole row.

    format: evenly spaced levels (uniform), sixteen fixed ones (nf4, fp4), sixteen that the matrix has for itself (codebook) or sums of plus
    and minus alphas (bcq). symmetric and zero speak of uniform codes: whether they have zeros, and whether a zero is one of the levels
    (integer) or any number (float). double_quant speaks of nf4, fp4 and codebook: their scales are stored as 8-bit codes.
    """

    bits: Bits
    group_size: GroupSize = 64
    symmetric: StrictBool = False
    format: Format = "uniform"
    zero: Zero = "integer"
    double_quant: StrictBool = False

    @property
    def has_zero(self) -> bool:
        """True when 0 is always a level, so that pruned weights stay 0."""
        return self.format != "bcq" and (self.format != "uniform" or self.symmetric or self.zero == "integer")


class SparsityScheme(Strict):
    """`ratio` of the weights are zero, anywhere or, with pattern N:M, so that N of every M consecutive inputs stay."""

    ratio: Ratio
    pattern: Literal["unstructured", "2:4", "4:8"] = "unstructured"

    @property
    def of_every(self) -> tuple[int, int] | None:
        """(N, M) of a pattern N:M."""
        if self.pattern == "unstructured":
            return None
        stay, of = self.pattern.split(":")
        return int(stay), int(of)


class RankScheme(Strict):
    """A matrix as a product of two of inner size r: a share `keep` of the break-even rank, or the very `rank`.

    factors: their own widths, else they are as `weights` says. Where a product would not be smaller than the matrix, the matrix stays whole.
    bias: what the factors lose of the mean output is stored beside them, one number an output.
    beside: the product is added to the matrix that `weights` rounds, to make up for the rounding; its factors are as `factors` says, else dense.
    latent: above 0 the KV cache holds what is between the factors, so the matrix is factored at any rank, in this many runs of rows by itself.
    """

    keep: Keep | None = None
    rank: Rank | None = None
    factors: WeightScheme | None = None
    latent: Annotated[Whole, Field(ge=0)] = 0
    bias: StrictBool = False
    beside: StrictBool | None = None

    @model_validator(mode="after")
    def _one_size(self) -> "RankScheme":
        if (self.keep is None) == (self.rank is None):
            raise ValueError("give either keep, a share of the break-even rank, or rank, a whole number")
        return self


class ActivationScheme(Strict):
    """The layer's inputs are rounded as they come, one symmetric scale a token. Nothing of it is stored.

    outliers: inputs that are as large as this in any token of a batch are not rounded.
    """

    bits: Literal[8, 4]
    outliers: Annotated[float, Field(gt=0.0, le=1e4), BeforeValidator(plain_number)] | None = None


class Scheme(Strict):
    """What one weight matrix becomes, and its inputs. None or "dense" in a part leaves that part alone."""

    weights: WeightScheme | None = None
    sparsity: SparsityScheme | None = None
    rank: RankScheme | None = None
    activations: ActivationScheme | None = None

    @property
    def is_dense(self) -> bool:
        """True when nothing happens to the matrix."""
        return self.weights is None and (self.sparsity is None or self.sparsity.ratio == 0) and self.rank is None


class WeightPatch(Strict):
    """The weight fields that one line of `schemes` sets; what it leaves out stays as earlier lines set it."""

    bits: Bits | None = None
    group_size: GroupSize | None = None
    symmetric: StrictBool | None = None
    format: Format | None = None
    zero: Zero | None = None
    double_quant: StrictBool | None = None


class SchemeLine(Strict):
    """One line of `schemes`: a target pattern and what it sets. Later lines win, field by field."""

    match: str
    weights: WeightPatch | Literal["dense"] | None = None
    sparsity: SparsityScheme | Literal["dense"] | None = None
    rank: RankScheme | Literal["dense"] | None = None
    activations: ActivationScheme | Literal["dense"] | None = None


class EmbeddingScheme(Strict):
    """Width of the token embedding (and of the head that is tied to it): one symmetric scale a row."""

    bits: Bits


def scheme_problems(scheme: Scheme, part: Part) -> list[tuple[str, str]]:
    """What of a scheme does not fit a matrix: (what is wrong, what would be right)."""
    width = part.in_features
    found = _rank_problems(scheme, min(width, part.out_features))
    if scheme.weights and scheme.weights.group_size > width:
        found.append((f"group_size {scheme.weights.group_size} is larger than the {width} inputs of a row.", f"Use at most {width}, or 'row'."))
    for weights in (scheme.weights, scheme.rank.factors if scheme.rank else None):
        if weights and weights.bits not in FORMAT_BITS[weights.format]:
            widths = ", ".join(map(str, FORMAT_BITS[weights.format]))
            found.append((f"The format {weights.format} has no {weights.bits}-bit codes.", f"Set bits to one of {widths}, or format: uniform."))
    if scheme.activations and scheme.weights is None and scheme.rank is None:
        found.append(("Only the inputs of a packed matrix can be rounded, and this one stays dense.", "Set weights, such as bits: 8, too."))
    if scheme.sparsity and scheme.sparsity.ratio > 0 and scheme.weights and not scheme.weights.has_zero:
        kind = "bcq" if scheme.weights.format == "bcq" else "zero: float"
        found.append((f"Codes with {kind} have no level 0, so pruned weights would not stay 0.", "Use format: uniform with zero: integer, or no sparsity."))
    if scheme.sparsity and scheme.sparsity.of_every:
        pattern, (stay, of) = scheme.sparsity.pattern, scheme.sparsity.of_every
        if width % of:
            found.append((f"{pattern} needs rows of a multiple of {of} inputs; this one has {width}.", "Use pattern: unstructured."))
        if scheme.sparsity.ratio not in (0.0, 1 - stay / of):
            found.append((f"{pattern} is a ratio of {1 - stay / of:g}; the recipe says {scheme.sparsity.ratio}.", f"Set ratio: {1 - stay / of:g}."))
    return found


def _rank_problems(scheme: Scheme, most: int) -> list[tuple[str, str]]:
    """What of a scheme's rank does not fit a matrix that has rank `most` at best."""
    if scheme.rank is None:
        return []
    found = []
    if scheme.rank.beside and (scheme.weights is None or scheme.weights.format != "uniform"):
        found.append(("A product beside a matrix makes up for its rounding, and this one is not rounded to uniform codes.", "Set weights, such as bits: 4."))
    if scheme.rank.rank and scheme.rank.rank > most:
        found.append((f"Rank {scheme.rank.rank} is past the {most} that this matrix can have.", f"Use at most {most}, or leave the rank away."))
    if scheme.sparsity and scheme.sparsity.ratio:
        found.append(("Asks for zeros and for low rank in one matrix: a product of factors has no zeros to leave out.", "Set one of `sparsity` and `rank`."))
    return found
