"""Structured magnitude: the heads and neurons of smallest weights go; the baseline that every other score has to beat (METHODS 2.6)."""

from typing import Any, ClassVar

from bitpress.engine.methods.structured import EvenOptions, Scores, StructuredMethod, Units, per_cost, sum_over_units
from bitpress.engine.model.surgery import get, linear_weight
from bitpress.engine.scene import Scene


class MagnitudeStructured(StructuredMethod):
    """Mean square of a unit's weights."""

    name = "magnitude-structured"
    title = "Structured magnitude"
    summary = "Removes the heads and neurons whose weights are smallest. Takes seconds; only a repair looks at text."
    citation = "Li et al. 2017, Pruning filters for efficient ConvNets, arXiv 1608.08710, on heads and neurons."
    cost = "Seconds; a repair adds four passes over the text."
    use_when = "As the baseline that other scores should beat."
    Options = EvenOptions
    needs: ClassVar[frozenset[str]] = frozenset()

    def reads_text(self, options: Any) -> bool:
        """Only for a repair."""
        return options.repair != "none"

    def score(self, scene: Scene, units: Units, options: Any) -> Scores:
        """Sums of squares over what a unit costs."""
        return per_cost(units, sum_over_units(units, lambda part: linear_weight(get(scene.model, part.name)).float().square()))
