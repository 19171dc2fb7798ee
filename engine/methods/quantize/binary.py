"""Binary-coded quantisation in steps that methods share: greedy start, alternating fit, nearest level. Knows groups; refuses to know models, layers and files.

A group of g weights is written as sum_i alpha_i b_i + shift with n signs b_i in {+1, -1} a weight (METHODS 1.2, 15.11). Shapes: R
groups (rows times groups a row), g weights a group, n planes, L = 2**n levels. A *place* is the number of a level in the order of
the signs (+1, +1, ...), ..., (-1, -1, ...): place 0 is the sum of all alphas, neighbours differ in the sign of the smallest.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from bitpress.engine.methods.base import Outcome
from bitpress.engine.methods.quantize.pipeline import Grid, to_groups
from bitpress.kernels.binary import pack_binary
from bitpress.kernels.layout import BinaryLayout
from bitpress.kernels.reference import dequantize

STORED = torch.bfloat16  # alphas and shift, as kernels.formats stores them
CHUNK_WEIGHTS = 1 << 18  # weights worked on at once: bounds memory and stays in cache
FEW = 15  # thresholds up to which comparing with each is faster than a search


class Planes(NamedTuple):
    """The parameters of R groups: alphas [R, n] and shift [R, 1], in one dtype."""

    alphas: Tensor
    shift: Tensor

    def levels(self) -> Tensor:
        """The values that the places stand for, shift left out: [R, L]."""
        return self.alphas @ signs(self.alphas.shape[1]).to(self.alphas).t()

    def stored(self) -> "Planes":
        """The same, rounded to the type they are stored in. Codes are to be chosen on these."""
        top = torch.finfo(STORED).max
        return Planes(*(part.clamp(-top, top).to(STORED).to(part.dtype) for part in self))


@cache
def signs(bits: int) -> Tensor:
    """The signs of every place: float32 [L, n]; the last column changes fastest."""
    return 1.0 - 2.0 * torch.cartesian_prod(*[torch.arange(2)] * bits).view(-1, bits).float()


def nearest(values_Rg: Tensor, levels_RL: Tensor) -> Tensor:
    """The place of the nearest level of each group's own list, the higher level of two that are equally near: int64 [R, g]."""
    ordered_RL, order_RL = levels_RL.sort(dim=1)
    middles = ((ordered_RL[:, 1:] + ordered_RL[:, :-1]) / 2).contiguous()
    chunk = max(1, CHUNK_WEIGHTS // values_Rg.shape[1])
    parts = zip(values_Rg.split(chunk), middles.split(chunk), order_RL.split(chunk), strict=True)
    return torch.cat([order.gather(1, _below(values, middle)) for values, middle, order in parts])


def _below(values_Rg: Tensor, middles: Tensor) -> Tensor:
    """How many of a group's rising middles are at or below each value: int64."""
    if middles.shape[1] > FEW:
        return torch.searchsorted(middles, values_Rg.contiguous(), right=True)
    count = torch.zeros(values_Rg.shape, dtype=torch.uint8, device=values_Rg.device)
    for column in middles.split(1, dim=1):
        count += values_Rg >= column
    return count.long()


def decode(places_Rg: Tensor, planes: Planes) -> Tensor:
    """What places stand for, [R, g]."""
    return planes.levels().gather(1, places_Rg) + planes.shift


class Fit(NamedTuple):
    """Parameters of R groups and the place of every weight, int64 [R, g]."""

    planes: Planes
    places_Rg: Tensor


def weighted_mean(values_Rg: Tensor, importance_Rg: Tensor | None) -> Tensor:
    """The mean of each group, [R, 1], every weight counted as often as its importance says; 0 where none has any."""
    if importance_Rg is None:
        return values_Rg.mean(dim=1, keepdim=True)
    whole = importance_Rg.sum(dim=1, keepdim=True)
    return torch.where(whole > 0, (values_Rg * importance_Rg).sum(dim=1, keepdim=True) / whole, 0.0)


def greedy(groups_Rg: Tensor, bits: int, shift: Tensor, importance_Rg: Tensor | None = None) -> Fit:
    """Plane by plane: the signs of what is left, and its mean size as their alpha; the sign of 0 is +1 (METHODS 1.3, 0.6)."""
    left, places, alphas = groups_Rg - shift, torch.zeros_like(groups_Rg, dtype=torch.int64), []
    for _ in range(bits):
        alphas.append(weighted_mean(left.abs(), importance_Rg))
        below = left < 0
        places = 2 * places + below
        left = left - torch.where(below, -alphas[-1], alphas[-1])
    return Fit(Planes(torch.cat(alphas, dim=1), shift), places)


def alternate(groups_Rg: Tensor, fit: Fit, rounds: int, fit_shift: bool, importance_Rg: Tensor | None = None) -> Fit:
    """Least squares and nearest places in turn; neither half ever raises a group's squared error (METHODS 1.3, 0.6 ii).

    importance_Rg: what each weight's squared error counts; None is the same for all.
    """
    for _ in range(rounds):
        planes = refit(groups_Rg, fit, fit_shift, importance_Rg)
        fit = Fit(planes, nearest(groups_Rg - planes.shift, planes.levels()))
    return fit


def refit(groups_Rg: Tensor, fit: Fit, fit_shift: bool, importance_Rg: Tensor | None = None) -> Planes:
    """The alphas, and on request the shift, of least squared error for the fit's places; alphas positive and falling.

    The normal equations are walked from the present values by conjugate gradients, as many steps as unknowns: where they
    are singular (all weights of a group at one level) the error still cannot rise.
    """
    planes, bits = fit.planes, fit.planes.alphas.shape[1]
    design = signs(bits).to(groups_Rg)
    start, target = planes.alphas, groups_Rg - planes.shift
    if fit_shift:
        design = torch.cat([design, torch.ones_like(design[:, :1])], dim=1)
        start, target = torch.cat(list(planes), dim=1), groups_Rg
    counted = (torch.ones_like(target), target) if importance_Rg is None else (importance_Rg, importance_Rg * target)
    counts_RL, sums_RL = (target.new_zeros(len(target), 2**bits).scatter_add_(1, fit.places_Rg, part) for part in counted)
    matrix = (counts_RL @ (design[:, :, None] * design[:, None, :]).flatten(1)).unflatten(1, (design.shape[1], -1))
    right = sums_RL @ design
    found = conjugate_gradients(matrix, right, start)
    # A negative alpha and its mirrored signs are the same set of levels.
    return Planes(found[:, :bits].abs().sort(dim=1, descending=True).values, found[:, bits:] if fit_shift else planes.shift)


def conjugate_gradients(matrix: Tensor, right: Tensor, start: Tensor) -> Tensor:
    """Approach the solutions of R small symmetric systems [R, m, m] x = [R, m] from `start`; exact after m steps where regular."""
    found, flat = start, 1e-6 * matrix.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True)
    rest = right - (matrix @ found[..., None])[..., 0]
    way = rest
    for _ in range(right.shape[1]):
        power = rest.square().sum(dim=1, keepdim=True)
        ahead = (matrix @ way[..., None])[..., 0]
        curve = (way * ahead).sum(dim=1, keepdim=True)
        step = torch.where(curve > flat * way.square().sum(dim=1, keepdim=True), power / curve, 0.0)
        found, rest = found + step * way, rest - step * ahead
        way = rest + torch.where(power > 0, rest.square().sum(dim=1, keepdim=True) / power, 0.0) * way
    return found


def unified(groups_Rg: Tensor, bits: int, rounds: int, candidates: int, importance_Rg: Tensor | None = None) -> Planes:
    """The start of METHODS 1.3: a uniform grid's shift, searched over shrunk ranges that keep the lower end, and alphas fitted to it.

    The i-th of G candidates puts the middle of the levels at min + i/G * (max - min) / 2; the least sum of |error|**2.4
    wins, for each group on its own. With one candidate the shift is the middle of the range.
    """
    low, high = groups_Rg.aminmax(dim=1, keepdim=True)
    best, least = None, None
    for number in range(candidates, 0, -1):
        shift = low + (high - low) / 2 * (number / candidates)
        start = greedy(groups_Rg, bits, shift, importance_Rg)
        planes = alternate(groups_Rg, start, rounds, fit_shift=False, importance_Rg=importance_Rg).planes
        error = error_of(groups_Rg, planes, 2.4, importance_Rg)
        best, least = (planes, error) if best is None or least is None else _better(best, least, planes, error)
    assert best is not None
    return best


def _better(best: Planes, least: Tensor, other: Planes, error: Tensor) -> tuple[Planes, Tensor]:
    less = error < least
    return Planes(*(torch.where(less, new, old) for new, old in zip(other, best, strict=True))), torch.minimum(error, least)


def best_of(groups_Rg: Tensor, choices: Sequence[Planes], importance_Rg: Tensor | None = None) -> Planes:
    """For each group the parameters of least squared error among the choices; the first wins a tie."""
    best, least = choices[0], error_of(groups_Rg, choices[0], 2.0, importance_Rg)
    for other in choices[1:]:
        best, least = _better(best, least, other, error_of(groups_Rg, other, 2.0, importance_Rg))
    return best


def error_of(groups_Rg: Tensor, planes: Planes, exponent: float = 2.0, importance_Rg: Tensor | None = None) -> Tensor:
    """Sum of |w - nearest level|**exponent of each group, [R, 1], times each weight's importance."""
    made = decode(nearest(groups_Rg - planes.shift, planes.levels()), planes)
    powers = (made - groups_Rg).abs_().pow_(exponent)
    return (powers if importance_Rg is None else powers.mul_(importance_Rg)).sum(dim=1, keepdim=True)


def uniform_planes(grid: Grid, bits: int) -> Planes:
    """A uniform grid as binary code: every alpha half of the one before, the shift the middle of the grid (METHODS 1.5)."""
    halves = 2.0 ** torch.arange(bits - 2, -2, -1, dtype=grid.scale.dtype)
    return Planes(grid.scale * halves, grid.scale * ((2**bits - 1) / 2 - grid.zero))


def fit_rows(weight_NK: Tensor, group_size: int, fit: Callable[[Tensor, Tensor | None], Planes], importance_K: Tensor | None = None) -> Planes:
    """The parameters of every group of a matrix, row by row; a short last group of the rows is fitted on its own.

    weight_NK: float32 [N, K], finite. fit: parameters of groups [R, g], whose weights have the importance [R, g] or None.
    importance_K: what the squared error of each input's weights counts.
    """
    rows, columns = weight_NK.shape
    size = group_size or columns
    whole = columns - columns % size
    spans = [slice(0, whole), slice(whole, columns)] if 0 < whole < columns else [slice(0, columns)]
    parts = [weight_NK[:, span].reshape(-1, min(size, span.stop - span.start)) for span in spans]
    every = None if importance_K is None else shares_of(importance_K).expand(rows, -1)
    counts = [None if every is None else every[:, span].reshape(part.shape) for span, part in zip(spans, parts, strict=True)]
    made = [_fit_groups(part, fit, importance) for part, importance in zip(parts, counts, strict=True)]
    joined = (torch.cat([part.view(rows, -1, part.shape[1]) for part in column], dim=1) for column in zip(*made, strict=True))
    return Planes(*(column.flatten(0, 1) for column in joined))


def shares_of(importance_K: Tensor) -> Tensor:
    """Importances in units of their mean, float32; an input that the text hardly moved still counts a thousandth."""
    mean = importance_K.mean()
    return (importance_K / mean if mean > 0 else torch.ones_like(importance_K)).clamp_min(1e-3).float()


def _fit_groups(groups_Rg: Tensor, fit: Callable[[Tensor, Tensor | None], Planes], importance_Rg: Tensor | None) -> Planes:
    """A group is fitted in units of its largest weight: squares of very large and very small ones would leave float32."""
    largest = groups_Rg.abs().amax(dim=1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0)
    chunk = max(1, CHUNK_WEIGHTS // groups_Rg.shape[1])
    counts = importance_Rg.split(chunk) if importance_Rg is not None else [None] * -(-len(groups_Rg) // chunk)
    pieces = [fit(piece / size, count) for piece, size, count in zip(groups_Rg.split(chunk), unit.split(chunk), counts, strict=True)]
    return Planes(*(torch.cat(column) * unit for column in zip(*pieces, strict=True)))


class BinaryCodes(NamedTuple):
    """A binary-coded matrix: the place of every weight, and what its group's planes are worth."""

    places_NK: Tensor  # uint8
    alphas_NGB: Tensor  # bfloat16
    shifts_NG: Tensor  # bfloat16

    @property
    def plus_NBK(self) -> Tensor:
        """True where a plane adds its alpha, false where it takes it away: bool [N, B, K]."""
        falling = torch.arange(self.alphas_NGB.shape[2] - 1, -1, -1, dtype=torch.uint8, device=self.places_NK.device)
        return (self.places_NK[:, None] >> falling[:, None]) & 1 == 0


def encode_binary(weight_NK: Tensor, group_size: int, planes: Planes) -> BinaryCodes:
    """Every weight at its nearest level, once the parameters of its group [N * G of them] are rounded to their stored type."""
    stored, groups_Rg = planes.stored(), to_groups(weight_NK, group_size).flatten(0, 1)
    chunk = max(1, CHUNK_WEIGHTS // groups_Rg.shape[1])
    pieces = zip(groups_Rg.split(chunk), stored.shift.split(chunk), stored.levels().split(chunk), strict=True)
    places_Rg = torch.cat([nearest(groups - shift, levels).to(torch.uint8) for groups, shift, levels in pieces])
    rows, columns = weight_NK.shape
    alphas_NGB = stored.alphas.view(rows, -1, stored.alphas.shape[1]).to(STORED)
    return BinaryCodes(places_Rg.view(rows, -1)[:, :columns].contiguous(), alphas_NGB, stored.shift.view(rows, -1).to(STORED))


def binary_outcome(codes: BinaryCodes, group_size: int) -> Outcome:
    """The codes packed, and the matrix that the packed tensors stand for."""
    layout = BinaryLayout(codes.alphas_NGB.shape[2], group_size)
    packed = pack_binary(codes.plus_NBK, codes.alphas_NGB, codes.shifts_NG, layout)
    return Outcome(dequantize(packed), packed=packed)
