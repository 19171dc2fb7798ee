"""FlexRound: learns how each weight is stretched before it is rounded, so that a weight may move by several levels (METHODS 1.9)."""

from typing import Any

from pydantic import Field
from torch import Tensor

from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import BlockMethod, BlockOptions, LearnedWeight, Outcome, Statistics
from bitpress.engine.methods.quantize.learned import DAMPING, Reshape, compensated, mended, searched_grid, uniform_levels, uniform_outcome
from bitpress.engine.methods.quantize.pipeline import SCALE_DTYPE, Grid, decode
from bitpress.engine.methods.quantize.refine import target_of
from bitpress.engine.recipe import BITS, Scheme, WeightScheme


class FlexRoundOptions(BlockOptions):
    """Optimiser and start."""

    rate: float = Field(default=1e-3, gt=0.0, le=1.0, title="Learning rate", description="Of the factors and the scales; falls to 0 along a cosine.")
    mending: int = Field(
        default=0, ge=0, le=50, title="Rounds of mending before",
        description="Before the training, scales and codes are changed in turn wherever that lowers the error of each matrix's own outputs, as GPTQ can.",
    )  # fmt: skip


class FlexRound(BlockMethod):
    """Uniform levels; scale, element and group factors are learned, the zero stays."""

    name = "flexround"
    title = "FlexRound"
    family = "quantize"
    summary = "Learns a factor for every weight before it is rounded to an evenly spaced grid, block by block. Needs text and minutes of training."
    citation = "Lee et al. 2023, FlexRound: Learnable Rounding based on Element-wise Division, arXiv 2306.00317."
    cost = "Steps times blocks: about half a minute a block for 200 steps at 135M parameters on two quiet cores."
    use_when = "Even levels must be kept, for the fastest kernels, and a few minutes of training at 2 or 3 bits can be spared."
    ability = Ability(part="weights", factors=False, bits=BITS, zeros=("integer", "float"))
    Options = FlexRoundOptions

    def start(self, weight_NK: Tensor, scheme: Scheme, stats: Statistics, options: FlexRoundOptions) -> LearnedWeight:
        """The grid of a clip search with error |e|**2.4, and no factors."""
        return FlexRoundWeight(weight_NK, self.weights_of(scheme), options, stats)


class FlexRoundWeight(LearnedWeight):
    """One matrix under FlexRound."""

    def __init__(self, weight_NK: Tensor, scheme: WeightScheme, options: FlexRoundOptions, stats: Statistics) -> None:
        super().__init__()
        self.scheme, self.options = scheme, options
        grid = searched_grid(weight_NK, scheme, stats.get("second_moment"))
        start_NK, self.notes = compensated(weight_NK, scheme.group_size, uniform_levels(grid, len(weight_NK)), stats)
        if options.mending and "gram" in stats:
            start_NK, grid = mended(start_NK, grid, scheme, target_of(weight_NK, stats["gram"], DAMPING), options.mending)
        self.reshape = Reshape(start_NK, scheme.group_size, grid.scale)
        self.zero_R1 = grid.zero

    def grid(self) -> Grid:
        """The levels as they are stored: the scale rounded, without gradients."""
        return Grid(self.reshape.scale().to(SCALE_DTYPE).float(), self.zero_R1, 2**self.scheme.bits - 1)

    def forward(self) -> Tensor:
        """Rounded weights; a weight beyond the last level has no gradient but through the scale."""
        grid, seen_Rg = self.grid(), self.reshape.seen()
        free_Rg = (seen_Rg / grid.scale).add_(grid.zero).round_() if self.scheme.zero == "float" else (seen_Rg / grid.scale).round_().add_(grid.zero)
        near_Rg = (free_Rg >= 0) & (free_Rg <= grid.top)
        return self.reshape.matrix(self.reshape.passed(seen_Rg, decode(free_Rg.clamp_(0, grid.top), grid), near_Rg))

    def rates(self) -> list[dict[str, Any]]:
        """One rate for all."""
        return [{"params": list(self.reshape.parameters()), "lr": self.options.rate}]

    def outcome(self) -> Outcome:
        """Uniform codes on the learned grid."""
        return uniform_outcome(self.reshape.seen(), self.grid(), self.scheme, self.reshape.shape)
