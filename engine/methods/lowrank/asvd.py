"""ASVD: inputs weighed by their size before the decomposition (METHODS 17.2)."""

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from bitpress.engine.methods.base import MethodOptions, Statistics
from bitpress.engine.methods.lowrank.pipeline import FactorMethod, Factors, diagonal_root, truncate


class ASVDOptions(MethodOptions):
    """How strongly large inputs count."""

    alpha: float = Field(default=0.5, ge=0.0, le=2.0, title="Power", description="The mean size of an input to this power is its weight. 0 is plain SVD.")


class ASVD(FactorMethod):
    """S = diag(mean |x|^alpha); the ranks are those of the recipe, its own search for them is not part of this."""

    name = "asvd"
    title = "ASVD"
    summary = "Like SVD, with every input weighed by its mean size on some text. Needs one pass over the text and keeps the sizes of single inputs only."
    citation = "Yuan et al. 2023, ASVD: activation-aware singular value decomposition for compressing large language models, arXiv 2312.05821."
    cost = "Seconds a block, and one pass over the text."
    use_when = "Choose it to see how far the size of single inputs goes; svd-llm knows more at the same cost."
    needs: ClassVar[frozenset[str]] = frozenset({"mean_abs"})
    Options = ASVDOptions

    def factor(self, weight_NK: Tensor, rank: int, stats: Statistics, options: ASVDOptions) -> Factors:
        """The product nearest to W, error of input j weighed by its mean size to the power alpha."""
        return truncate(weight_NK, diagonal_root(stats["mean_abs"] ** options.alpha), rank)
