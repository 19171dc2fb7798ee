"""Ranks of a latent KV cache, from condition numbers (METHODS 4.1) or from what each rank loses. Knows numbers and kept spectra; no weights.

An error in block l passes through all blocks after it, so the product of their condition numbers says how much it may grow: early
blocks keep more. d_l = d_max (1 - (max - log k_l) / (max - min) (1 - d_min / d_max)), k_l the product from block l on.
"""

import json
from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import log
from pathlib import Path
from typing import Literal

from bitpress.engine.errors import InputError
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import CacheRank, KVCache

LOSSES = "value_losses.json"  # of the folder `stats/`
FLOOR = 1e-6  # smallest singular value, as a share of the largest, that is believed


def progressive_ranks(conditions: Sequence[float], width: int, keep: float, least: float = 0.5, runs: int = 1) -> tuple[int, ...]:
    """A rank a block, together `keep` of all blocks' width, rounded down.

    conditions: a block's cond(W_k) * cond(W_v). least: d_min over d_max. runs: ranks are multiples of this, such as one a head.
    Raises InputError for a share that leaves less than one number a run.
    """
    logs = [log(min(condition, FLOOR**-2)) for condition in conditions]
    sums = list(accumulate(reversed(logs)))[::-1]
    spread = max(sums) - min(sums) or 1.0
    shares = [1 - (max(sums) - value) / spread * (1 - least) for value in sums]
    budget = keep * width * len(shares)
    low, high = 0.0, width / least
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(_ranks(shares, middle, width, runs)) <= budget else (low, middle)
    found = _ranks(shares, low, width, runs)
    if not all(found):
        why = f"Some block would keep none of its {width} numbers."
        raise InputError(f"No ranks keep {keep:.1%} of the cache.", why, "Keep more, or set `least` nearer to 1.")
    return tuple(found)


def spread_ranks(lost: Sequence[Sequence[float]], keep: float, runs: int) -> tuple[int, ...]:
    """A rank a block, together at most `keep` of all blocks' width, such that the sum of what is lost is least.

    lost: of every block, what is lost when each of its `runs` heads keeps 0, 1, .. C numbers; falling, by less and less. Every head keeps
    one at least. Raises InputError for a share that leaves less than that.
    """
    width = sum(len(block) - 1 for block in lost)
    budget = int(keep * width + 1e-9) - len(lost)
    if budget < 0:
        raise InputError(f"No ranks keep {keep:.1%} of the cache.", "Some head would keep none of its numbers.", f"Keep {len(lost) / width:.1%} or more.")
    gains = sorted(((before - after, number) for number, block in enumerate(lost) for before, after in pairwise(block[1:])), reverse=True)
    found = [1] * len(lost)
    for _, number in gains[:budget]:
        found[number] += 1
    return tuple(runs * rank for rank in found)


def keep_losses(stats: Path, lost: Sequence[Sequence[float]]) -> None:
    """Write down what `spread_ranks` reads, beside a model's spectra."""
    partial = stats / f"{LOSSES}.partial"
    partial.write_text(json.dumps({"v": 1, "lost": lost}), encoding="utf8")
    partial.replace(stats / LOSSES)


def kept_losses(stats: Path, anatomy: Anatomy) -> list[list[float]] | None:
    """What was written down of this model; None where nothing was, or something of other shapes."""
    try:
        found = json.loads((stats / LOSSES).read_text(encoding="utf8"))["lost"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if [len(block) for block in found] == [anatomy.head_dim + 1] * anatomy.blocks else None


def measured_conditions(anatomy: Anatomy, stats: Path) -> list[float]:
    """cond(W_k) * cond(W_v) of every block, from the spectra that `inspect` keeps. Raises InputError where there are none."""
    found = [1.0] * anatomy.blocks
    for part in anatomy.linears:
        if part.role in ("k", "v") and part.block is not None:
            try:
                values = json.loads((stats / f"{part.name}.json").read_text(encoding="utf8"))["spectrum"]["value"]
            except (OSError, ValueError, KeyError):
                raise InputError("The spectra of this model are not known yet.", f"{part.name} has none.", "Inspect the model first.") from None
            found[part.block] *= 1 / max(values[-1], FLOOR)
    return found


def cache_of(anatomy: Anatomy, stats: Path, keep: float, heads: Literal["joint", "each"] = "joint") -> KVCache:
    """A latent cache of this share of the dense one's width, its ranks falling from the first block to the last."""
    runs = anatomy.kv_heads if heads == "each" else 1
    ranks = progressive_ranks(measured_conditions(anatomy, stats), anatomy.kv_heads * anatomy.head_dim, keep, runs=runs)
    return KVCache(rank=CacheRank(keep=keep, ranks=ranks, heads=heads))


def _ranks(shares: Sequence[float], most: float, width: int, runs: int) -> list[int]:
    return [runs * int(min(width, share * most) / runs + 1e-9) for share in shares]
