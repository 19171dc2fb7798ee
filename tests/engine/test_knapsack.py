"""The knapsack against trying everything, and its frontier against the knapsack."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.engine.knapsack import GAP, Infeasible, frontier, solve


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    items, options, budgets = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    harm = rng.random((items, options)) ** 3
    harm[rng.random((items, options)) < 0.15] = np.inf
    harm[:, 0] = np.where(np.isfinite(harm).any(axis=1), harm[:, 0], 1.0)
    cost = rng.integers(0, 40, (budgets, items, options)).astype(float)
    return harm, cost, rng.uniform(0.1, 1.0, budgets) * cost.max(axis=2).sum(axis=1)


def best_by_trying(harm: np.ndarray, cost: np.ndarray, limit: np.ndarray) -> float | None:
    items, options = harm.shape
    rows = np.arange(items)
    found = [
        harm[rows, choice].sum()
        for choice in map(list, itertools.product(range(options), repeat=items))
        if np.isfinite(harm[rows, choice].sum()) and (cost[:, rows, choice].sum(axis=1) <= limit).all()
    ]
    return min(found, default=None)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_nothing_better_is_found_by_trying_everything(problem: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    harm, cost, limit = problem
    best = best_by_trying(harm, cost, limit)
    if best is None:
        with pytest.raises(Infeasible):
            solve(harm, cost, limit)
        return
    found = solve(harm, cost, limit)
    slack = 1e-12 if len(limit) == 1 else GAP * best
    assert found.harm == pytest.approx(harm[np.arange(len(harm)), found.choice].sum())
    assert best - 1e-12 <= found.harm <= best + slack + 1e-12
    assert (found.used <= limit * (1 + 1e-12)).all()
    assert (found.price >= 0).all()


@settings(max_examples=30, deadline=None)
@given(problems())
def test_every_point_of_the_frontier_is_the_best_of_its_size(problem: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    harm, cost, _ = problem
    curve = frontier(harm, cost[0])
    assert (np.diff(curve.cost) > 0).all()
    assert (np.diff(curve.harm) < 0).all()
    slopes = np.diff(curve.harm) / np.diff(curve.cost)
    assert (np.diff(slopes) >= -1e-9).all(), "convex"
    rows = np.arange(len(harm))
    for step, (size, total) in enumerate(zip(curve.cost, curve.harm, strict=True)):
        choice = curve.choice(step)
        assert cost[0][rows, choice].sum() == pytest.approx(size)
        assert harm[rows, choice].sum() == pytest.approx(total)
        assert solve(harm, cost[:1], np.array([size])).harm == pytest.approx(total, rel=1e-9, abs=1e-12)
