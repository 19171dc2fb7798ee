"""Budget -> recipe, at once, from kept measurements: which layer gets how many bits. Knows budgets and words; the arithmetic is `knapsack`'s.

Harms of single layers are taken to add up (METHODS 17.5 says that they do not quite): the figures are predictions, to be
verified by a run. Torch-free, so that a slider can call it.
"""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitpress.engine import block_drops, knapsack
from bitpress.engine.accounting import flops_per_token, size_of
from bitpress.engine.budgets import QUALITY, Table
from bitpress.engine.cache_choice import bytes_per_token, widest
from bitpress.engine.choices import DENSE, GONE, HEAD_BITS, Choices, end_scheme
from bitpress.engine.latency_table import LatencyTable
from bitpress.engine.recipe import Recipe, Scheme, SchemeLine, Stage, Structure
from bitpress.engine.targets import role_pattern

DEFAULT_STAGES = {"sparsity": "magnitude", "weights": "rtn"}


@dataclass(frozen=True)
class Allocation:
    """A chosen recipe, the option of every layer, what is predicted of it, and the price of the first budget in harm a unit."""

    recipe: Recipe
    options: dict[str, str]
    predicted: dict[str, float]
    seconds: float
    choice: NDArray[np.int64] = field(repr=False)
    price: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The document of the command line."""
        return {"recipe": self.recipe.to_dict(), "predicted": self.predicted, "seconds": round(self.seconds, 4)}


def allocate(choices: Choices, budgets: Mapping[str, float], base: Recipe | None = None, latency: LatencyTable | None = None,
             drops: bool = False) -> Allocation:  # fmt: skip
    """The recipe of least predicted harm within one or two budgets; with a budget of quality, the smallest recipe within it.

    base: where stages, calibration and what is measured come from. drops: whole blocks may go as well; a budget of operations
    means so, for nothing else saves any. Raises InputError for a budget that cannot be met, naming the nearest that can, or for
    one that dense meets already.
    """
    began = time.perf_counter()
    table = Table(choices, latency)
    for kind, limit in budgets.items():
        table.check(kind, limit)
    cache, cache_harm = widest(budgets["kv_bytes"], choices.anatomy, choices.scores) if "kv_bytes" in budgets else (None, 0.0)
    base = base if cache is None else (base or Recipe(model=choices.anatomy.model)).model_copy(update={"kv_cache": cache})
    budgets = {kind: limit for kind, limit in budgets.items() if kind != "kv_bytes"}
    limits = [kind for kind in budgets if kind not in QUALITY]
    quality = [kind for kind in budgets if kind in QUALITY]
    aim_IJ = choices.bytes_IJ if quality else choices.harm_IJ
    aim_IJ = np.where(np.isfinite(choices.harm_IJ), aim_IJ, np.inf)
    costs = np.stack([*(table.cost(kind) for kind in limits), *(table.harm() for _ in quality)]) if budgets else np.zeros((1, *aim_IJ.shape))
    rooms = np.array([table.room(kind, budgets[kind]) - cache_harm * (kind in QUALITY) for kind in (*limits, *quality)]) if budgets else np.zeros(1)
    drops = drops or "flops" in budgets
    extra = table.kept_blocks(limits, quality) * drops
    leaving = table.drops(limits, quality, budgets) if drops else None
    try:
        if leaving is not None:
            found, gone = block_drops.solve(aim_IJ, costs, rooms + extra, leaving)
            found.choice[np.concatenate([table.block_items(block) for block in gone] or [np.zeros(0, dtype=np.int64)])] = choices.options.index(GONE)
        else:
            found = knapsack.solve(aim_IJ, costs, rooms)
    except knapsack.Infeasible as error:
        raise table.infeasible((*limits, *quality), budgets, costs, rooms, error.lowest - extra, leaving) from None
    price = {kind: float(value) for kind, value in zip((*limits, *quality), found.price, strict=False)}
    return _allocation(choices, found.choice, base, latency, began, price, cache_harm)


def _allocation(choices: Choices, choice: NDArray[np.int64], base: Recipe | None, latency: LatencyTable | None, began: float,
                price: dict[str, float] | None = None, cache_harm: float = 0.0) -> Allocation:  # fmt: skip
    options = {layer: choices.options[option].id for layers, option in zip(choices.items, choice, strict=True) for layer in layers}
    recipe = recipe_of(choices, choice, base)
    return Allocation(recipe, options, predict(choices, choice, recipe, latency, cache_harm), time.perf_counter() - began, choice, price or {})


def recipe_of(choices: Choices, choice: NDArray[np.int64], base: Recipe | None = None) -> Recipe:
    """The recipe of a choice: the commonest option for all layers, then one line an option for those that differ."""
    anatomy = choices.anatomy
    by_option: dict[int, list[str]] = {}
    ends: dict[str, Any] = _ends(choices)
    gone = dropped(choices, choice)
    for layers, option in zip(choices.items, choice, strict=True):
        if choices.options[option] is GONE:
            continue
        if layers == (anatomy.embedding.name,):
            weights = choices.options[option].scheme.weights
            ends["embedding"] = end_scheme(weights.bits) if weights else None
        else:
            by_option.setdefault(int(option), []).extend(layers)
    sizes = Counter({option: sum(anatomy.by_name[name].numel for name in names) for option, names in by_option.items()})
    order = [option for option, _ in sizes.most_common()]
    schemes = [choices.options[option].scheme for option in order]
    lines = [_line("*", schemes[0], None)] if not schemes[0].is_dense else []
    lines += [_line(role_pattern(by_option[option], anatomy), scheme, schemes[0]) for option, scheme in zip(order[1:], schemes[1:], strict=True)]
    values: dict[str, Any] = {"schemes": lines, "stages": _stages(schemes, base), **ends}
    if gone:
        values["structure"] = Structure(drop_blocks=gone)
    return base.model_copy(update={**values, "model": anatomy.model}) if base else Recipe(model=anatomy.model, **values)


def dropped(choices: Choices, choice: NDArray[np.int64]) -> list[int]:
    """The blocks that a choice leaves out."""
    names = [layers[0] for layers, option in zip(choices.items, choice, strict=True) if choices.options[option] is GONE]
    return sorted({block for name in names if (block := choices.anatomy.by_name[name].block) is not None})


def _ends(choices: Choices) -> dict[str, Any]:
    """Embedding and untied head at the width that the table counts them with."""
    bits = HEAD_BITS if choices.embedding_bits is None else choices.embedding_bits
    return {"embedding": end_scheme(bits)} | ({"head": end_scheme(bits)} if choices.anatomy.head else {})


def _line(match: str, scheme: Scheme, under: Scheme | None) -> SchemeLine:
    """A line that makes layers this scheme, whatever `under` made of them before."""
    fields: dict[str, Any] = scheme.model_dump(exclude_none=True)
    fields |= {part: "dense" for part in ("weights", "sparsity", "rank") if under is not None and getattr(under, part) and part not in fields}
    return SchemeLine.model_validate({"match": match, **fields})


def _stages(schemes: Sequence[Scheme], base: Recipe | None) -> list[Stage]:
    """Those of the base, or the plain method of every part that the schemes ask for."""
    if base is not None and base.stages:
        return list(base.stages)
    return [Stage(method=method) for part, method in DEFAULT_STAGES.items() if any(getattr(scheme, part) for scheme in schemes)]


def predict(choices: Choices, choice: NDArray[np.int64], recipe: Recipe, latency: LatencyTable | None = None, cache_harm: float = 0.0) -> dict[str, float]:
    """Sizes, exact to the byte, and the harm that the scores add up to: as `kl` and `perplexity_ratio` where they are nats, else as `score`."""
    size = size_of(recipe, choices.anatomy)
    harm_I = choices.harm_IJ[np.arange(len(choice)), choice]
    gone = dropped(choices, choice)
    harm = float(harm_I[np.isfinite(harm_I)].sum()) + sum(choices.drop_harm[block] for block in gone) + cache_harm
    quality = {"kl": harm, "perplexity_ratio": math.exp(min(harm, 700.0))} if choices.in_nats else {"score": harm}
    sizes = {"bytes": size.bytes, "bits_per_weight_linears": size.bits_per_weight_linears, "bits_per_weight_model": size.bits_per_weight_model}
    speed = {"latency_s": latency.token_seconds(choices, choice)} if latency else {}
    more = {"flops": float(flops_per_token(recipe, choices.anatomy))} if gone else {}
    cache = {"kv_bytes": bytes_per_token(recipe.kv_cache, choices.anatomy)} if recipe.kv_cache else {}
    return {**quality, **sizes, **speed, **more, **cache}


# The frontier and the reasons --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One allocation on paper."""

    step: int
    bytes: int
    linear_bits: float
    harm: float


@dataclass(frozen=True)
class Curve:
    """All allocations that are best at some price of a byte, the smallest first; and the same option everywhere, for reference."""

    choices: Choices
    inner: knapsack.Frontier
    points: tuple[Point, ...]
    uniform: dict[str, Point]

    def at(self, step: int, base: Recipe | None = None, latency: LatencyTable | None = None) -> Allocation:
        """The allocation of a point."""
        return _allocation(self.choices, self.inner.choice(step), base, latency, time.perf_counter())


def frontier(choices: Choices) -> Curve:
    """Stored bytes against predicted harm, every point at once."""
    inner = knapsack.frontier(choices.harm_IJ, choices.bytes_IJ)
    linear = choices.linear_bytes_IJ[np.arange(len(choices.items)), inner.start].sum()
    steps = [0.0]
    now = inner.start.copy()
    for item, option in zip(inner.item, inner.option, strict=True):
        steps.append(choices.linear_bytes_IJ[item, option] - choices.linear_bytes_IJ[item, now[item]])
        now[item] = option
    linears = 8 * (linear + np.cumsum(steps)) / choices.anatomy.linear_params
    totals = zip(inner.cost + choices.rest_bytes, linears, inner.harm, strict=True)
    points = tuple(Point(step, int(size), float(bits), float(harm)) for step, (size, bits, harm) in enumerate(totals))
    return Curve(choices, inner, points, _uniform(choices))


def _uniform(choices: Choices) -> dict[str, Point]:
    """The same option for every linear, where all of them have it; the embedding as it is cheapest where it is free."""
    found = {}
    embedding = choices.items[-1] == (choices.anatomy.embedding.name,)
    linears = slice(0, len(choices.items) - embedding)
    for option, it in enumerate(choices.options):
        harm = choices.harm_IJ[linears, option].sum()
        if it is not DENSE and np.isfinite(harm):
            stored = choices.bytes_IJ[linears, option].sum()
            ends = choices.bytes_IJ[-1][np.isfinite(choices.harm_IJ[-1])].min() if embedding else 0.0
            bits = 8 * stored / choices.anatomy.linear_params
            found[it.id] = Point(-1, int(stored + ends) + choices.rest_bytes, float(bits), float(harm))
    return found


@dataclass(frozen=True)
class Reason:
    """One option of a layer: what it costs, what it harms, and both in nats at the budget's price."""

    option: str
    bytes: int
    harm: float
    priced: float
    chosen: bool


def reasons(choices: Choices, allocation: Allocation, layer: str) -> list[Reason]:
    """Why a layer got what it got: every option's harm and bytes, the dearest in bytes first. The chosen one has (nearly) the least priced harm."""
    item = choices.item_of(layer)
    byte_price = price_of_a_byte(choices, allocation)
    found = []
    for option, it in enumerate(choices.options):
        harm = float(choices.harm_IJ[item, option])
        if math.isfinite(harm):
            size = int(choices.bytes_IJ[item, option])
            found.append(Reason(it.id, size, harm, harm + byte_price * size, option == allocation.choice[item]))
    return sorted(found, key=lambda reason: -reason.bytes)


def price_of_a_byte(choices: Choices, allocation: Allocation) -> float:
    """Harm that one byte more would save at this allocation: the slope of the frontier there."""
    there = allocation.choice != choices.options.index(GONE)
    used = float(choices.bytes_IJ[np.arange(len(choices.items)), allocation.choice][there].sum())
    inner = knapsack.frontier(choices.harm_IJ, choices.bytes_IJ)
    step = int(np.searchsorted(inner.cost, used, side="right")) - 1
    step = min(max(step, 0), len(inner.cost) - 2)
    if step < 0:
        return 0.0
    return float((inner.harm[step] - inner.harm[step + 1]) / (inner.cost[step + 1] - inner.cost[step]))
