"""What a method can do for a scheme, as a record. Knows schemes; no algorithms and no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from bitpress.engine.recipe import Scheme, WeightScheme


class Ability(BaseModel):
    """Which part of a scheme a method satisfies, and which values of it."""

    model_config = ConfigDict(frozen=True)

    part: Literal["weights", "sparsity", "rank", "prepare", "structure", "ratios"]  # prepare: none of them, but something before them
    bits: tuple[int, ...] = ()  # widths, for weights
    formats: tuple[str, ...] = ("uniform",)  # of codes, for weights
    zeros: tuple[str, ...] = ("integer",)  # of asymmetric uniform codes, for weights
    patterns: tuple[str, ...] = ()  # patterns of zeros, for sparsity
    units: tuple[str, ...] = ()  # what it removes, for structure: blocks, heads, neurons
    factors: bool = True  # whether it can be given each factor of a low-rank matrix, where it gives weights
    latent: bool = False  # low rank of those matrices only whose middle the KV cache holds
    bias: bool = False  # whether it gives the bias that a rank can ask for
    beside: bool = False  # low rank beside a rounded matrix only, which it rounds itself
    also: Literal["weights"] | None = None  # a second part, given in the same pass unless a later stage gives it

    @property
    def shapes(self) -> bool:
        """True for a method that decides what goes of the whole model and gives no single layer its scheme."""
        return self.part in ("structure", "ratios")

    def satisfies(self, scheme: Scheme) -> bool:
        """True when the scheme asks for this part with a value that the method has."""
        asked = wanted_parts(scheme)
        if self.part not in asked:
            return False
        if self.part == "weights":
            alone = scheme.rank is None or (self.beside if scheme.rank.beside else self.factors)
            return scheme.weights is not None and self._makes(scheme.weights) and alone
        if self.part == "sparsity":
            return scheme.sparsity is not None and scheme.sparsity.pattern in self.patterns
        fits = scheme.rank is not None and self.beside == bool(scheme.rank.beside)
        return fits and scheme.rank is not None and (not self.latent or scheme.rank.latent > 0) and (self.bias or not scheme.rank.bias)

    def also_satisfies(self, scheme: Scheme) -> bool:
        """True when the scheme asks for the second part with a value that the method has."""
        return self.also is not None and self.model_copy(update={"part": self.also}).satisfies(scheme)

    def _makes(self, weights: WeightScheme) -> bool:
        """True for codes of this width, format and kind of zero."""
        has_zeros = weights.format == "uniform" and not weights.symmetric
        return weights.bits in self.bits and weights.format in self.formats and (not has_zeros or weights.zero in self.zeros)


def wanted_parts(scheme: Scheme) -> tuple[str, ...]:
    """The parts of a scheme that ask for something; a ratio of 0 asks for nothing."""
    sparsity = scheme.sparsity if scheme.sparsity and scheme.sparsity.ratio > 0 else None
    asked = {"sparsity": sparsity, "rank": scheme.rank, "weights": scheme.weights}
    return tuple(part for part, value in asked.items() if value is not None)
