"""One option for each item, least harm under one or two budgets: the multiple-choice knapsack, exactly. Knows numbers; no layers, no torch.

Method: the linear relaxation gives prices; an option whose reduced cost exceeds the gap between a feasible choice and the
bound cannot be in a better one and is struck out (Sinha and Zoltners 1979; Pisinger 1995); what remains is settled exactly by
dynamic programming under one budget, and by HiGHS to a small gap under more. The whole frontier of one budget is the merge of the items' lower convex hulls.
Shape letters: I items, J options (absent ones have infinite harm), M budgets.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
TIGHTENINGS = 4
GAP = 1e-4  # of two budgets: the harm proven to be within this share of the least, unless time runs out first
SECONDS = 0.06  # to improve a choice that is known to be feasible
PATIENCE = 5.0  # to find one at all


class Infeasible(Exception):
    """No choice keeps the budgets. `lowest` is the least that each budget could be met with on its own."""

    def __init__(self, lowest: Floats) -> None:
        super().__init__("no choice keeps the budgets")
        self.lowest = lowest


@dataclass(frozen=True)
class Solution:
    """choice: option of every item [I]. price: harm that one unit more of each budget would save [M], 0 for a budget that is not used up."""

    choice: Ints
    harm: float
    used: Floats
    price: Floats


def solve(harm_IJ: Floats, cost_MIJ: Floats, limit_M: Floats) -> Solution:
    """The choice of least total harm whose total cost is within every limit. Raises Infeasible.

    harm_IJ: finite where an option exists. cost_MIJ: not negative. Exact for one budget, to `GAP` for more.
    """
    there_IJ = np.isfinite(harm_IJ)
    lowest = np.where(there_IJ, cost_MIJ, np.inf).min(axis=2).sum(axis=1)
    if (lowest > limit_M * (1 + 1e-12)).any():
        raise Infeasible(lowest)
    price_M, share_IJ = _relaxed(harm_IJ, cost_MIJ, limit_M, lowest)
    priced_IJ = np.where(there_IJ, harm_IJ + np.tensordot(price_M, cost_MIJ, 1), np.inf)
    reduced_IJ = priced_IJ - priced_IJ.min(axis=1, keepdims=True)
    bound = float(priced_IJ.min(axis=1).sum() - price_M @ limit_M)
    known = _rounded(harm_IJ, cost_MIJ, limit_M, share_IJ)
    gap = np.inf if known is None else _total(harm_IJ, known) - bound
    core_IJ = there_IJ & (reduced_IJ <= gap + 1e-9 * max(1.0, abs(bound)))
    choice = _exact(harm_IJ, cost_MIJ, limit_M, core_IJ, lowest, known)
    return Solution(choice, _total(harm_IJ, choice), _used(cost_MIJ, choice), price_M)


def _total(harm_IJ: Floats, choice: Ints) -> float:
    return float(harm_IJ[np.arange(len(choice)), choice].sum())


def _used(cost_MIJ: Floats, choice: Ints) -> Floats:
    return cost_MIJ[:, np.arange(len(choice)), choice].sum(axis=1)


def _fits(cost_MIJ: Floats, choice: Ints, limit_M: Floats) -> bool:
    return bool((_used(cost_MIJ, choice) <= limit_M * (1 + 1e-12)).all())


def _rows(where: tuple[NDArray[Any], ...], cost_MIJ: Floats) -> tuple[csr_array, Floats]:
    """One equation an item (its options sum to 1), one row a budget in units of its largest cost."""
    items, options = where
    columns = np.arange(len(items))
    _, dense_items = np.unique(items, return_inverse=True)
    equal = csr_array((np.ones(len(items)), (dense_items, columns)))
    return equal, cost_MIJ[:, items, options]


def _relaxed(harm_IJ: Floats, cost_MIJ: Floats, limit_M: Floats, lowest: Floats) -> tuple[Floats, Floats]:
    """Prices [M] and fractional choice [I, J] of the linear relaxation."""
    where = np.nonzero(np.isfinite(harm_IJ))
    equal, cost_MX = _rows(where, cost_MIJ)
    scale_M = np.maximum(cost_MX.max(axis=1), 1e-300)
    found = linprog(
        harm_IJ[where], A_ub=cost_MX / scale_M[:, None], b_ub=limit_M / scale_M, A_eq=equal, b_eq=np.ones(equal.shape[0]), bounds=(0, None), method="highs"
    )
    if found.x is None:
        raise Infeasible(lowest)
    share_IJ = np.zeros_like(harm_IJ)
    share_IJ[where] = found.x
    return np.maximum(-found.ineqlin.marginals, 0.0) / scale_M, share_IJ


def _rounded(harm_IJ: Floats, cost_MIJ: Floats, limit_M: Floats, share_IJ: Floats) -> Ints | None:
    """A feasible choice near the relaxed one, improved while anything fits; None when rounding finds none."""
    choice = share_IJ.argmax(axis=1)
    rest = np.flatnonzero(share_IJ.max(axis=1) < 1 - 1e-7)
    options = np.where(share_IJ > 1e-7, (cost_MIJ / np.maximum(limit_M, 1e-300)[:, None, None]).sum(axis=0), np.inf)
    choice[rest] = options[rest].argmin(axis=1)
    if not _fits(cost_MIJ, choice, limit_M):
        return None
    items = np.arange(len(choice))
    while True:
        room_M = limit_M - _used(cost_MIJ, choice)
        more_MIJ = cost_MIJ - cost_MIJ[:, items, choice][:, :, None]
        gain_IJ = harm_IJ[items, choice][:, None] - harm_IJ
        gain_IJ[(more_MIJ > room_M[:, None, None]).any(axis=0)] = -np.inf
        item, option = np.unravel_index(gain_IJ.argmax(), gain_IJ.shape)
        if gain_IJ[item, option] <= 0:
            return choice
        choice[item] = option


def _exact(harm_IJ: Floats, cost_MIJ: Floats, limit_M: Floats, core_IJ: NDArray[np.bool_], lowest: Floats, known: Ints | None) -> Ints:
    """The best choice within the core, never worse than the known one."""
    if known is not None and not (core_IJ.sum(axis=1) > 1).any():
        return known
    if len(limit_M) == 1:
        found = _by_states(harm_IJ, cost_MIJ, limit_M, core_IJ)
    else:
        found = _by_branching(harm_IJ, cost_MIJ, limit_M, core_IJ, PATIENCE if known is None else SECONDS)
    if found is None and known is None:
        raise Infeasible(lowest)
    if found is None or (known is not None and _total(harm_IJ, known) <= _total(harm_IJ, found)):
        return known  # type: ignore[return-value]
    return found


def _by_states(harm_IJ: Floats, cost_MIJ: Floats, limit_M: Floats, core_IJ: NDArray[np.bool_]) -> Ints | None:
    """One budget: dynamic programming over totals of (cost, harm), of which only those that no other beats in both are kept."""
    cost_IJ, choice = cost_MIJ[0], core_IJ.argmax(axis=1)
    order = np.argsort(core_IJ.sum(axis=1), kind="stable")
    ahead = np.cumsum(np.where(core_IJ, cost_IJ, np.inf).min(axis=1)[order][::-1])[::-1]
    cost, harm, trail = np.zeros(1), np.zeros(1), []
    for place, item in enumerate(order):
        options = np.flatnonzero(core_IJ[item])
        totals = (cost[:, None] + cost_IJ[item, options]).ravel(), (harm[:, None] + harm_IJ[item, options]).ravel()
        rest = ahead[place + 1] if place + 1 < len(order) else 0.0
        kept = _unbeaten(*totals, limit_M[0] * (1 + 1e-12) - rest)
        if not len(kept):
            return None
        cost, harm = totals[0][kept], totals[1][kept]
        trail.append((item, options[kept % len(options)], kept // len(options)))
    state = int(harm.argmin())
    for item, option_S, before_S in reversed(trail):
        choice[item], state = option_S[state], before_S[state]
    return choice


def _unbeaten(cost: Floats, harm: Floats, limit: float) -> Ints:
    """Indices of the totals within the limit that have less harm than every cheaper one."""
    order = np.lexsort((harm, cost))
    order = order[cost[order] <= limit]
    least = np.minimum.accumulate(harm[order])
    first = np.ones(len(order), dtype=bool)
    first[1:] = harm[order][1:] < least[:-1]
    return order[first]


def _by_branching(harm_IJ: Floats, cost_MIJ: Floats, limit_M: Floats, core_IJ: NDArray[np.bool_], seconds: float) -> Ints | None:
    """Several budgets: HiGHS, to `GAP`. It may overstep a limit by its tolerance: then the limit is drawn in and it tries again."""
    choice = core_IJ.argmax(axis=1)
    open_I = core_IJ.sum(axis=1) > 1
    room_M = limit_M - cost_MIJ[:, ~open_I, choice[~open_I]].sum(axis=1)
    where = np.nonzero(core_IJ & open_I[:, None])
    equal, cost_MX = _rows(where, cost_MIJ)
    scale_M = np.maximum(cost_MX.max(axis=1) * 1e-4, 1e-300)  # far above the solver's absolute tolerance of 1e-6
    harm_X, slack_M = harm_IJ[where], np.zeros_like(limit_M)
    wish = {"mip_rel_gap": GAP, "time_limit": seconds}
    for _ in range(TIGHTENINGS):
        rows = [LinearConstraint(equal, 1, 1), LinearConstraint(cost_MX / scale_M[:, None], -np.inf, (room_M - slack_M) / scale_M)]
        found = milp(harm_X / (np.ptp(harm_X) or 1.0), integrality=np.ones(len(harm_X)), bounds=Bounds(0, 1), constraints=rows, options=wish)
        if found.x is None:
            return None
        taken = found.x > 0.5
        choice[where[0][taken]] = where[1][taken]
        if _fits(cost_MIJ, choice, limit_M):
            return choice
        slack_M += np.maximum(_used(cost_MIJ, choice) - limit_M, 0.0) * 1.5 + scale_M * 1e-6
    return None


@dataclass(frozen=True)
class Frontier:
    """Every choice that is best at some price of one budget, from the cheapest on. Step s changes one item's option.

    cost, harm: totals after each step [S + 1]. item, option: what step s + 1 changes [S].
    """

    cost: Floats
    harm: Floats
    start: Ints
    item: Ints
    option: Ints

    def choice(self, step: int) -> Ints:
        """The option of every item after `step` steps."""
        chosen = self.start.copy()
        for item, option in zip(self.item[:step], self.option[:step], strict=True):
            chosen[item] = option
        return chosen


def frontier(harm_IJ: Floats, cost_IJ: Floats) -> Frontier:
    """The frontier of total harm against the total of one cost."""
    starts: list[int] = []
    steps: list[tuple[float, int, int, int, float, float]] = []
    for item, (harm_J, cost_J) in enumerate(zip(harm_IJ, cost_IJ, strict=True)):
        hull = _hull(harm_J, cost_J)
        starts.append(hull[0])
        for low, high in pairwise(hull):
            more, gain = cost_J[high] - cost_J[low], harm_J[low] - harm_J[high]
            steps.append((-gain / more, len(steps), item, high, more, gain))
    steps.sort()
    start = np.array(starts)
    items = np.arange(len(start))
    cost = np.cumsum([cost_IJ[items, start].sum(), *(step[4] for step in steps)])
    harm = np.cumsum([harm_IJ[items, start].sum(), *(-step[5] for step in steps)])
    return Frontier(cost, harm, start, np.array([step[2] for step in steps], dtype=np.int64), np.array([step[3] for step in steps], dtype=np.int64))


def _hull(harm_J: Floats, cost_J: Floats) -> list[int]:
    """Options on the lower convex hull of (cost, harm), the cheapest first, each with less harm than the one before."""
    order = [int(option) for option in np.lexsort((harm_J, cost_J)) if np.isfinite(harm_J[option])]
    hull: list[int] = []
    for option in order:
        if hull and harm_J[option] >= harm_J[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(harm_J, cost_J, hull[-2], hull[-1]) >= _slope(harm_J, cost_J, hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(harm_J: Floats, cost_J: Floats, low: int, high: int) -> float:
    more = cost_J[high] - cost_J[low]
    return float((harm_J[high] - harm_J[low]) / more) if more > 0 else -np.inf
