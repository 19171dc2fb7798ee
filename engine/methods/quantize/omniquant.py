"""OmniQuant's learnable weight clipping: learns how far each group's range is cut, and rounds to the grid of what is left (METHODS 15.8)."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import BlockMethod, BlockOptions, LearnedWeight, Outcome, Statistics
from bitpress.engine.methods.quantize.learned import compensated, searched_grid, uniform_levels, uniform_outcome
from bitpress.engine.methods.quantize.pipeline import Grid, from_groups, group_range, make_grid, to_groups
from bitpress.engine.recipe import BITS, Scheme, WeightScheme

START = 4.0  # sigmoid(4) = 0.982 of the range


class OmniQuantOptions(BlockOptions):
    """Optimiser."""

    start: Literal["search", "wide"] = Field(
        default="search", title="Start", description="search: the range of a clip search. wide: 98.2% of every range, as published; needs many more steps."
    )
    rate: float = Field(default=1e-2, gt=0.0, le=1.0, title="Learning rate", description="Of the two clipping strengths a group; falls to 0 along a cosine.")


class OmniQuant(BlockMethod):
    """Uniform levels between learned ends. Of OmniQuant's two parts this is the one for weights alone."""

    name = "omniquant"
    title = "OmniQuant (clipping)"
    family = "quantize"
    summary = "Learns where to cut the range of every group, block by block, so that common weights get finer levels. Needs text and minutes of training."
    citation = "Shao et al. 2024, OmniQuant, arXiv 2308.13137 (learnable weight clipping)."
    cost = "Steps times blocks: about half a minute a block for 200 steps at 135M parameters on two quiet cores."
    use_when = "Only ranges should be trained, two numbers a group: little can be overfitted on little text."
    ability = Ability(part="weights", factors=False, bits=BITS)
    Options = OmniQuantOptions

    def start(self, weight_NK: Tensor, scheme: Scheme, stats: Statistics, options: OmniQuantOptions) -> LearnedWeight:
        """Every group's range, cut as the options say."""
        return ClippedWeight(weight_NK, self.weights_of(scheme), options, stats)


class ClippedWeight(LearnedWeight):
    """One matrix with learned ends."""

    def __init__(self, weight_NK: Tensor, scheme: WeightScheme, options: OmniQuantOptions, stats: Statistics) -> None:
        super().__init__()
        self.scheme, self.options, self.shape = scheme, options, tuple(weight_NK.shape)
        self.low_R1, self.high_R1 = group_range(to_groups(weight_NK, scheme.group_size).flatten(0, 1))
        searched = self.strength_of(searched_grid(weight_NK, scheme, stats.get("second_moment")))
        strength = torch.full_like(searched, START) if options.start == "wide" else searched
        self.lower, self.upper = nn.Parameter(strength), nn.Parameter(strength.clone())
        levels_NGL = uniform_levels(self.grid(), len(weight_NK))
        start_NK, self.notes = compensated(weight_NK, scheme.group_size, levels_NGL, stats)
        self.groups_Rg = to_groups(start_NK, scheme.group_size).flatten(0, 1)

    def strength_of(self, grid: Grid) -> Tensor:
        """The strength of both ends that gives each group the scale of a narrower grid; at most the wide one's."""
        whole = make_grid(self.low_R1, self.high_R1, self.scheme).scale
        return (grid.scale / whole).logit(eps=1e-6).clamp_max(START)

    def ends(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest value that the grid spans, [R, 1] each."""
        return self.lower.sigmoid() * self.low_R1, self.upper.sigmoid() * self.high_R1

    def grid(self) -> Grid:
        """The levels as they are stored, without gradients."""
        with torch.no_grad():
            return make_grid(*self.ends(), self.scheme)

    def forward(self) -> Tensor:
        """Rounded weights; every rounding passes gradients as the identity."""
        grid, (low, high) = self.grid(), self.ends()
        span = torch.maximum(high, -low) / (2 ** (self.scheme.bits - 1) - 1) if self.scheme.symmetric else (high - low) / grid.top
        scale = as_if(span, grid.scale)
        zero = grid.zero if self.scheme.symmetric else as_if(-low / scale, grid.zero)
        free_Rg = self.groups_Rg / scale
        codes_Rg = (as_if(free_Rg, free_Rg.detach().round()) + zero).clamp(0, grid.top)
        return from_groups((codes_Rg - zero) * scale, self.shape)

    def rates(self) -> list[dict[str, Any]]:
        """One rate for both ends."""
        return [{"params": [self.lower, self.upper], "lr": self.options.rate}]

    def outcome(self) -> Outcome:
        """Uniform codes between the learned ends."""
        return uniform_outcome(self.groups_Rg, self.grid(), self.scheme, self.shape)


def as_if(followed: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradients of `followed`."""
    return value + (followed - followed.detach())
