"""Round to nearest: each weight goes to the nearest level of its group's grid; looks at no text (METHODS 15.1)."""

from pydantic import Field
from torch import Tensor

from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import LinearMethod, MethodOptions, Outcome, Statistics
from bitpress.engine.methods.quantize.pipeline import ClipSearch, dequantize_groups, quantize_groups
from bitpress.engine.recipe import BITS, Scheme


class RoundToNearestOptions(MethodOptions):
    """How the range of a group is chosen."""

    clip_search: bool = Field(
        default=False,
        title="Search the clipping range",
        description="Try narrower ranges for each group and keep the one of least error. Takes about a hundred times as long.",
    )
    candidates: int = Field(default=80, ge=2, le=99, title="Ranges tried", description="The range is shrunk by 1% for each one tried. Used with the search.")
    exponent: float = Field(
        default=2.4, ge=1.0, le=4.0, title="Error exponent", description="The search minimises the sum of |error| to this power. Larger avoids large errors."
    )


class RoundToNearest(LinearMethod):
    """Min-max grid, optionally clipped; ties go to the even code."""

    name = "rtn"
    title = "Round to nearest"
    family = "quantize"
    summary = "Rounds every weight to the nearest level of an evenly spaced grid, one grid for each group of weights. Takes seconds and looks at no text."
    citation = "Baseline of every quantisation paper; clip search after GPTQ, Frantar et al. 2023, arXiv 2210.17323."
    cost = "Seconds for a small model; with the search about a hundred times as long."
    use_when = "Choose it first, at 8 and 6 bits always, and at 4 bits to have something to compare with."
    ability = Ability(part="weights", bits=BITS)
    Options = RoundToNearestOptions

    def apply(self, weight_NK: Tensor, scheme: Scheme, stats: Statistics, options: RoundToNearestOptions) -> Outcome:
        """Quantise one matrix on the scheme's width, group and symmetry."""
        weights = self.weights_of(scheme)
        clip = ClipSearch(options.candidates, options.exponent) if options.clip_search else None
        codes = quantize_groups(weight_NK, weights, clip)
        return Outcome(dequantize_groups(codes, weights), codes)
