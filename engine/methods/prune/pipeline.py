"""Pruning in steps that methods share: score, selection within a budget, repair, removal. Knows matrices only.

A method brings scores [N, K], higher meaning more important. The budget is met exactly, and among equal scores the
weights that come first in memory go first, so that a result can be repeated. Every repair is offered with every score.
"""

from abc import abstractmethod
from collections.abc import Callable
from itertools import combinations
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import Family, LinearMethod, MethodOptions, Outcome, Statistics
from bitpress.engine.methods.obs import inverse_factor, keeping, sweep
from bitpress.engine.recipe import PATTERNS, Scheme, SparsityScheme

Scope = Literal["layer", "row"]
Repairing = Literal["none", "obs", "least_squares"]
Repair = Callable[[Tensor, Tensor], Tensor]  # (weight_NK, keep_NK) -> weight_NK that makes up for what goes
RIDGE = 1e-6  # times the mean of the diagonal
FEW = 16  # scores a row up to which every pair of them is compared


def prune_matrix(weight_NK: Tensor, score_NK: Tensor, scheme: SparsityScheme, scope: Scope = "layer", repair: Repair | None = None) -> Tensor:
    """The matrix with its least important weights at zero; weight_NK itself is not changed."""
    return _removed(weight_NK, select(score_NK, scheme, scope), repair)


def _removed(weight_NK: Tensor, keep_NK: Tensor, repair: Repair | None) -> Tensor:
    return torch.where(keep_NK, repair(weight_NK, keep_NK) if repair else weight_NK, 0.0)


def select(score_NK: Tensor, scheme: SparsityScheme, scope: Scope = "layer", share: float = 1.0) -> Tensor:
    """Which weights stay, bool [N, K].

    unstructured: round(ratio * n) of the n weights go, n those of the layer or of each row. N:M such as 2:4: N of every M
    consecutive inputs stay; K must be a multiple of M. share: this part of the budget only.
    """
    rows, width = score_NK.shape
    if scheme.of_every:
        stay, of = scheme.of_every
        return ~_lowest(score_NK.reshape(-1, of), round(share * (of - stay))).reshape(rows, width)
    pool = score_NK.reshape(1, -1) if scope == "layer" else score_NK
    return ~_lowest(pool, round(share * scheme.ratio * pool.shape[1])).reshape(rows, width)


def _lowest(score_RM: Tensor, count: int) -> Tensor:
    """Marks exactly `count` lowest scores of each row; among equals the first. count <= M."""
    if count == 0:
        return torch.zeros_like(score_RM, dtype=torch.bool)
    if score_RM.shape[1] <= FEW:
        return _lowest_of_few(score_RM, count)
    threshold = _ordered(score_RM, count)
    lowest = score_RM <= threshold
    if bool((lowest.sum(dim=1) == count).all()):
        return lowest
    below, equal = score_RM < threshold, score_RM == threshold
    missing = count - below.sum(dim=1, keepdim=True)
    return below | (equal & (equal.cumsum(dim=1) <= missing))


def _ordered(score_RM: Tensor, count: int) -> Tensor:
    """The count-th lowest score of each row, [R, 1]."""
    if len(score_RM) == 1 and score_RM.dtype == torch.float32:
        return _ordered_by_half(score_RM[0], count).view(1, 1)
    return score_RM.kthvalue(count, dim=1, keepdim=True).values


def _ordered_by_half(score_M: Tensor, count: int) -> Tensor:
    """The same of one long row: counted by the upper half of their bits, most scores never meet another. A tenth of the time of kthvalue."""
    bits_M = score_M.view(torch.int32)
    half_M = ((bits_M ^ ((bits_M >> 31) & 0x7FFFFFFF)) >> 16) + (1 << 15)  # ordered as the numbers are
    up_to = torch.bincount(half_M, minlength=1 << 16).cumsum(0)
    half = int(torch.searchsorted(up_to, count))
    those = score_M[half_M == half]
    return those.kthvalue(count - int(up_to[half]) + len(those)).values


def _lowest_of_few(score_RM: Tensor, count: int) -> Tensor:
    """As `_lowest` by meeting every pair of columns: rows of a pattern are many and short."""
    columns = score_RM.unbind(1)
    before = [torch.zeros(len(score_RM), dtype=torch.uint8, device=score_RM.device) for _ in columns]  # how many of its row go before each
    for (one, first), (other, second) in combinations(enumerate(columns), 2):
        later = (second < first).view(torch.uint8)
        before[one] += later
        before[other] += 1 - later
    return torch.stack([goes < count for goes in before], dim=1)


def schedule(steps: int) -> list[float]:
    """The shares of the budget after each of `steps` steps: fast at first, then ever slower (Zhu and Gupta 2017, arXiv 1710.01878)."""
    return [1 - (1 - step / steps) ** 3 for step in range(1, steps + 1)]


# Repairs ---------------------------------------------------------------------------------------------------------


def repair_by(name: Repairing, stats: Statistics, damp: float = 0.01) -> Repair | None:
    """The repair of that name for a layer whose inputs have these statistics; None for none."""
    if name == "none":
        return None
    if name == "least_squares":
        return lambda weight_NK, keep_NK: least_squares(weight_NK, keep_NK, stats["gram"])
    factor_KK = inverse_factor(stats["gram"], damp)
    return lambda weight_NK, keep_NK: sweep(weight_NK, factor_KK, keeping(keep_NK))


def least_squares(weight_NK: Tensor, keep_NK: Tensor, gram_KK: Tensor) -> Tensor:
    """For each row the kept weights that bring its outputs nearest to the old ones: G_SS w_S = (G w)_S, S the kept inputs.

    gram_KK: E[x x^T], float64. Exact up to a ridge of 1e-6 of the mean diagonal; one solve a row.
    """
    # Sums of float32 products are symmetric to float32 only, and a factorisation reads one triangle: the other one's share would be an error.
    gram_KK = (gram_KK + gram_KK.t()).double() / 2
    gram_KK = gram_KK + RIDGE * float(gram_KK.diagonal().mean()) * torch.eye(len(gram_KK), dtype=torch.float64, device=gram_KK.device)
    wanted_NK = weight_NK.double() @ gram_KK
    made_NK = torch.zeros_like(weight_NK)
    for row, keep_K in enumerate(keep_NK):
        kept = keep_K.nonzero()[:, 0]
        if len(kept):
            lower = torch.linalg.cholesky(gram_KK[kept][:, kept])
            made_NK[row, kept] = torch.cholesky_solve(wanted_NK[row, kept, None], lower)[:, 0].to(weight_NK.dtype)
    return made_NK


# Methods ---------------------------------------------------------------------------------------------------------


class PruneOptions(MethodOptions):
    """How the weights to go are chosen and what is done for those that stay."""

    scope: Scope = Field(
        default="layer",
        title="Compare within",
        description="Compare the weights of a whole layer, or of each output row on its own. Patterns such as 2:4 compare within their fours or eights.",
    )
    repair: Repairing = Field(
        default="none",
        title="Repair",
        description="What the kept weights do for those that go: nothing, a second-order update in one sweep, or the exact least-squares fit of every row.",
    )
    steps: int = Field(default=1, ge=1, le=16, title="Steps", description="Reach the ratio in this many steps, each with its own scores and repair.")
    damp: float = Field(default=0.01, ge=1e-6, le=1.0, title="Damping", description="Added to the second-order statistics, as a share of their mean.")


class ScoredMethod(LinearMethod):
    """A pruning method that differs from others only in its score."""

    family: ClassVar[Family] = "prune"
    ability: ClassVar[Ability] = Ability(part="sparsity", patterns=PATTERNS)
    Options = PruneOptions

    @abstractmethod
    def score(self, weight_NK: Tensor, stats: Statistics, options: Any) -> Tensor:
        """How important each weight is, [N, K], finite and not negative."""

    def needs_for(self, options: Any) -> frozenset[str]:
        """Its score's statistics, and those of the repair."""
        return self.needs if options.repair == "none" else self.needs | {"gram"}

    def apply(self, weight_NK: Tensor, scheme: Scheme, stats: Statistics, options: Any) -> Outcome:
        """Prune one matrix to the scheme's ratio and pattern."""
        if scheme.sparsity is None:
            raise ValueError(f"{self.name} was given a scheme without sparsity")
        repair = repair_by(options.repair, stats, options.damp)
        keep_NK = torch.ones_like(weight_NK, dtype=torch.bool)
        for share in schedule(options.steps):
            score_NK = torch.where(keep_NK, self.score(weight_NK, stats, options), -1.0)  # what has gone does not come back
            keep_NK = select(score_NK, scheme.sparsity, options.scope, share)
            weight_NK = _removed(weight_NK, keep_NK, repair)
        return Outcome(weight_NK)
