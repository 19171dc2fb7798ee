"""Second-order sweep over the columns of a matrix: what is lost in one column is made up for in those not yet visited.

Optimal brain surgeon with a fixed order of columns, as SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774, section 3) and
GPTQ use it. Knows matrices only. Shapes: N outputs, K inputs, S inputs decided at once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bitpress.engine.errors import BitpressError

BLOCK = 128  # columns whose updates are gathered before they reach the rest
TRIES = 6  # each with ten times the damping of the one before

Choose = Callable[[Tensor, Tensor, int], Tensor]  # (weight_NS as updated so far, diagonal_S of the factor, first column) -> keep_NS
Round = Callable[[Tensor, int], Tensor]  # (weight_NK as updated so far, column) -> the rounded column [N]


def inverse_factor(gram_KK: Tensor, damp: float = 0.01) -> Tensor:
    """Upper triangular U with U^T U = (H + damp * mean(diag H) I)^-1, float32.

    gram_KK: E[x x^T], float64; a factor of 2 would cancel. An input that is always zero counts as having the curvature 1.
    Raises BitpressError when H stays singular at a hundred thousand times the damping.
    """
    hessian_KK = gram_KK.double().clone()
    diagonal_K = hessian_KK.diagonal()
    diagonal_K[diagonal_K <= 0] = 1.0
    mean = float(diagonal_K.mean())
    for step in range(TRIES):
        diagonal_K += (damp * 10**step or 1e-8) * mean
        lower_KK, failed = torch.linalg.cholesky_ex(hessian_KK)
        if not failed:
            return torch.linalg.cholesky(torch.cholesky_inverse(lower_KK), upper=True).float()
    why = "Its input statistics are singular."
    raise BitpressError("The weights cannot be repaired.", why, "Calibrate on more or other text, or choose no repair.")


def sweep(weight_NK: Tensor, factor_KK: Tensor, choose: Choose, span: int = BLOCK, rounding: Round | None = None, block: int = BLOCK) -> Tensor:
    """The matrix after one pass from the first column to the last; weight_NK is not changed.

    choose: decides for `span` columns at a time which weights stay; span divides block. rounding: what a kept weight becomes;
    None leaves it as it is.
    """
    made_NK = weight_NK.clone()
    width = made_NK.shape[1]
    for start in range(0, width, block):
        stop = min(start + block, width)
        errors_NB = _sweep_block(made_NK, factor_KK, choose, span, rounding, range(start, stop))
        made_NK[:, stop:] -= errors_NB @ factor_KK[start:stop, stop:]
    return made_NK


def _sweep_block(made_NK: Tensor, factor_KK: Tensor, choose: Choose, span: int, rounding: Round | None, columns: range) -> Tensor:
    """Sweep these columns in place; returns their errors over the factor's diagonal, [N, B]."""
    start, stop = columns.start, columns.stop
    errors_NB = torch.empty_like(made_NK[:, start:stop])
    diagonal_K = factor_KK.diagonal()
    keep_NS = torch.empty(0)
    for at in columns:
        if (at - start) % span == 0:
            end = min(at + span, stop)
            keep_NS = choose(made_NK[:, at:end], diagonal_K[at:end], at)
        kept_N = rounding(made_NK, at) if rounding else made_NK[:, at]
        column_N = torch.where(keep_NS[:, (at - start) % span], kept_N, 0.0)
        error_N = (made_NK[:, at] - column_N) / diagonal_K[at]
        made_NK[:, at] = column_N
        made_NK[:, at + 1 : stop] -= error_N[:, None] * factor_KK[at, at + 1 : stop]
        errors_NB[:, at - start] = error_N
    return errors_NB
