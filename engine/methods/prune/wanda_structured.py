"""Structured Wanda: scores |w| * ||x|| summed over what a head or neuron holds (METHODS 2.6)."""

from typing import Any

from torch import Tensor

from bitpress.engine.calibrate import BlockStats, walk
from bitpress.engine.methods.structured import EvenOptions, Scores, StructuredMethod, Units, per_cost, sum_over_units
from bitpress.engine.model.anatomy import Part
from bitpress.engine.model.surgery import get, linear_weight
from bitpress.engine.scene import Scene


class WandaStructured(StructuredMethod):
    """Mean of |w_ij| * ||x_j|| over a unit's weights."""

    name = "wanda-structured"
    title = "Structured Wanda"
    summary = "Removes the heads and neurons whose weights times the norms of their inputs are smallest. Needs one pass over some text."
    citation = "Sun et al. 2024, A simple and effective pruning approach for large language models, arXiv 2306.11695, summed over units."
    cost = "One pass over the text; a repair adds four."
    use_when = "For narrower blocks when gradients would take too long."

    Options = EvenOptions

    def score(self, scene: Scene, units: Units, options: Any) -> Scores:
        """Sums of Wanda's scores over what a unit costs."""
        norms = input_norms(scene)

        def value(part: Part) -> Tensor:
            return linear_weight(get(scene.model, part.name)).float().abs() * norms[part.name]

        return per_cost(units, sum_over_units(units, value))


def input_norms(scene: Scene) -> dict[str, Tensor]:
    """Root mean square of every input of every block linear, float32 [K], on the model as it is."""
    found: dict[str, Tensor] = {}

    def keep(block: int, stats: BlockStats) -> None:
        found.update({name: values["second_moment"].sqrt().float() for name, values in stats.items()})

    requests = {part.name: {"second_moment"} for part in scene.anatomy.linears}
    walk(scene.model, scene.anatomy, scene.ids_SL, requests, keep, sequential=False, should_stop=scene.should_stop)
    return found
