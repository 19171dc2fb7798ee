"""Plain truncated SVD of the weights (METHODS 17.1)."""

from typing import Any

from torch import Tensor

from bitpress.engine.methods.base import Statistics
from bitpress.engine.methods.lowrank.pipeline import FactorMethod, Factors, truncate


class SVD(FactorMethod):
    """All inputs count alike."""

    name = "svd"
    title = "SVD"
    summary = "Keeps the largest singular values of each matrix, as two thin factors. Looks at no text, so it also keeps what no text ever uses."
    citation = "Eckart and Young 1936, The approximation of one matrix by another of lower rank."
    cost = "Seconds a block; grows with the cube of a matrix's smaller side."
    use_when = "Choose it to have something to compare with, or where there is no text."

    def factor(self, weight_NK: Tensor, rank: int, stats: Statistics, options: Any) -> Factors:
        """The product nearest to W itself."""
        return truncate(weight_NK, None, rank)
