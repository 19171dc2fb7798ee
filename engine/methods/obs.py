"""Second-order sweep over the columns of a matrix: what is lost in one column is made up for in those not yet visited.

Optimal brain surgeon with a fixed order of columns, as SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774, section 3) and
GPTQ use it. Knows matrices only. Shapes: N outputs, K inputs, S inputs decided at once, B inputs of a block. The sweep works
on the transpose, [K, N], where the weights of one input lie together.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bitpress.engine.errors import InputError

BLOCK = 128  # columns whose updates are gathered before they reach the rest
LEAST_DAMPING, MOST_DAMPING = 1e-4, 1.0  # of the mean curvature; between them the damping grows tenfold until H can be factorised

Choose = Callable[[Tensor, Tensor, int], Tensor]  # (weight_NS as updated so far, diagonal_S of the factor, first column) -> keep_NS
Round = Callable[[Tensor, int], Tensor]  # (weight_KN as updated so far, column) -> what the column becomes [N]


class InverseFactor(NamedTuple):
    """Upper triangular U, float32 [K, K], with U^T U the inverse of the damped H; what was done to get it, for the run's events."""

    upper_KK: Tensor
    notes: tuple[str, ...] = ()


def inverse_factor(gram_KK: Tensor, damp: float = 0.01) -> Tensor:
    """Upper triangular U with U^T U = (H + damp * mean(diag H) I)^-1, float32. See `factorise`."""
    return factorise(gram_KK, damp).upper_KK


def factorise(gram_KK: Tensor, damp: float) -> InverseFactor:
    """The factor of the inverse of H + damp * mean(diag H) I, in float64 (METHODS 15.2).

    gram_KK: E[x x^T]; a factor of 2 would cancel. An input that is always zero is given the mean curvature. When H is
    singular in spite of the damping, the damping grows tenfold until it is not, and a note says so. With H = L L^T
    built from the last row upwards L is upper triangular, and its inverse is U: no inverse of H is formed.
    Raises InputError when H is not finite, or singular even with its mean added.
    """
    hessian_KK = gram_KK.double()
    if not bool(hessian_KK.sum().isfinite()):
        raise InputError("The second moments of the inputs are not finite.", "", "Calibrate on more or other text, or leave this layer dense.")
    silent_K = hessian_KK.diagonal() <= 0
    mean = float(hessian_KK.diagonal()[~silent_K].mean()) if not bool(silent_K.all()) else 1.0
    hessian_KK = hessian_KK / mean + torch.diag(silent_K.double())
    used = damp
    while (upper_KK := _factor(hessian_KK, used)) is None:
        if used >= MOST_DAMPING:
            raise InputError("The second moments of the inputs cannot be inverted.", "", "Calibrate on more or other text, or leave this layer dense.")
        used = min(max(used, LEAST_DAMPING) * 10, MOST_DAMPING)
    raised = (f"its inputs are linearly dependent; the damping was raised from {damp:g} to {used:g}",) if used != damp else ()
    return InverseFactor((upper_KK / mean**0.5).float(), _silence(silent_K) + raised)


def _silence(silent_K: Tensor) -> tuple[str, ...]:
    silent, inputs = int(silent_K.sum()), len(silent_K)
    return (f"{silent:,} of its {inputs:,} inputs were 0 in all of the calibration text",) if silent else ()


def _factor(hessian_KK: Tensor, damp: float) -> Tensor | None:
    """U of H + damp * I, None when that is singular to working precision."""
    identity_KK = torch.eye(len(hessian_KK), dtype=hessian_KK.dtype, device=hessian_KK.device)
    lower_KK, failed = torch.linalg.cholesky_ex((hessian_KK + damp * identity_KK).flip(0, 1))
    if int(failed):
        return None
    upper_KK = torch.linalg.solve_triangular(lower_KK.flip(0, 1), identity_KK, upper=True)
    return upper_KK if bool(upper_KK.sum().isfinite()) else None


def keeping(keep_NK: Tensor) -> Choose:
    """The choice of weights that was made before the sweep."""
    return lambda weight_NS, _, at: keep_NK[:, at : at + weight_NS.shape[1]]


def sweep(weight_NK: Tensor, factor_KK: Tensor, choose: Choose | None = None, span: int = BLOCK, rounding: Round | None = None, group_size: int = 0) -> Tensor:
    """The matrix after one pass from the first column to the last; weight_NK is not changed.

    choose: decides for `span` columns at a time which weights stay; None keeps all. span divides every block but the last.
    rounding: what a kept weight becomes; None leaves it as it is. group_size: columns that are rounded to one grid, 0 for all.
    """
    made_KN = weight_NK.t().clone(memory_format=torch.contiguous_format)
    for start, stop in blocks(len(made_KN), group_size):
        errors_BN = _sweep_block(made_KN, factor_KK, choose, span, rounding, range(start, stop))
        made_KN[stop:].addmm_(factor_KK[start:stop, stop:].t(), errors_BN, alpha=-1)
    return made_KN.t().contiguous()


def blocks(width: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Runs of at most `BLOCK` columns, as (start, stop): whole groups, or parts of one; so a group starts on corrected weights."""
    size = group_size or width
    span = size * (BLOCK // size) if size <= BLOCK else size
    for first in range(0, width, span):
        end = min(first + span, width)
        yield from ((start, min(start + BLOCK, end)) for start in range(first, end, BLOCK))


def _sweep_block(made_KN: Tensor, factor_KK: Tensor, choose: Choose | None, span: int, rounding: Round | None, columns: range) -> Tensor:
    """Sweep these columns in place; returns their errors over the factor's diagonal, [B, N]."""
    start, stop = columns.start, columns.stop
    block_BN, upper_BB = made_KN[start:stop], factor_KK[start:stop, start:stop]
    errors_BN, diagonal_B = torch.empty_like(block_BN), upper_BB.diagonal()
    keep_SN = torch.empty(0)
    for at in range(stop - start):
        made_N = rounding(made_KN, start + at) if rounding else block_BN[at]
        if choose:
            if at % span == 0:
                keep_SN = choose(block_BN[at : at + span].t(), diagonal_B[at : at + span], start + at).t().contiguous()
            made_N = torch.where(keep_SN[at % span], made_N, 0.0)
        error_N = errors_BN[at].copy_(block_BN[at]).sub_(made_N).div_(diagonal_B[at])
        block_BN[at] = made_N
        block_BN[at + 1 :].addr_(upper_BB[at, at + 1 :], error_N, alpha=-1)
    return errors_BN
