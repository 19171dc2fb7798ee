"""Bolaco: every matrix on the principal directions of its outputs' pooled covariance, the mean kept by a bias (METHODS 9.1)."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import Outcome, Statistics
from bitpress.engine.methods.lowrank.pipeline import FactorMethod, Factors, output_moment, project
from bitpress.engine.recipe import BITS, Scheme


class Bolaco(FactorMethod):
    """Centred where the scheme has a bias; without one the mean counts as a direction. Ranks are the recipe's: `engine.rank_search` looks for good ones."""

    name = "bolaco"
    title = "Bolaco"
    summary = "Projects each matrix on the directions in which its outputs vary about their mean; a bias keeps the mean. One pass over the text."
    citation = "Ji et al. 2024, Feature-based low-rank compression of large language models via Bayesian optimization, arXiv 2405.10616."
    cost = "Seconds a block; a search for ranks takes minutes beside it."
    use_when = "Choose it with `rank: {bias: true}` where a few hundred numbers a layer for the bias are no matter."
    ability = Ability(part="rank", bias=True, also="weights", bits=BITS)
    needs: ClassVar[frozenset[str]] = frozenset({"mean", "pooled_covariance"})

    def apply(self, weight_NK: Tensor, scheme: Scheme, stats: Statistics, options: Any) -> Outcome:
        """Factor one matrix at the scheme's rank."""
        centred = scheme.rank is not None and scheme.rank.bias
        moment_KK = stats["pooled_covariance"] + (0 if centred else torch.outer(stats["mean"], stats["mean"]))
        return super().apply(weight_NK, scheme, {**stats, "moment": moment_KK}, options)

    def factor(self, weight_NK: Tensor, rank: int, stats: Statistics, options: Any) -> Factors:
        """V V^T W with V the principal directions of the moment that `apply` chose."""
        return project(weight_NK, output_moment(weight_NK, stats["moment"]), rank)
