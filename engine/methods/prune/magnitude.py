"""Magnitude pruning: the smallest weights become zero; looks at no text (METHODS 16.1)."""

from typing import Any

from torch import Tensor

from bitpress.engine.methods.base import Statistics
from bitpress.engine.methods.prune.pipeline import ScoredMethod


class Magnitude(ScoredMethod):
    """Score |w|."""

    name = "magnitude"
    title = "Magnitude pruning"
    summary = "Sets the weights of smallest absolute value to zero, anywhere or in a pattern. Takes seconds; only a repair looks at text."
    citation = "Han et al. 2015, Learning both weights and connections for efficient neural networks, arXiv 1506.02626."
    cost = "Seconds for a small model."
    use_when = "Choose it for few zeros, and to have something to compare with."

    def score(self, weight_NK: Tensor, stats: Statistics, options: Any) -> Tensor:
        """The absolute weights."""
        return weight_NK.abs()
