"""LQER: what rounding loses of a matrix is made up for by a low-rank product beside it (METHODS 17.6)."""

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import MethodOptions, Outcome, Statistics
from bitpress.engine.methods.lowrank.pipeline import FactorMethod, Factors, product, rank_of, root_of, rounded, truncate
from bitpress.engine.methods.quantize.pipeline import dequantize_groups, quantize_groups
from bitpress.engine.recipe import BITS, Scheme


class LQEROptions(MethodOptions):
    """What of the rounding error counts."""

    by_inputs: bool = Field(
        default=True, title="Weigh errors by inputs",
        description="The product makes up for what is lost on the inputs that the layer sees. Off: all inputs count alike, and no text is read.",
    )  # fmt: skip


class LQER(FactorMethod):
    """Rounds to nearest, then factors the error under the second moment of the inputs; the original weighs inputs one by one."""

    name = "lqer"
    title = "LQER"
    summary = "Rounds a matrix to few bits and stores a thin product beside it that makes up for a part of what is lost. One pass over the text."
    citation = "Zhang et al. 2024, LQER: low-rank quantization error reconstruction for LLMs, arXiv 2402.02446."
    cost = "Seconds a block, and one pass over the text; decoding multiplies three matrices where there was one."
    use_when = "Choose it with `rank: {rank: 8, beside: true}` at 3 and 2 bits, and hold it against one more bit in fewer layers at the same bytes."
    ability = Ability(part="rank", also="weights", bits=BITS, zeros=("integer", "float"), beside=True)
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    Options = LQEROptions

    def needs_for(self, options: LQEROptions) -> frozenset[str]:
        """Text only where inputs weigh the errors."""
        return self.needs if options.by_inputs else frozenset()

    def factor(self, weight_NK: Tensor, rank: int, stats: Statistics, options: LQEROptions) -> Factors:
        """The product nearest to an error."""
        return truncate(weight_NK, root_of(stats["gram"]) if options.by_inputs else None, rank)

    def apply(self, weight_NK: Tensor, scheme: Scheme, stats: Statistics, options: Any) -> Outcome:
        """Codes of the matrix, and factors of what they lose, rounded where the scheme gives them widths."""
        weights = self.weights_of(scheme)
        codes = quantize_groups(weight_NK, weights)
        base_NK = dequantize_groups(codes, weights)
        factors = self.factor(weight_NK - base_NK, rank_of(weight_NK, scheme), stats, options)
        beside = product(*(rounded(factor, scheme.rank.factors if scheme.rank else None) for factor in factors))
        return beside._replace(weight_NK=base_NK + beside.weight_NK, codes=codes)
