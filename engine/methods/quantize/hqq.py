"""HQQ: the zero of each group is sought so that the errors are few and large rather than many and small; looks at no text (METHODS 15.6).

Shapes: N outputs, K inputs, G groups a row, g inputs a group.
"""

import torch
from pydantic import Field
from torch import Tensor

from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import LinearMethod, MethodOptions, Outcome, Statistics
from bitpress.engine.methods.quantize.pipeline import (
    CHUNK_WEIGHTS,
    SCALE_DTYPE,
    Codes,
    Grid,
    decode,
    dequantize_groups,
    from_groups,
    group_range,
    make_grid,
    nearest,
    quantize_groups,
    stored_zero,
    to_groups,
)  # fmt: skip
from bitpress.engine.recipe import BITS, Scheme, WeightScheme

MOVED_ZEROS = "its pruned weights are no longer exactly 0, since a zero that is a float need not be a level"


class HqqOptions(MethodOptions):
    """The half-quadratic solver."""

    iterations: int = Field(default=20, ge=1, le=200, title="Iterations", description="Steps of the solver at most; it stops when the error grows.")
    norm: float = Field(
        default=0.7, gt=0.0, le=1.0, title="Norm", description="The sum of |error| to this power is made small. Smaller cares less about few large errors."
    )
    beta: float = Field(default=10.0, gt=0.0, le=1e4, title="Stiffness", description="How closely the auxiliary errors follow the real ones at first.")
    growth: float = Field(default=1.01, ge=1.0, le=2.0, title="Growth of the stiffness", description="Factor after each iteration.")


class Hqq(LinearMethod):
    """Proximal steps on the errors, closed form for the zeros."""

    name = "hqq"
    title = "HQQ"
    family = "quantize"
    summary = "Shifts each group's grid so that most weights are hit closely and a few outliers take the error. Takes seconds and looks at no text."
    citation = "Badri and Shaji 2023, Half-quadratic quantization of large machine learning models, Mobius Labs."
    cost = "Seconds for a small model; grows with the iterations."
    use_when = "Choose it when there is no text to calibrate on, with zeros stored as floats; at 8 bits it gains nothing over rounding to nearest."
    ability = Ability(part="weights", bits=BITS, zeros=("integer", "float"))
    Options = HqqOptions

    def apply(self, weight_NK: Tensor, scheme: Scheme, stats: Statistics, options: HqqOptions) -> Outcome:
        """Quantise one matrix. Symmetric grids have no zero to seek and are rounded to nearest, which a note says."""
        weights = self.weights_of(scheme)
        if weights.symmetric:
            codes = quantize_groups(weight_NK, weights)
            return Outcome(dequantize_groups(codes, weights), codes, notes=("its grids are symmetric, so there is no zero to seek: rounded to nearest",))
        rows = max(1, CHUNK_WEIGHTS // weight_NK.shape[1])
        parts = [_solve_rows(chunk, weights, options) for chunk in weight_NK.split(rows)]
        codes = Codes(*(torch.cat(column) for column in zip(*parts, strict=True)))
        moved = scheme.sparsity is not None and scheme.sparsity.ratio > 0 and weights.zero == "float"
        return Outcome(dequantize_groups(codes, weights), codes, notes=(MOVED_ZEROS,) if moved else ())


def _solve_rows(weight_NK: Tensor, scheme: WeightScheme, options: HqqOptions) -> tuple[Tensor, Tensor, Tensor]:
    groups, real = to_groups(weight_NK, scheme.group_size), to_groups(torch.ones_like(weight_NK[:1]), scheme.group_size)
    grid = start_grid(groups, real, scheme)
    codes, grid = solve(groups, real, grid, scheme, options)
    codes_NK = from_groups(codes.to(torch.uint8), weight_NK.shape)
    return codes_NK, grid.scale.squeeze(-1).to(SCALE_DTYPE), grid.zero.squeeze(-1).to(torch.uint8 if scheme.zero == "integer" else SCALE_DTYPE)


def start_grid(groups: Tensor, real: Tensor, scheme: WeightScheme) -> Grid:
    """The min-max grid; with float zeros 0 need not be inside the range. real: 1 for weights, 0 behind a short last group."""
    if scheme.zero == "integer":
        return make_grid(*group_range(groups), scheme)
    top = 2**scheme.bits - 1
    low = groups.masked_fill(real == 0, torch.inf).amin(dim=-1, keepdim=True)
    high = groups.masked_fill(real == 0, -torch.inf).amax(dim=-1, keepdim=True)
    scale = ((high - low) / top).clamp(max=torch.finfo(SCALE_DTYPE).max).to(SCALE_DTYPE).float()
    flat = scale < torch.finfo(torch.float32).tiny
    # A group of equal weights has no range: one step of their own size, from 0, holds them.
    scale = torch.where(flat, torch.where(low.abs() > torch.finfo(torch.float32).tiny, low.abs(), 1.0).to(SCALE_DTYPE).float(), scale)
    return Grid(scale, stored_zero(torch.where(flat, (low < 0).float(), -low / scale), scheme), top)


def solve(groups: Tensor, real: Tensor, grid: Grid, scheme: WeightScheme, options: HqqOptions) -> tuple[Tensor, Grid]:
    """Codes and grid once the zeros stand: errors are shrunk towards none, and the zero takes the mean of what is left.

    Stops when the mean |error| of these rows grows. The last zero is kept, as published, not that of least |error|: it leaves
    each group's errors with a mean near 0, and that is what keeps the outputs where they were.
    """
    count, beta, least = real.sum(dim=-1, keepdim=True), options.beta, float("inf")
    for _ in range(options.iterations):
        codes = nearest(groups, grid)
        error = (groups - decode(codes, grid)).mul_(real)
        kept = error.sign() * (error.abs() - error.abs().pow(options.norm - 1) / beta).clamp_(min=0.0)
        grid = grid._replace(zero=((codes - (groups - kept) / grid.scale) * real).sum(-1, keepdim=True) / count)
        found = float(error.abs().mean())
        if found >= least:
            break
        least = found
        beta *= options.growth
    grid = grid._replace(zero=stored_zero(grid.zero, scheme))
    return nearest(groups, grid), grid
