"""Which recipe to try next: multi-objective search that starts from what the sensitivities foretell. Knows scores and trials; runs nothing, torch-free.

A proposal is a budget of bits, a method of rounding, and a weight for the harm of each role and of the outer blocks; its recipe is
the exact allocation of the budget under the weighed harms. With all weights 1 that is the best recipe by the scores, so the
search looks for where the scores, which take harms to add up, are wrong. The two aims are stored bytes and measured KL
divergence. The sampler is a multi-objective tree-structured Parzen estimator (Ozaki et al. 2022); its prior is made of
proposals with predicted divergences, scaled by what measured ones turned out to be.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from bitpress.engine import knapsack
from bitpress.engine.allocate import allocate
from bitpress.engine.choices import Choices
from bitpress.engine.errors import InputError
from bitpress.engine.methods.catalogue import kinds, problems
from bitpress.engine.recipe import Recipe, Stage
from bitpress.engine.stage_fit import fit_stages
from bitpress.engine.sweep import Point, Search, Values

SEEDS = 1 / 3  # of the trials: the best by the scores alone, at budgets spread evenly
PRIOR = 48  # foretold proposals that the sampler starts from
MOST_WEIGHT = 4.0
OUTER = 0.1  # of the blocks at either end
BITS, METHOD, ENDS = "linear_bits", "method", "ends"


@dataclass(frozen=True)
class Tried:
    """A point that was measured. kl, and the foretold one, in nats a token."""

    given: Values
    bytes: float
    kl: float
    foretold: float


class Proposer:
    """Proposes points one after the other. Everything follows from what was tried, so a search that was stopped goes on as if it had not been."""

    def __init__(self, choices: Choices, search: Search, base: Recipe) -> None:
        """choices: of scores in nats. Raises InputError for a budget of bits that no recipe meets."""
        self.choices, self.search, self.base = choices, search, base
        self.roles = tuple(dict.fromkeys(part.role for part in choices.anatomy.linears))
        for bits in (search.low, search.high):
            self.point({BITS: bits, METHOD: search.methods[0]}, 0)
        self.prior = [(given, *self._foretold(given)) for given in self._drawn()]

    def _space(self) -> dict[str, BaseDistribution]:
        weight = FloatDistribution(1 / MOST_WEIGHT, MOST_WEIGHT, log=True)
        return {
            BITS: FloatDistribution(self.search.low, self.search.high),
            METHOD: CategoricalDistribution(self.search.methods),
            **dict.fromkeys((*self.roles, ENDS), weight),
        }

    def _drawn(self) -> list[Values]:
        rng = random.Random(self.base.seed)
        draw = lambda: math.exp(rng.uniform(-1, 1) * math.log(MOST_WEIGHT))  # noqa: E731
        return [
            {BITS: rng.uniform(self.search.low, self.search.high), METHOD: rng.choice(self.search.methods), **{role: draw() for role in (*self.roles, ENDS)}}
            for _ in range(PRIOR)
        ]

    @property
    def seeds(self) -> list[Values]:
        """The proposals that come first: what the scores themselves think best, for every method."""
        methods = self.search.methods
        count = max(2, math.ceil(self.search.trials * SEEDS / len(methods)))
        spread = [self.search.low + (self.search.high - self.search.low) * place / (count - 1) for place in range(count)]
        return [{BITS: round(bits, 3), METHOD: method} for bits in spread for method in methods]

    def next(self, tried: Sequence[Tried], open_points: Sequence[Point], number: int) -> Point:
        """The point of this number, given what was measured and what is under way."""
        if number < len(self.seeds):
            return self.point(self.seeds[number], number)
        study = self._study(tried, open_points, number)
        asked = study.ask(self._space())
        return self.point({name: round(value, 3) if isinstance(value, float) else value for name, value in asked.params.items()}, number)

    def _foretold(self, given: Values) -> tuple[float, float]:
        """(bytes, divergence by the scores) of a proposal."""
        weighed_IJ = self.choices.harm_IJ * self._weights(given)[:, None]
        limit = np.array([given[BITS] * self.choices.anatomy.linear_params / 8])
        chosen = (np.arange(len(weighed_IJ)), knapsack.solve(weighed_IJ, self.choices.linear_bytes_IJ[None], limit).choice)
        return float(self.choices.bytes_IJ[chosen].sum()) + self.choices.rest_bytes, float(self.choices.harm_IJ[chosen].sum())

    def point(self, given: Values, number: int) -> Point:
        """The recipe of a proposal, and the divergence that the scores themselves foretell of it."""
        weighed = replace(self.choices, harm_IJ=self.choices.harm_IJ * self._weights(given)[:, None])
        base = self.base.model_copy(update={"stages": _stages(self.base, given[METHOD])})
        found = allocate(weighed, {BITS: given[BITS]}, base)
        recipe = fit_stages(found.recipe, self.choices.anatomy, kinds())
        foretold = float(self.choices.harm_IJ[np.arange(len(found.choice)), found.choice].sum())
        wrong = " ".join(map(str, problems(recipe, self.choices.anatomy)[:2]))
        name = f"{given[BITS]:.3g} bits by {given[METHOD]}"
        return Point(number=number, name=name, given=given, recipe=recipe, predicted=foretold, wrong=wrong)

    def _weights(self, given: Mapping[str, Any]) -> np.ndarray:
        """What multiplies the harm of each item."""
        anatomy = self.choices.anatomy
        outer = max(1, round(OUTER * anatomy.blocks))

        def weight(layer: str) -> float:
            part = anatomy.by_name[layer]
            at_end = part.block is not None and not outer <= part.block < anatomy.blocks - outer
            return float(given.get(part.role, 1.0)) * (float(given.get(ENDS, 1.0)) if at_end else 1.0)

        return np.array([np.mean([weight(layer) for layer in layers]) for layers in self.choices.items])

    def scale(self, tried: Sequence[Tried], method: str) -> float:
        """Measured over foretold divergence of this method so far; of all methods, or 1, before one of its was measured."""
        ratios = [(one.given[METHOD], one.kl / one.foretold) for one in tried if one.kl > 0 and one.foretold > 0]
        own = [ratio for name, ratio in ratios if name == method]
        return median(own or [ratio for _, ratio in ratios] or [1.0])

    def _study(self, tried: Sequence[Tried], open_points: Sequence[Point], number: int) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=self.base.seed + number, n_startup_trials=0)
        study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        scales = {method: self.scale(tried, method) for method in self.search.methods}
        under_way = [(point.given, *self._foretold(point.given)) for point in open_points]
        for given, size, kl in (*self.prior, *under_way):
            self._tell(study, given, size, scales[given[METHOD]] * kl)
        for one in tried:
            self._tell(study, one.given, one.bytes, one.kl)
        return study

    def _tell(self, study: optuna.Study, given: Values, size: float, kl: float) -> None:
        space = self._space()
        params = {name: given.get(name, 1.0) for name in space}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, values=[size, kl]))


def _stages(base: Recipe, method: str) -> list[Stage]:
    """The base's stages with this method in the place of the one that rounds; its options are kept where it is the same."""
    kind = kinds()
    own = next((stage for stage in base.stages if stage.method == method), Stage(method=method))
    return [*(stage for stage in base.stages if kind.get(stage.method) != "quantize" and stage.method != method), own]


def check_methods(search: Search) -> None:
    """Raises InputError for a method that does not round weights."""
    kind = kinds()
    unknown = [method for method in search.methods if kind and kind.get(method) != "quantize"]
    if unknown:
        able = ", ".join(sorted(name for name, family in kind.items() if family == "quantize"))
        raise InputError(f"'{unknown[0]}' does not round weights.", "", f"Methods that do are {able}.")
