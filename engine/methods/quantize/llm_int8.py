"""LLM.int8(): weights and activations of 8 bits, but for the few inputs that hold outliers (METHODS 15.5)."""

from torch import Tensor

from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import LinearMethod, MethodOptions, Outcome, Statistics
from bitpress.engine.methods.quantize.pipeline import dequantize_groups, quantize_groups
from bitpress.engine.recipe import Scheme

THRESHOLD = 6.0  # where the scheme names none


class LlmInt8(LinearMethod):
    """Rounds to nearest; which inputs are outliers is seen as they come, and counted on the calibration text."""

    name = "llm-int8"
    title = "LLM.int8()"
    family = "quantize"
    summary = "Rounds weights and inputs to 8 bits and leaves inputs with outliers unrounded as they come. Reads the text once, to count them."
    citation = "Dettmers et al. 2022, LLM.int8(): 8-bit matrix multiplication for transformers at scale, arXiv 2208.07339."
    cost = "Seconds beside one pass over the calibration text; inputs with outliers are multiplied a second time as they come."
    use_when = "Choose it with `activations: {bits: 8, outliers: 6}` and one symmetric scale a row, for models whose activations have large outliers."
    ability = Ability(part="weights", bits=(8,))
    needs = frozenset({"peak"})

    def apply(self, weight_NK: Tensor, scheme: Scheme, stats: Statistics, options: MethodOptions) -> Outcome:
        """Round one matrix; notes say how many inputs are outliers, and when the scheme rounds no activations."""
        weights = self.weights_of(scheme)
        codes = quantize_groups(weight_NK, weights)
        return Outcome(dequantize_groups(codes, weights), codes, notes=_notes(scheme, stats["peak"]))


def _notes(scheme: Scheme, peak_K: Tensor) -> tuple[str, ...]:
    if scheme.activations is None:
        return ("its inputs are not rounded: the scheme has no `activations: {bits: 8, outliers: 6}`",)
    large = int((peak_K >= (scheme.activations.outliers or THRESHOLD)).sum())
    if not large:
        return ()
    kept = "stay unrounded there" if scheme.activations.outliers else "are rounded all the same: the scheme sets no `outliers`"
    return (f"{large:,} of its {len(peak_K):,} inputs reach {scheme.activations.outliers or THRESHOLD:g} in the calibration text and {kept}",)
