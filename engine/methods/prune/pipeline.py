"""Pruning in steps that methods share: score, selection within a budget, repair, removal. Knows matrices only.

A method brings scores [N, K], higher meaning more important. The budget is met exactly, and among equal scores the
weights that come first in memory go first, so that a result can be repeated.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from bitpress.engine.recipe import SparsityScheme

Scope = Literal["layer", "row"]
Repair = Callable[[Tensor, Tensor], Tensor]  # (weight_NK, keep_NK) -> weight_NK that makes up for what goes


def prune_matrix(weight_NK: Tensor, score_NK: Tensor, scheme: SparsityScheme, scope: Scope = "layer", repair: Repair | None = None) -> Tensor:
    """The matrix with its least important weights at zero; weight_NK itself is not changed."""
    keep_NK = select(score_NK, scheme, scope)
    repaired = repair(weight_NK, keep_NK) if repair else weight_NK
    return torch.where(keep_NK, repaired, 0.0)


def select(score_NK: Tensor, scheme: SparsityScheme, scope: Scope = "layer") -> Tensor:
    """Which weights stay, bool [N, K].

    unstructured: round(ratio * n) of the n weights go, n those of the layer or of each row. 2:4: two of every four
    consecutive inputs stay; K must be a multiple of 4.
    """
    rows, width = score_NK.shape
    if scheme.pattern == "2:4":
        return ~_lowest(score_NK.reshape(-1, 4), 2).reshape(rows, width)
    pool = score_NK.reshape(1, -1) if scope == "layer" else score_NK
    return ~_lowest(pool, round(scheme.ratio * pool.shape[1])).reshape(rows, width)


def _lowest(score_RM: Tensor, count: int) -> Tensor:
    """Marks exactly `count` lowest scores of each row; among equals the first. count <= M."""
    if count == 0:
        return torch.zeros_like(score_RM, dtype=torch.bool)
    threshold = score_RM.kthvalue(count, dim=1, keepdim=True).values
    below, equal = score_RM < threshold, score_RM == threshold
    missing = count - below.sum(dim=1, keepdim=True)
    return below | (equal & (equal.cumsum(dim=1) <= missing))
