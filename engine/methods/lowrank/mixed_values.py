"""Latent values by what attention mixes: the directions of each value head that reach the residual stream least are left away (METHODS 4, ours)."""

from typing import Any, ClassVar

from torch import Tensor

from bitpress.engine.errors import InputError
from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import Statistics
from bitpress.engine.methods.lowrank.pipeline import FactorMethod, Factors, energies
from bitpress.engine.recipe import BITS


class MixedValues(FactorMethod):
    """SVD of each value head between a root of its mixes' moment and one of what the output matrix takes of them."""

    name = "mixed-values"
    title = "Values by what is mixed"
    summary = (
        "Factors the values of each head for a latent cache so that the attention's output changes least, not the values themselves. One pass over the text."
    )
    citation = "Factors for a latent cache as in Zhang et al. 2024, LoRC, arXiv 2410.03111; weighing them by the mixes and the output matrix is ours."
    cost = "Less than a second a block, and one pass over the text."
    use_when = "Choose it with `kv_cache: {rank: {sides: values, heads: each}}`; keys can have codes beside it. It loses a fraction of what svd-llm does."
    ability = Ability(part="rank", latent=True, also="weights", bits=BITS)
    needs: ClassVar[frozenset[str]] = frozenset({"mixed", "taken"})

    def of_run(self, stats: Statistics, run: int, runs: int) -> Statistics:
        """The moments of one head. Raises InputError where the heads are factored together."""
        if runs != len(stats["mixed"]):
            why = "Each head's mixes have a moment of their own, and this latent is of all heads together."
            raise InputError("The values cannot be factored by what attention mixes.", why, "Set `heads: each` in kv_cache.rank.")
        return {name: moments[run] for name, moments in stats.items() if name in self.needs}

    def factor(self, weight_NK: Tensor, rank: int, stats: Statistics, options: Any) -> Factors:
        """A head's factors: the projection nearest to nothing lost, taken back through the root of what the output matrix takes."""
        taken, directions_CC, _ = energies(stats["mixed"], stats["taken"])
        directions_CR = directions_CC[:, :rank]
        return Factors((taken.inverse_KK.t() @ directions_CR).float(), (directions_CR.t() @ taken.root_KK.t() @ weight_NK.double()).float())
