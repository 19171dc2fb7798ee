"""Uniform quantisation in steps that methods share: group, range, grid, rounding. Knows matrices; refuses to know models, layers and files.

Shapes: N outputs, K inputs, G groups a row, g inputs a group. A group is a run of g consecutive inputs of one row;
group size 0 is the whole row. A last short group is filled up with zeros, which changes nothing: zero is in every range
and is always a level, so it widens no range and has no error.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bitpress.engine.recipe import WeightScheme
from bitpress.kernels.rounding import round_groups, widen_codes

SCALE_DTYPE = torch.bfloat16  # what kernels.formats stores
CHUNK_WEIGHTS = 1 << 19  # weights worked on at once: bounds memory and stays in cache


class ClipSearch(NamedTuple):
    """Shrunk ranges tried for each group (METHODS 15.1): range times 1 - i/100 for i below `candidates`, error |e|**exponent."""

    candidates: int = 80
    exponent: float = 2.4


class Codes(NamedTuple):
    """A quantised matrix. Code c of a group stands for (c - zero) * scale; without zeros the zero is 2**(bits - 1)."""

    codes_NK: Tensor  # uint8
    scales_NG: Tensor  # bfloat16
    zeros_NG: Tensor | None  # uint8; bfloat16 where the scheme's zero is a float


class Grid(NamedTuple):
    """The levels of every group: scale and integer zero, of shape [..., 1] and the weights' dtype, and the highest code."""

    scale: Tensor
    zero: Tensor
    top: int


def to_groups(weight_NK: Tensor, group_size: int) -> Tensor:
    """View rows as groups: [N, G, g], zeros behind a short last group."""
    rows, width = weight_NK.shape
    size = group_size or width
    short = -width % size
    padded = torch.nn.functional.pad(weight_NK, (0, short)) if short else weight_NK
    return padded.reshape(rows, -1, size)


def from_groups(groups: Tensor, shape: Sequence[int]) -> Tensor:
    """Groups, [N, G, g] or [N * G, g], as rows of a matrix of `shape` again, what filled a short last group cut off: [N, K]."""
    return groups.reshape(shape[0], -1)[:, : shape[1]]


def group_range(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each group, [..., 1] each, widened to hold 0 so that zeros survive exactly."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    return low.clamp(max=0), high.clamp(min=0)


def make_grid(low: Tensor, high: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype | None = SCALE_DTYPE) -> Grid:
    """Levels for ranges [low, high] (METHODS 15.1).

    Asymmetric: scale = (high - low) / (2**b - 1), zero = round(-low / scale). Symmetric: scale = max|w| / (2**(b-1) - 1),
    codes -2**(b-1) .. 2**(b-1) - 1 stored with an offset. The scale is rounded to its stored type before the zero is
    computed with it; `scale_dtype` None keeps it exact. A group of zeros, or of values too small for a normal float,
    gets scale 1 and so becomes zeros.
    """
    top = 2**scheme.bits - 1
    middle = 2 ** (scheme.bits - 1)
    scale = torch.maximum(high, -low) / (middle - 1) if scheme.symmetric else (high - low) / top
    if scale_dtype is not None:  # the largest floats would round to infinity
        scale = scale.clamp(max=torch.finfo(scale_dtype).max).to(scale_dtype).to(low.dtype)
    scale = torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 1.0)
    zero = torch.full_like(scale, middle) if scheme.symmetric else (-low / scale).round_().clamp_(0, top)
    return Grid(scale, zero, top)


def stored_zero(zero: Tensor, scheme: WeightScheme) -> Tensor:
    """A zero as it is stored: a level of the grid, or any number that bfloat16 holds."""
    return zero.round().clamp(0, 2**scheme.bits - 1) if scheme.zero == "integer" else zero.to(SCALE_DTYPE).to(zero.dtype)


def encode(groups: Tensor, grid: Grid) -> Tensor:
    """Nearest codes, half to even, as whole floating-point numbers in [0, top]."""
    return (groups / grid.scale).round_().add_(grid.zero).clamp_(0, grid.top)


def nearest(groups: Tensor, grid: Grid) -> Tensor:
    """Codes of the nearest levels. A zero that is no level itself is added before rounding."""
    return (groups / grid.scale).add_(grid.zero).round_().clamp_(0, grid.top)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """What codes stand for."""
    return (codes - grid.zero).mul_(grid.scale)


def search_grid(groups: Tensor, scheme: WeightScheme, clip: ClipSearch, importance: Tensor | None = None) -> Grid:
    """The grid of smallest error among shrunk ranges, for each group on its own; the widest wins a tie (METHODS 15.1).

    importance: a factor for each weight's error, of a shape that the groups' can be multiplied by; None counts all alike.
    """
    low, high = group_range(groups)
    best = make_grid(low, high, scheme)
    best_error = _error(groups, best, clip.exponent, importance)
    scale, zero = best.scale.clone(), best.zero.clone()
    for step in range(1, clip.candidates):
        shrink = 1 - step / 100
        trial = make_grid(low * shrink, high * shrink, scheme)
        error = _error(groups, trial, clip.exponent, importance)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        scale, zero = torch.where(better, trial.scale, scale), torch.where(better, trial.zero, zero)
    return Grid(scale, zero, best.top)


def _error(groups: Tensor, grid: Grid, exponent: float, importance: Tensor | None) -> Tensor:
    powers = decode(encode(groups, grid), grid).sub_(groups).abs_().pow_(exponent)
    return (powers if importance is None else powers.mul_(importance)).sum(dim=-1, keepdim=True)


def quantize_groups(weight_NK: Tensor, scheme: WeightScheme, clip: ClipSearch | None = None) -> Codes:
    """Round every weight to the nearest level of its group's grid.

    weight_NK: float32 [N, K], finite. Rows are worked on in chunks, so memory beyond the result is a few MB.
    """
    whole = scheme.symmetric or scheme.zero == "integer"
    if clip is None and whole and (made := round_groups(weight_NK, scheme.bits, scheme.group_size, scheme.symmetric)):
        return Codes(*made)
    rows = max(1, CHUNK_WEIGHTS // weight_NK.shape[1])
    parts = [_quantize_rows(chunk, scheme, clip) for chunk in weight_NK.split(rows)]
    codes, scales, zeros = zip(*parts, strict=True)
    return Codes(torch.cat(codes), torch.cat(scales), None if scheme.symmetric else torch.cat(zeros))


def _quantize_rows(weight_NK: Tensor, scheme: WeightScheme, clip: ClipSearch | None) -> Codes:
    groups = to_groups(weight_NK, scheme.group_size)
    grid = search_grid(groups, scheme, clip) if clip else make_grid(*group_range(groups), scheme)
    return codes_on(groups, grid, scheme, weight_NK.shape)


def codes_on(groups: Tensor, grid: Grid, scheme: WeightScheme, shape: Sequence[int]) -> Codes:
    """The nearest codes of a matrix of `shape`, as they are stored. groups, grid: [N, G, ...] or [N * G, ...]; zeros as the scheme has them."""
    whole = scheme.symmetric or scheme.zero == "integer"
    codes_NK = from_groups((encode if whole else nearest)(groups, grid).to(torch.uint8), shape).contiguous()
    zeros_NG = None if scheme.symmetric else grid.zero.reshape(shape[0], -1).to(torch.uint8 if whole else SCALE_DTYPE)
    return Codes(codes_NK, grid.scale.reshape(shape[0], -1).to(SCALE_DTYPE), zeros_NG)


def dequantize_groups(codes: Codes, scheme: WeightScheme) -> Tensor:
    """The float32 matrix [N, K] that codes stand for; exactly what kernels.reference computes from the packed tensors."""
    scales_NG, middle = codes.scales_NG.float(), 2 ** (scheme.bits - 1)
    zeros_NG = torch.full_like(scales_NG, middle) if codes.zeros_NG is None else codes.zeros_NG.float()
    made_NK = widen_codes(codes.codes_NK, codes.scales_NG, zeros_NG, scheme.group_size)
    if made_NK is not None:
        return made_NK
    groups = to_groups(codes.codes_NK, scheme.group_size).float()
    grid = Grid(scales_NG.unsqueeze(-1), zeros_NG.unsqueeze(-1), 2**scheme.bits - 1)
    return from_groups(decode(groups, grid), codes.codes_NK.shape).contiguous()
