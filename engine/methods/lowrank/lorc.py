"""LoRC: key and value matrices factored by their own singular values, for a cache that holds what is between the factors (METHODS 4)."""

from typing import Any

from torch import Tensor

from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import Statistics
from bitpress.engine.methods.lowrank.pipeline import FactorMethod, Factors, truncate
from bitpress.engine.recipe import BITS


class LoRC(FactorMethod):
    """The factors of plain SVD; what is its own, the ranks from condition numbers, is `engine.kv_ranks` and stands in the recipe."""

    name = "lorc"
    title = "LoRC"
    summary = "Factors key and value matrices by SVD, so that the cache can hold fewer numbers a token. Looks at no text; svd-llm in its place looks at some."
    citation = "Zhang et al. 2024, LoRC: low-rank compression for LLMs KV cache with a progressive compression strategy, arXiv 2410.03111."
    cost = "Less than a second a block."
    use_when = "Choose it with `kv_cache: {rank: ...}` when there is no text to calibrate on."

    ability = Ability(part="rank", latent=True, also="weights", bits=BITS)

    def factor(self, weight_NK: Tensor, rank: int, stats: Statistics, options: Any) -> Factors:
        """The product nearest to W itself."""
        return truncate(weight_NK, None, rank)
