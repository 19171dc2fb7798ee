"""Leaving out whole blocks as one more option beside those of their layers. Knows numbers; no layers and no recipes, torch-free.

A block that stays is one of the points on the hull of its own layers (as good as any choice at some price), or it is dropped: a
multiple-choice knapsack over blocks says which go. The layers of those that stay are then chosen exactly, by themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitpress.engine import knapsack
from bitpress.engine.knapsack import Floats, Ints, Solution


@dataclass(frozen=True)
class Drops:
    """What dropping does. blocks: the items of each block. aim_B: what is made least, infinite where a block has to stay. cost_MB: what it still
    costs of each budget. kept_M: what a block that stays costs beyond its items."""

    blocks: Sequence[Ints]
    aim_B: Floats
    cost_MB: Floats
    kept_M: Floats


def solve(aim_IJ: Floats, cost_MIJ: Floats, limit_M: Floats, drops: Drops) -> tuple[Solution, list[int]]:
    """The choice of least aim within every limit, and the blocks that go; the choice of an item of theirs means nothing. Raises Infeasible."""
    gone = _which(aim_IJ, cost_MIJ, limit_M, drops)
    stay_I = np.ones(len(aim_IJ), dtype=bool)
    for block in gone:
        stay_I[drops.blocks[block]] = False
    room_M = limit_M - drops.cost_MB[:, gone].sum(axis=1) - drops.kept_M * (len(drops.blocks) - len(gone))
    found = knapsack.solve(aim_IJ[stay_I], cost_MIJ[:, stay_I], room_M)
    choice = np.zeros(len(aim_IJ), dtype=np.int64)
    choice[stay_I] = found.choice
    return Solution(choice, found.harm + float(drops.aim_B[gone].sum()), found.used, found.price), gone


def _which(aim_IJ: Floats, cost_MIJ: Floats, limit_M: Floats, drops: Drops) -> list[int]:
    """The blocks that go: the knapsack over whole blocks, and over the items that are in none."""
    weight_M = 1 / np.maximum(np.abs(limit_M), 1e-300)
    together_IJ = np.tensordot(weight_M, cost_MIJ, 1)
    rows = [_kept(aim_IJ, cost_MIJ, together_IJ, items, drops.kept_M) for items in drops.blocks]
    count = len(rows)
    rest = np.setdiff1d(np.arange(len(aim_IJ)), np.concatenate(drops.blocks))
    rows += [(aim_IJ[item], cost_MIJ[:, item]) for item in rest]
    most = max(len(aim) for aim, _ in rows) + 1
    aims, costs = np.full((len(rows), most), np.inf), np.zeros((len(limit_M), len(rows), most))
    for row, (aim_P, cost_MP) in enumerate(rows):
        aims[row, 1 : len(aim_P) + 1], costs[:, row, 1 : len(aim_P) + 1] = aim_P, cost_MP
    aims[:count, 0], costs[:, :count, 0] = drops.aim_B, drops.cost_MB
    chosen = knapsack.solve(aims, costs, limit_M).choice
    return [block for block in range(count) if chosen[block] == 0]


def _kept(aim_IJ: Floats, cost_MIJ: Floats, together_IJ: Floats, items: Ints, kept_M: Floats) -> tuple[Floats, Floats]:
    """Aim [P] and costs [M, P] of one block at each point of its hull."""
    curve = knapsack.frontier(aim_IJ[items], together_IJ[items])
    points = [curve.choice(step) for step in range(len(curve.cost))]
    aim = np.array([aim_IJ[items, choice].sum() for choice in points])
    return aim, np.stack([cost_MIJ[:, items, choice].sum(axis=1) + kept_M for choice in points], axis=1)
