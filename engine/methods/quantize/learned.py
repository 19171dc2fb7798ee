"""What the learned quantisers share: weights reshaped before they are rounded, and the gradients of that. Knows groups; refuses to know blocks.

FlexRound's transform (METHODS 1.2, 1.9): a weight w of a group with step s = exp(log_scale) is seen as w / exp(log_scale + element +
group), element a number a weight and group one a group. Multiplied by s again, it is v = w / exp(element + group), which is rounded to
the nearest level. Shapes: R groups, g weights a group, n planes, L levels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitpress.engine.methods.base import Outcome, Statistics
from bitpress.engine.methods.obs import factorise, keeping, sweep
from bitpress.engine.methods.quantize.binary import shares_of, signs
from bitpress.engine.methods.quantize.pipeline import ClipSearch, Grid, codes_on, dequantize_groups, from_groups, search_grid, to_groups
from bitpress.engine.methods.quantize.refine import Target, refine, zeros_of
from bitpress.engine.recipe import WeightScheme

DAMPING = 0.01  # GPTQ's
REACH = 0.45  # of a step: how far from its level a weight may start


def searched_grid(weight_NK: Tensor, scheme: WeightScheme, importance_K: Tensor | None) -> Grid:
    """The uniform grid that every group starts with, [R, 1] each: of a clip search with error |e|**2.4, times each input's importance."""
    importance = None if importance_K is None else to_groups(shares_of(importance_K).expand_as(weight_NK), scheme.group_size).flatten(0, 1)
    return search_grid(to_groups(weight_NK, scheme.group_size).flatten(0, 1), scheme, ClipSearch(), importance)


class Compensated(NamedTuple):
    """A matrix before its first step, and what was done to get it."""

    weight_NK: Tensor
    notes: tuple[str, ...] = ()


def compensated(weight_NK: Tensor, group_size: int, levels_NGL: Tensor, stats: Statistics, has_zero: bool = True) -> Compensated:
    """The matrix whose every weight, rounded to its nearest level, makes up for the rounding of those before it (METHODS 15.2).

    levels_NGL: the levels of every group of every row. Without second moments ("gram") of the inputs, the weights as they are.
    has_zero: 0 is a level, and weights that are 0 keep it: they may be pruned.
    """
    if "gram" not in stats:
        return Compensated(weight_NK)
    seen_KN, size = torch.zeros_like(weight_NK.t(), memory_format=torch.contiguous_format), group_size or weight_NK.shape[1]
    free_NK = weight_NK != 0 if has_zero else None

    def round_column(made_KN: Tensor, column: int) -> Tensor:
        levels_NL, seen_N = levels_NGL[:, column // size], made_KN[column]
        seen_KN[column] = seen_N if free_NK is None else torch.where(free_NK[:, column], seen_N, 0.0)
        return levels_NL.gather(1, (levels_NL - seen_N[:, None]).abs_().argmin(dim=1, keepdim=True))[:, 0]

    choose = None if free_NK is None else keeping(free_NK)
    factor = factorise(stats["gram"], DAMPING)
    sweep(weight_NK, factor.upper_KK, choose, rounding=round_column)
    return Compensated(seen_KN.t().contiguous(), factor.notes)


def mended(seen_NK: Tensor, grid: Grid, scheme: WeightScheme, target: Target, rounds: int) -> tuple[Tensor, Grid]:
    """The start of a training after codes and grids were mended in turn: weights that round to the new codes, and their grid, [R, 1] each.

    A weight keeps its place between levels where it still rounds to its code; one whose code changed is put just inside that code's reach.
    """
    codes = codes_on(to_groups(seen_NK, scheme.group_size).flatten(0, 1), grid, scheme, seen_NK.shape)
    codes = refine(codes, target, scheme, rounds, target.weight_NK != 0 if scheme.zero == "integer" else None)
    reach_NG1 = codes.scales_NG.float().unsqueeze(-1) * REACH
    made, seen = (to_groups(matrix, scheme.group_size) for matrix in (dequantize_groups(codes, scheme), seen_NK))
    kept_NK = from_groups(torch.minimum(torch.maximum(seen, made - reach_NG1), made + reach_NG1), seen_NK.shape)
    return kept_NK.contiguous(), Grid(codes.scales_NG.float().view(-1, 1), zeros_of(codes, scheme).view(-1, 1), grid.top)


def uniform_levels(grid: Grid, rows: int) -> Tensor:
    """The levels of groups [R, 1] as [N, G, L]."""
    return ((torch.arange(grid.top + 1) - grid.zero) * grid.scale).view(rows, -1, grid.top + 1)


def uniform_outcome(groups_Rg: Tensor, grid: Grid, scheme: WeightScheme, shape: Sequence[int]) -> Outcome:
    """Uniform codes of the nearest levels, and the matrix that they stand for."""
    codes = codes_on(groups_Rg, grid, scheme, shape)
    return Outcome(dequantize_groups(codes, scheme), codes)


class Reshape(nn.Module):
    """The learned transform of one matrix; starts as the identity."""

    def __init__(self, weight_NK: Tensor, group_size: int, scale_R1: Tensor) -> None:
        """scale_R1: the step of every group, positive."""
        super().__init__()
        self.shape, self.group_size = tuple(weight_NK.shape), group_size
        self.weight_Rg = to_groups(weight_NK, group_size).flatten(0, 1)
        self.log_scale = nn.Parameter(scale_R1.log())
        self.element = nn.Parameter(torch.zeros_like(self.weight_Rg))
        self.group = nn.Parameter(torch.zeros_like(scale_R1))

    def seen(self) -> Tensor:
        """v [R, g], without gradients."""
        with torch.no_grad():
            return (self.element + self.group).neg_().exp_().mul_(self.weight_Rg)

    def scale(self) -> Tensor:
        """s [R, 1], without gradients."""
        return self.log_scale.detach().exp()

    def passed(self, seen_Rg: Tensor, made_Rg: Tensor, near_Rg: Tensor) -> Tensor:
        """`made`, the levels chosen for `seen`, with the gradients of `StraightThrough`: [R, g]."""
        return StraightThrough.apply(self.log_scale, self.element, self.group, seen_Rg, made_Rg, near_Rg)

    def matrix(self, groups_Rg: Tensor) -> Tensor:
        """Groups as rows of the matrix again."""
        return from_groups(groups_Rg, self.shape)


class StraightThrough(torch.autograd.Function):
    """Passes `made` on; its gradient g reaches the transform as if rounding were the identity wherever `near` (METHODS 1.4).

    With v the seen weights and f = near: dL/delement = -g v f, dL/dgroup its sum over the group, and dL/dlog_scale the sum
    of g * made - g v f.
    """

    @staticmethod
    def forward(ctx: Any, log_scale: Tensor, element: Tensor, group: Tensor, seen_Rg: Tensor, made_Rg: Tensor, near_Rg: Tensor) -> Tensor:
        """`made_Rg` itself."""
        ctx.save_for_backward(seen_Rg, made_Rg, near_Rg)
        return made_Rg.view_as(made_Rg)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of log_scale [R, 1], element [R, g] and group [R, 1]."""
        seen_Rg, made_Rg, near_Rg = ctx.saved_tensors
        element = (grads[0] * seen_Rg).mul_(near_Rg).neg_()
        group = element.sum(dim=1, keepdim=True)
        scale = torch.linalg.vecdot(grads[0], made_Rg)[:, None] + group
        return scale, element, group, None, None, None


class LevelSum(torch.autograd.Function):
    """Adds 0 to `made`; gives every alpha its true gradient, the signed sum of g over the weights that are near (METHODS 1.4)."""

    @staticmethod
    def forward(ctx: Any, alphas_Rn: Tensor, made_Rg: Tensor, places_Rg: Tensor, near_Rg: Tensor, scale_R1: Tensor) -> Tensor:
        """`made_Rg` itself."""
        ctx.save_for_backward(places_Rg, near_Rg, scale_R1)
        ctx.planes = alphas_Rn.shape[1]
        return made_Rg.view_as(made_Rg)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the alphas [R, n] and, unchanged, of `made`."""
        places_Rg, near_Rg, scale_R1 = ctx.saved_tensors
        by_place_RL = grads[0].new_zeros(len(places_Rg), 2**ctx.planes).scatter_add_(1, places_Rg, grads[0] * near_Rg)
        return by_place_RL @ signs(ctx.planes) * scale_R1, grads[0], None, None, None
