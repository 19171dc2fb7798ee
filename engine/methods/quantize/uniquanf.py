"""UniQuanF: FlexRound's transform, binary coding's levels and uniform quantisation's scale, learned together (METHODS 1).

Steps cost no more at inference: scale and alphas fold into one set of alphas, scale, zero and middle into one shift, and what
is stored is a plain binary-coded matrix (1.5, the unification).
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import BlockMethod, BlockOptions, LearnedWeight, Outcome, Statistics
from bitpress.engine.methods.quantize.binary import (
    Planes,
    alternate,
    best_of,
    binary_outcome,
    encode_binary,
    fit_rows,
    greedy,
    nearest,
    unified,
    uniform_planes,
    weighted_mean,
)  # fmt: skip
from bitpress.engine.methods.quantize.learned import LevelSum, Reshape, compensated
from bitpress.engine.methods.quantize.pipeline import ClipSearch, search_grid
from bitpress.engine.recipe import FORMAT_BITS, Scheme, WeightScheme


class UniQuanFOptions(BlockOptions):
    """Optimiser, start and mapping."""

    rate: float = Field(default=1e-3, gt=0.0, le=1.0, title="Learning rate", description="Of the factors and the scales; falls to 0 along a cosine.")
    alpha_rate: float = Field(default=1e-4, ge=0.0, le=1.0, title="Learning rate of the alphas", description="Of the numbers that make up the levels.")
    start: Literal["unified", "best"] = Field(
        default="best", title="Start",
        description="unified: levels fitted around the middle of each group's range. best: each group's best of that, clipped uniform and binary levels.",
    )  # fmt: skip
    candidates: int = Field(default=1, ge=1, le=100, title="Ranges tried", description="Shrunk ranges that the unified start tries; 1 keeps the whole range.")
    rounds: int = Field(default=15, ge=0, le=100, title="Fitting rounds", description="Alternating rounds of the start.")
    period: int = Field(
        default=2, ge=1, le=100, title="Mapping period",
        description="Weights may change level at every so many steps only, and then by one place. 1 lets them at every step.",
    )  # fmt: skip
    mapping: Literal["local", "full"] = Field(
        default="local", title="Mapping",
        description="local: to the same level or a neighbour in the order of the signs. full: to the nearest of all levels.",
    )  # fmt: skip


class UniQuanF(BlockMethod):
    """Unified initialisation, local and periodic mapping, unified gradients, unification."""

    name = "uniquanf"
    title = "UniQuanF"
    family = "quantize"
    summary = "Learns where the levels of each group lie and how each weight is stretched before it takes one. Needs text and minutes of training."
    citation = "Park et al. 2025, Unifying Uniform and Binary-coding Quantization for Accurate Compression of Large Language Models, arXiv 2506.03781."
    cost = "Steps times blocks: about half a minute a block for 200 steps at 135M parameters on two quiet cores, the start included."
    use_when = "The format is bcq and minutes of training can be spared; at 2 and 3 bits, where binary coding alone or rounding loses most."
    ability = Ability(part="weights", factors=False, bits=FORMAT_BITS["bcq"], formats=("bcq",))
    Options = UniQuanFOptions

    def start(self, weight_NK: Tensor, scheme: Scheme, stats: Statistics, options: UniQuanFOptions) -> LearnedWeight:
        """The unified start, or the best of three starts."""
        return UnifiedWeight(weight_NK, self.weights_of(scheme), options, stats)


def first_planes(groups_Rg: Tensor, bits: int, options: UniQuanFOptions, importance_Rg: Tensor | None) -> Planes:
    """Alphas and shift before the first step (METHODS 1.3, 1.8)."""
    planes = unified(groups_Rg, bits, options.rounds, options.candidates, importance_Rg)
    if options.start == "unified":
        return planes
    grid = search_grid(groups_Rg, WeightScheme(bits=bits, group_size=0), ClipSearch(), importance_Rg)
    shifted = greedy(groups_Rg, bits, weighted_mean(groups_Rg, importance_Rg), importance_Rg)
    shifted = alternate(groups_Rg, shifted, options.rounds, fit_shift=True, importance_Rg=importance_Rg)
    return best_of(groups_Rg, (planes, uniform_planes(grid, bits), shifted.planes), importance_Rg)


class UnifiedWeight(LearnedWeight):
    """One matrix under UniQuanF.

    Parameters: those of the transform, and alphas in steps of the scale. The offset z - c of the paper is a constant, in
    steps too: shift = -offset * scale.
    """

    def __init__(self, weight_NK: Tensor, scheme: WeightScheme, options: UniQuanFOptions, stats: Statistics) -> None:
        super().__init__()
        self.options, self.bits = options, scheme.bits
        planes = fit_rows(weight_NK, scheme.group_size, lambda *groups: first_planes(groups[0], scheme.bits, options, groups[1]), stats.get("second_moment"))
        scale = planes.alphas.sum(dim=1, keepdim=True).mul_(2 / (2**scheme.bits - 1))
        scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0)
        stored = planes.stored()
        levels_NGL = (stored.levels() + stored.shift).view(len(weight_NK), -1, 2**scheme.bits)
        start_NK, self.notes = compensated(weight_NK, scheme.group_size, levels_NGL, stats, has_zero=False)
        self.reshape = Reshape(start_NK, scheme.group_size, scale)
        self.alphas = nn.Parameter(planes.alphas / scale)
        self.offset_R1 = -planes.shift / scale
        self.places_Rg: Tensor | None = None
        self.calls = 0

    def planes(self) -> Planes:
        """The unified parameters as they are stored, without gradients (METHODS 1.5)."""
        scale = self.reshape.scale()
        return Planes(self.alphas.detach() * scale, -self.offset_R1 * scale).stored()

    def forward(self) -> Tensor:
        """Weights at their levels. In training levels change as the mapping allows; in `eval` mode every weight is at its nearest."""
        planes, seen_Rg = self.planes(), self.reshape.seen()
        places_Rg = self.mapped(seen_Rg, planes)
        levels_Rg = planes.levels().gather(1, places_Rg)
        near_Rg = (seen_Rg - planes.shift).sub_(levels_Rg).abs_() <= planes.alphas.abs().amin(dim=1, keepdim=True)
        made_Rg = levels_Rg + planes.shift
        passed = self.reshape.passed(seen_Rg, made_Rg, near_Rg)
        return self.reshape.matrix(LevelSum.apply(self.alphas, passed, places_Rg, near_Rg, self.reshape.scale()))

    def mapped(self, seen_Rg: Tensor, planes: Planes) -> Tensor:
        """The place of every weight now (METHODS 1.4, local and periodic mapping)."""
        if not self.training:
            return nearest(seen_Rg - planes.shift, planes.levels())
        self.calls += 1
        if self.places_Rg is None or (self.options.mapping == "full" and self.calls % self.options.period == 0):
            self.places_Rg = nearest(seen_Rg - planes.shift, planes.levels())
        elif self.calls % self.options.period == 0:
            self.places_Rg = nearest_neighbour(seen_Rg - planes.shift, planes.levels(), self.places_Rg)
        return self.places_Rg

    def rates(self) -> list[dict[str, Any]]:
        """The transform's rate and the alphas'."""
        return [{"params": list(self.reshape.parameters()), "lr": self.options.rate}, {"params": [self.alphas], "lr": self.options.alpha_rate}]

    def outcome(self) -> Outcome:
        """A plain binary-coded matrix."""
        size = self.reshape.group_size
        seen_NK = self.reshape.matrix(self.reshape.seen())
        return binary_outcome(encode_binary(seen_NK, size, self.planes()), size)


def nearest_neighbour(values_Rg: Tensor, levels_RL: Tensor, places_Rg: Tensor) -> Tensor:
    """The nearest of each weight's present level and its two neighbours in the order of the signs; the present one wins a tie."""
    best, least = places_Rg, (levels_RL.gather(1, places_Rg) - values_Rg).abs_()
    for step in (-1, 1):
        other = (places_Rg + step).clamp_(0, levels_RL.shape[1] - 1)
        gap = (levels_RL.gather(1, other) - values_Rg).abs_()
        best, least = torch.where(gap < least, other, best), torch.minimum(gap, least)
    return best
