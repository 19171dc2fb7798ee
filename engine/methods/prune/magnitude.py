"""Magnitude pruning: the smallest weights become zero; looks at no text (METHODS 16.1)."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import LinearMethod, MethodOptions, Outcome, Statistics
from bitpress.engine.methods.prune.pipeline import prune_matrix
from bitpress.engine.recipe import Scheme


class MagnitudeOptions(MethodOptions):
    """Among which weights the smallest are sought."""

    scope: Literal["layer", "row"] = Field(
        default="layer",
        title="Compare within",
        description="Compare the weights of a whole layer, or of each output row on its own. The 2:4 pattern compares within fours.",
    )


class Magnitude(LinearMethod):
    """Score |w|, no repair."""

    name = "magnitude"
    title = "Magnitude pruning"
    family = "prune"
    summary = "Sets the weights of smallest absolute value to zero, anywhere or two of every four. Takes seconds, looks at no text and repairs nothing."
    citation = "Han et al. 2015, Learning both weights and connections for efficient neural networks, arXiv 1506.02626."
    ability = Ability(part="sparsity", patterns=("unstructured", "2:4"))
    Options = MagnitudeOptions

    def apply(self, weight_NK: Tensor, scheme: Scheme, stats: Statistics, options: MagnitudeOptions) -> Outcome:
        """Prune one matrix to the scheme's ratio and pattern."""
        if scheme.sparsity is None:
            raise ValueError("magnitude was given a scheme without sparsity")
        return Outcome(prune_matrix(weight_NK, weight_NK.abs(), scheme.sparsity, options.scope))
