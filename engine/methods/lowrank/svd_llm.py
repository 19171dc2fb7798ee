"""SVD-LLM: the decomposition of the whitened matrix, which minimises the error of the outputs (METHODS 17.3)."""

from typing import Any, ClassVar

from torch import Tensor

from bitpress.engine.methods.base import Statistics
from bitpress.engine.methods.lowrank.pipeline import FactorMethod, Factors, root_of, truncate


class SVDLLM(FactorMethod):
    """S S^T = E[x x^T]: each discarded singular value of W S is exactly the loss it causes. Its LoRA step is not part of this."""

    name = "svd-llm"
    title = "SVD-LLM (whitening)"
    summary = "Keeps what changes the outputs of each matrix most on some text: SVD of the matrix times a root of its inputs' moment. Seconds a block."
    citation = "Wang et al. 2024, SVD-LLM: truncation-aware singular value decomposition for large language model compression, arXiv 2403.07378."
    cost = "Seconds a block, and one pass over the text; grows with the cube of a matrix's sides."
    use_when = "Choose it to make matrices smaller and faster at once when there is text that resembles what the model will read."
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def factor(self, weight_NK: Tensor, rank: int, stats: Statistics, options: Any) -> Factors:
        """The product whose outputs are nearest to those of W in the mean square."""
        return truncate(weight_NK, root_of(stats["gram"]), rank)
