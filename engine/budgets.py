"""What each kind of budget limits, costs and leaves: in bytes, bits, nats, seconds, operations. Knows units and how a refusal is worded; solves little.

Torch-free, so that a slider can call it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitpress.engine import block_drops, knapsack
from bitpress.engine.accounting import flops_per_token
from bitpress.engine.block_drops import Drops
from bitpress.engine.cache_choice import bytes_per_token
from bitpress.engine.choices import Choices, Floats
from bitpress.engine.errors import InputError
from bitpress.engine.latency_table import LatencyTable

# kind of budget -> (what it limits, unit)
BUDGETS = {
    "linear_bits": ("bits per weight of the block linears", "bits"),
    "model_bits": ("bits per weight of the whole model", "bits"),
    "bytes": ("stored bytes of the model", "bytes"),
    "perplexity_ratio": ("predicted perplexity over dense", "times"),
    "kl": ("predicted KL divergence", "nats a token"),
    "latency_s": ("predicted time of a token", "s"),
    "flops": ("operations of a token", "FLOPs"),
    "kv_bytes": ("KV cache of a token", "bytes"),
}
QUALITY = ("perplexity_ratio", "kl")


@dataclass(frozen=True)
class Table:
    """Costs of each kind of budget, what is left for the items, and how a refusal is worded."""

    choices: Choices
    latency: LatencyTable | None

    def cost(self, kind: str) -> Floats:
        if kind == "latency_s":
            return self._speeds().seconds(self.choices)
        if kind == "flops":
            by_name = self.choices.anatomy.by_name
            flops_I = [2.0 * sum(by_name[layer].numel for layer in layers) for layers in self.choices.items]
            return np.repeat(np.array([flops if self._block(item) is not None else 0.0 for item, flops in enumerate(flops_I)])[:, None],
                             len(self.choices.options), axis=1)  # fmt: skip
        return self.choices.linear_bytes_IJ if kind == "linear_bits" else self.choices.bytes_IJ

    def _speeds(self) -> LatencyTable:
        if self.latency is None:
            raise InputError("A budget of time needs the kernels' speeds on this machine.", "None are kept.", "Run `bitpress bench kernels` once.")
        return self.latency

    def harm(self) -> Floats:
        """As a cost: what may not be chosen is left out by its infinite aim."""
        return np.where(np.isfinite(self.choices.harm_IJ), self.choices.harm_IJ, 0.0)

    def _block(self, item: int) -> int | None:
        return self.choices.anatomy.by_name[self.choices.items[item][0]].block

    def block_items(self, block: int) -> NDArray[np.int64]:
        """The items of a block."""
        return np.array([item for item in range(len(self.choices.items)) if self._block(item) == block], dtype=np.int64)

    def _rest_of_block(self, kind: str) -> float:
        """What a block that stays takes beyond its linears."""
        return float(self.choices.anatomy.block_rest_params * self.choices.anatomy.itemsize) if kind in ("bytes", "model_bits") else 0.0

    def kept_blocks(self, limits: Sequence[str], quality: Sequence[str]) -> Floats:
        """What the rooms grow by when all blocks' rests count as costs."""
        return np.array([self._rest_of_block(kind) * self.choices.anatomy.blocks for kind in (*limits, *quality)] or [0.0])

    def drops(self, limits: Sequence[str], quality: Sequence[str], budgets: Mapping[str, float]) -> Drops:
        """What dropping each block would do to what is made least and to each budget. Bits are of the weights that stay, so a mean has less room."""
        anatomy = self.choices.anatomy
        linears = sum(part.numel for part in anatomy.of_block(0))
        weights = {"linear_bits": linears, "model_bits": linears + anatomy.block_rest_params}
        harm_B = np.array([self.choices.drop_harm.get(block, np.inf) for block in range(self.choices.anatomy.blocks)])
        there_B = np.where(np.isfinite(harm_B), harm_B, 0.0)
        costs = [np.full_like(harm_B, budgets[kind] * weights.get(kind, 0) / 8) for kind in limits] + [there_B for _ in quality]
        cost_MB = np.array(costs or [np.zeros_like(harm_B)])
        aim_B = np.where(np.isfinite(harm_B), 0.0, np.inf) if quality else harm_B
        kept_M = np.array([self._rest_of_block(kind) for kind in (*limits, *quality)] or [0.0])
        return Drops([self.block_items(block) for block in range(len(harm_B))], aim_B, cost_MB, kept_M)

    def room(self, kind: str, limit: float) -> float:
        """What the items may cost together."""
        anatomy = self.choices.anatomy
        return {
            "linear_bits": lambda: limit * anatomy.linear_params / 8,
            "model_bits": lambda: limit * anatomy.params / 8 - self.choices.rest_bytes,
            "bytes": lambda: limit - self.choices.rest_bytes,
            "perplexity_ratio": lambda: math.log(limit) if limit > 0 else -math.inf,
            "kl": lambda: limit,
            "latency_s": lambda: limit - self._speeds().head_seconds(self.choices),
            "flops": lambda: limit - self._head_flops,
        }[kind]()

    def limit(self, kind: str, cost: float) -> float:
        """The budget under which items may cost this much: the inverse of `room`."""
        anatomy = self.choices.anatomy
        return {
            "linear_bits": lambda: 8 * cost / anatomy.linear_params,
            "model_bits": lambda: 8 * (cost + self.choices.rest_bytes) / anatomy.params,
            "bytes": lambda: cost + self.choices.rest_bytes,
            "perplexity_ratio": lambda: math.exp(min(cost, 700.0)),
            "kl": lambda: cost,
            "latency_s": lambda: cost + self._speeds().head_seconds(self.choices),
            "flops": lambda: cost + self._head_flops,
        }[kind]()

    @property
    def _head_flops(self) -> float:
        return 2.0 * self.choices.anatomy.vocab * self.choices.anatomy.hidden

    def check(self, kind: str, limit: float) -> None:
        """Raise InputError for a budget that does not exist, is no number, or is above what dense takes."""
        if kind not in BUDGETS:
            raise InputError(f"There is no budget '{kind}'.", "", f"Budgets are {', '.join(BUDGETS)}.")
        if kind in QUALITY and not self.choices.in_nats:
            why = f"Scores of kind '{self.choices.kind}' rank layers but foretell no perplexity."
            raise InputError("A budget of quality needs scores in nats.", why, "Measure the kind 'fisher' or 'kl'.")
        if not math.isfinite(limit):
            raise InputError(f"The budget of {BUDGETS[kind][0]} is not a number.", f"It is {limit}.", "Give a number.")
        dense = self._dense(kind)
        if kind not in QUALITY and limit > dense * (1 + 1e-9):
            what = f"A budget of {said(kind, limit)} for the {BUDGETS[kind][0]} is above dense."
            raise InputError(what, f"Dense takes {said(kind, dense)}.", f"Ask for {said(kind, dense)} or less.")

    def _dense(self, kind: str) -> float:
        anatomy = self.choices.anatomy
        if kind == "latency_s":
            return self._speeds().dense_seconds(anatomy)
        if kind in ("flops", "kv_bytes"):
            return float(flops_per_token(None, anatomy)) if kind == "flops" else bytes_per_token(None, anatomy)
        if kind == "linear_bits":
            return 8.0 * anatomy.itemsize
        return float(anatomy.bytes) if kind == "bytes" else 8 * anatomy.bytes / anatomy.params

    def infeasible(self, kinds: Sequence[str], budgets: Mapping[str, float], costs: Floats, rooms: Floats, lowest: Floats,
                   drops: Drops | None = None) -> InputError:  # fmt: skip
        """Which budget cannot be met and the nearest that can, alone or beside the other one."""
        plain = np.where(np.isfinite(self.choices.harm_IJ), costs, np.inf).min(axis=2).sum(axis=1)
        lowest = np.where([kind in ("linear_bits", "model_bits") for kind in kinds], plain, lowest)  # a mean is not lowered by dropping
        for number, kind in enumerate(kinds):
            if lowest[number] > rooms[number]:
                least = said(kind, self.limit(kind, lowest[number]), up=True)
                what = f"A budget of {said(kind, budgets[kind])} for the {BUDGETS[kind][0]} cannot be met."
                return InputError(what, f"With these options and locks the least is {least}.", f"Ask for {least} or more, or release locks.")
        first, other = kinds[0], kinds[1]
        least_cost = self._least(costs, rooms, drops)
        least = said(first, self.limit(first, least_cost), up=True)
        what = f"The budgets of {BUDGETS[first][0]} and {BUDGETS[other][0]} cannot both be met."
        why = f"Within {said(other, budgets[other])} the least for the first is {least}."
        return InputError(what, why, f"Ask for {least} there, or loosen the other.")

    def _least(self, costs: Floats, rooms: Floats, drops: Drops | None) -> float:
        """The least of the first cost within the rooms of the others."""
        aim_IJ = np.where(np.isfinite(self.choices.harm_IJ), costs[0], np.inf)
        if drops is None:
            return knapsack.solve(aim_IJ, costs[1:], rooms[1:]).harm
        goes_B = np.array([block in self.choices.drop_harm for block in range(len(drops.blocks))])
        aim_B = np.where(goes_B, drops.cost_MB[0] - drops.kept_M[0], np.inf)
        extra = drops.kept_M[1:] * len(drops.blocks)
        return block_drops.solve(aim_IJ, costs[1:], rooms[1:] + extra, Drops(drops.blocks, aim_B, drops.cost_MB[1:], drops.kept_M[1:]))[0].harm


def said(kind: str, value: float, up: bool = False) -> str:
    """A budget with its unit. `up` rounds so that the number said can be asked for."""
    if kind in ("bytes", "kv_bytes", "flops"):
        return f"{math.ceil(value) if up else round(value):,} {BUDGETS[kind][1]}"
    digits = 3 if kind in ("linear_bits", "model_bits") else 4
    rounded = math.ceil(value * 10**digits) / 10**digits if up else round(value, digits)
    return f"{rounded:g} {BUDGETS[kind][1]}"
