"""Bolaco with its weakest directions tuned: two diagonals around them are trained, block by block (METHODS 9.1, step 5).

Of the r directions that a matrix keeps, the last t go through diagonals: W becomes B A + diag(b) B' diag(d) A', b one number an output and d
one a direction, both 1 at the start. The published step tunes directions beyond the rank on instructions, the whole model at once; here they
are within it, so that nothing grows, and the target is the dense block's output.
"""

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import BlockMethod, BlockOptions, LearnedWeight, MethodOptions, Outcome, Statistics
from bitpress.engine.methods.lowrank.pipeline import Factors, output_moment, product, project, rank_of
from bitpress.engine.recipe import Scheme


class TunedOptions(BlockOptions):
    """What is trained."""

    rate: float = Field(default=1e-2, gt=0.0, le=1.0, title="Learning rate", description="Of both diagonals, at the start; it falls to 0.")
    tuned: int = Field(default=64, ge=1, le=4096, title="Directions tuned", description="So many of the weakest directions kept, at most all of them.")


class BolacoTuned(BlockMethod):
    """The directions are those of the outputs' second moment; a bias has no place in a block's training."""

    name = "bolaco-tuned"
    title = "Bolaco, tuned diagonals"
    family = "lowrank"
    summary = "Projects each matrix on the directions in which its outputs vary, then trains two diagonals around the weakest of them. Needs text and minutes."
    citation = "Ji et al. 2024, Feature-based low-rank compression of large language models via Bayesian optimization, arXiv 2405.10616."
    cost = "Steps times blocks: about half a minute a block for 200 steps at 135M parameters on two quiet cores."
    use_when = "Choose it after a search for ranks, when some minutes more may be spent on what the cut has cost."
    ability = Ability(part="rank")
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    Options: ClassVar[type[MethodOptions]] = TunedOptions

    def needs_for(self, options: TunedOptions) -> frozenset[str]:
        """The moment of the inputs, whatever weighs the starts of other methods."""
        return self.needs

    def start(self, weight_NK: Tensor, scheme: Scheme, stats: Statistics, options: TunedOptions) -> LearnedWeight:
        """The projection itself."""
        return TunedFactors(project(weight_NK, output_moment(weight_NK, stats["gram"]), rank_of(weight_NK, scheme)), options)


class TunedFactors(LearnedWeight):
    """Two factors, the last columns of the left and rows of the right under diagonals."""

    left_NR: Tensor
    right_RK: Tensor

    def __init__(self, factors: Factors, options: TunedOptions) -> None:
        super().__init__()
        self.rate, self.tuned = options.rate, min(options.tuned, factors.left_NR.shape[1])
        self.register_buffer("left_NR", factors.left_NR)
        self.register_buffer("right_RK", factors.right_RK)
        self.outputs = nn.Parameter(torch.ones(len(factors.left_NR)))
        self.directions = nn.Parameter(torch.ones(self.tuned))

    def factors(self) -> Factors:
        """Both as they stand now."""
        left_NR = torch.cat((self.left_NR[:, : -self.tuned], self.outputs[:, None] * self.left_NR[:, -self.tuned :]), 1)
        return Factors(left_NR, torch.cat((self.right_RK[: -self.tuned], self.directions[:, None] * self.right_RK[-self.tuned :])))

    def forward(self) -> Tensor:
        """Their product."""
        left_NR, right_RK = self.factors()
        return left_NR @ right_RK

    def rates(self) -> list[dict[str, Any]]:
        """One rate for both diagonals."""
        return [{"params": [self.outputs, self.directions], "lr": self.rate}]

    @torch.no_grad()
    def outcome(self) -> Outcome:
        """Two factors of the same rank as at the start: the diagonals are multiplied in."""
        return product(*(Outcome(factor) for factor in self.factors()))
