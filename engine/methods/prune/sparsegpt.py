"""SparseGPT: prune column by column, and let the columns to come make up for each loss (METHODS 16.3)."""

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import Outcome, Statistics
from bitpress.engine.methods.obs import BLOCK, Choose, inverse_factor, keeping, sweep
from bitpress.engine.methods.prune.pipeline import PruneOptions, Repairing, ScoredMethod, select
from bitpress.engine.methods.quantize.gptq import Grids
from bitpress.engine.recipe import BITS, PATTERNS, Scheme, SparsityScheme, WeightScheme


class SparseGPTOptions(PruneOptions):
    """With its own repair the weights to go are chosen during the sweep, within 128 columns at a time."""

    repair: Repairing = Field(
        default="obs",
        title="Repair",
        description="The second-order update is the method itself. With another repair its scores are taken once, of the weights as they were.",
    )


class SparseGPT(ScoredMethod):
    """Score w^2 / diag(U)^2 with U the Cholesky factor of the inverse Hessian; rounds to codes in the same sweep where asked."""

    name = "sparsegpt"
    title = "SparseGPT"
    summary = (
        "Prunes column by column by second-order scores and lets the columns to come make up for each loss. "
        "Needs one pass over some text and about a minute for a small model; can round the kept weights to codes in the same sweep."
    )
    citation = "Frantar and Alistarh 2023, SparseGPT: massive language models can be accurately pruned in one-shot, arXiv 2301.00774."
    cost = "One pass over the text and a factorisation for each input: a minute or two for a small model."
    use_when = "At 50% zeros and beyond, and to prune and round in one sweep."
    ability: ClassVar[Ability] = Ability(part="sparsity", patterns=PATTERNS, also="weights", bits=BITS)
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    Options = SparseGPTOptions

    def score(self, weight_NK: Tensor, stats: Statistics, options: Any) -> Tensor:
        """The loss that each weight's removal would cause, up to a factor."""
        return (weight_NK / inverse_factor(stats["gram"], options.damp).diagonal()).square()

    def apply(self, weight_NK: Tensor, scheme: Scheme, stats: Statistics, options: Any) -> Outcome:
        """Prune one matrix, and round it where the scheme still asks for that."""
        if options.repair != "obs" or scheme.sparsity is None:
            outcome = super().apply(weight_NK, scheme, stats, options)
            if scheme.weights is None:
                return outcome
            factor_KK, kept_NK = inverse_factor(stats["gram"], options.damp), outcome.weight_NK != 0
            return _swept_to_codes(outcome.weight_NK, factor_KK, keeping(kept_NK), BLOCK, scheme.weights)
        factor_KK = inverse_factor(stats["gram"], options.damp)
        weight_NK = torch.where(stats["gram"].diagonal() > 0, weight_NK, 0.0)
        choose, span = _chooser(scheme.sparsity)
        if scheme.weights is not None:
            return _swept_to_codes(weight_NK, factor_KK, choose, span, scheme.weights)
        return Outcome(sweep(weight_NK, factor_KK, choose, span))


def _chooser(sparsity: SparsityScheme) -> tuple[Choose, int]:
    """What decides in the sweep, and for how many columns at a time: the pattern's, or a whole block's under one threshold."""

    def choose(weight_NS: Tensor, diagonal_S: Tensor, _: int) -> Tensor:
        return select((weight_NS / diagonal_S).square(), sparsity, "layer")

    return choose, sparsity.of_every[1] if sparsity.of_every else BLOCK


def _swept_to_codes(weight_NK: Tensor, factor_KK: Tensor, choose: Choose, span: int, scheme: WeightScheme) -> Outcome:
    """One sweep that prunes and rounds: the grid of a group is made of its weights as they are when the sweep reaches it."""
    grids = Grids(scheme, None, factor_KK.diagonal())
    made_NK = sweep(weight_NK, factor_KK, choose, span, lambda weight_KN, at: grids.rounded(weight_KN, at, at), scheme.group_size)
    return Outcome(made_NK, grids.codes(made_NK))
