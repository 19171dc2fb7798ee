"""Binary-coding quantisation: levels that are sums of a few signed numbers, fitted to each group by turns; looks at no text (METHODS 1.3, 15.11)."""

from pydantic import Field
from torch import Tensor

from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import LinearMethod, MethodOptions, Outcome, Statistics
from bitpress.engine.methods.quantize.binary import Planes, alternate, binary_outcome, encode_binary, fit_rows, greedy, weighted_mean
from bitpress.engine.recipe import FORMAT_BITS, Scheme


class BinaryCodingOptions(MethodOptions):
    """How the numbers of a group are fitted."""

    rounds: int = Field(
        default=15, ge=0, le=100, title="Fitting rounds",
        description="Rounds of least squares and nearest level in turn. 0 keeps the greedy start, which is worse than plain rounding at 4 bits.",
    )  # fmt: skip
    shift: bool = Field(
        default=True, title="Fit the middle",
        description="Lets each group's levels lie around a fitted middle instead of 0. Helps where weights are skewed, and costs no bytes.",
    )  # fmt: skip
    by_inputs: bool = Field(
        default=False, title="Weigh by inputs",
        description="Errors of weights whose inputs are large count more, by the inputs' mean square on the calibration text.",
    )  # fmt: skip


class BinaryCoding(LinearMethod):
    """Greedy start, then alternation; levels come in pairs around the shift."""

    name = "bcq"
    title = "Binary coding (BCQ)"
    family = "quantize"
    summary = "Writes each weight as plus or minus a few numbers that its group shares, so levels need not be even. Looks at no text."
    citation = "Xu et al. 2018, Alternating Multi-bit Quantization, arXiv 1802.00150; greedy start after Guo et al. 2017, arXiv 1706.02021."
    cost = "About ten nanoseconds a weight and round: half a minute for 15 rounds at 135M parameters."
    use_when = "The format is bcq and there is no time or text to train; at 2 and 3 bits, where levels that need not be even gain most."
    ability = Ability(part="weights", bits=FORMAT_BITS["bcq"], formats=("bcq",))
    Options = BinaryCodingOptions

    def needs_for(self, options: BinaryCodingOptions) -> frozenset[str]:
        """Text is looked at only to weigh errors."""
        return frozenset({"second_moment"}) if options.by_inputs else self.needs

    def apply(self, weight_NK: Tensor, scheme: Scheme, stats: Statistics, options: BinaryCodingOptions) -> Outcome:
        """Code one matrix in the scheme's width and groups."""
        weights = self.weights_of(scheme)
        bits, size = weights.bits, weights.group_size
        planes = fit_rows(weight_NK, size, lambda groups_Rg, importance_Rg: fit(groups_Rg, bits, options, importance_Rg), stats.get("second_moment"))
        return binary_outcome(encode_binary(weight_NK, size, planes), size)


def fit(groups_Rg: Tensor, bits: int, options: BinaryCodingOptions, importance_Rg: Tensor | None) -> Planes:
    """Greedy on what the shift leaves, the mean or nothing, and then by turns."""
    middle = weighted_mean(groups_Rg, importance_Rg)
    start = greedy(groups_Rg, bits, middle if options.shift else middle.mul(0), importance_Rg)
    return alternate(groups_Rg, start, options.rounds, options.shift, importance_Rg).planes
