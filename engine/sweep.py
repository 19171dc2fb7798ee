"""Many recipes around one: every combination of a few values, or a search. Knows plans and points; runs nothing, torch-free.

A sweep is a plan: a base recipe with either a `grid` (axis -> values) or a `search` (`sweep_search`). Each point is an ordinary
recipe, so what comes of it is an ordinary run.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, ValidationError

from bitpress.engine.errors import InputError
from bitpress.engine.fields import Strict
from bitpress.engine.methods.catalogue import kinds, problems
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Recipe, Stage
from bitpress.engine.stage_fit import fit_stages

MOST_POINTS = 500
DENSE_BITS = 16
Values = dict[str, Any]


class Search(Strict):
    """How a search goes: how many recipes it tries, between which bits a linear weight, with which methods of rounding."""

    trials: Annotated[int, Field(ge=2, le=MOST_POINTS)] = 16
    low: Annotated[float, Field(ge=1.0, le=16.0)] = 2.5
    high: Annotated[float, Field(ge=1.0, le=16.0)] = 6.0
    methods: tuple[str, ...] = ("rtn",)


class SweepPlan(Strict):
    """A base recipe and what is tried around it: a grid or a search."""

    base: Recipe
    grid: dict[str, list[Any]] | None = None
    search: Search | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "SweepPlan":
        """Check plain values. Raises InputError for what is no plan, for an empty or too large grid, and for a search the wrong way round."""
        try:
            plan = cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError("This sweep cannot be used.", f"{'.'.join(map(str, first['loc']))}: {first['msg']}.", "Correct the named field.") from None
        if (plan.grid is None) == (plan.search is None):
            raise InputError("A sweep needs a grid or a search.", "Both, or neither, were given.", "Give one of them.")
        if plan.search and plan.search.low >= plan.search.high:
            why = f"It goes from {plan.search.low:g} to {plan.search.high:g} bits."
            raise InputError("The search has no room.", why, "Give a lower end below the upper one.")
        if plan.grid is not None:
            _check_grid(plan.grid)
        return plan

    @property
    def size(self) -> int:
        """How many points it has at most."""
        return self.search.trials if self.search else math.prod(len(values) for values in (self.grid or {}).values())


def _check_grid(grid: Mapping[str, Sequence[Any]]) -> None:
    if not grid or not all(grid.values()):
        raise InputError("The grid is empty.", "An axis needs at least one value.", "Add one, such as bits=3,4.")
    count = math.prod(len(values) for values in grid.values())
    if count > MOST_POINTS:
        raise InputError(f"A grid of {count:,} recipes is too large.", f"The limit is {MOST_POINTS}.", "Leave out values.")


class Point(Strict):
    """One recipe of a sweep. name: what tells it from the others. given: what was chosen on each axis. wrong: why it cannot run, else empty."""

    number: int
    name: str
    given: Values
    recipe: Recipe
    predicted: float | None = None
    wrong: str = ""


# Grids -------------------------------------------------------------------------------------------------------------


def grid_points(plan: SweepPlan, anatomy: Anatomy) -> list[Point]:
    """Every combination of the grid, each recipe once, with the stages that its schemes ask for. Raises InputError for an axis or value
    that no recipe has, and where not one of the recipes fits the model."""
    grid, seen = plan.grid or {}, set[str]()
    points: list[Point] = []
    for values in itertools.product(*grid.values()):
        point = point_of(plan.base, dict(zip(grid, values, strict=True)), anatomy, len(points))
        if point.recipe.digest() not in seen:
            seen.add(point.recipe.digest())
            points.append(point)
    if all(point.wrong for point in points):
        raise InputError("No recipe of this grid can run.", points[0].wrong, "Change the base recipe or the values.")
    return points


def point_of(base: Recipe, given: Values, anatomy: Anatomy, number: int) -> Point:
    """The base with these values set, and what keeps it from running. Raises InputError as `grid_points` does."""
    recipe = base
    for axis, value in given.items():
        recipe = set_axis(recipe, axis, value)
    fitted = fit_stages(recipe, anatomy, kinds())
    name = ", ".join(f"{axis} {value}" for axis, value in given.items())
    return Point(number=number, name=name, given=given, recipe=fitted, wrong=" ".join(map(str, problems(fitted, anatomy)[:2])))


def set_axis(recipe: Recipe, axis: str, value: Any) -> Recipe:
    """One value of one axis: a name of `AXES`, or a path into the recipe such as `schemes.1.rank.keep`. Raises InputError for another."""
    if axis in AXES:
        return AXES[axis](recipe, value)
    steps = axis.split(".")
    if steps[0] not in Recipe.model_fields:
        raise InputError(f"There is no axis '{axis}'.", "", f"Use {', '.join(AXES)}, or a path into the recipe such as calibration.sequences.")
    values = recipe.to_dict()
    _put(values, steps, value, axis)
    return Recipe.from_dict(values)


def _put(values: Any, steps: Sequence[str], value: Any, axis: str) -> None:
    for step, following in itertools.pairwise(steps):
        place: Any = int(step) if isinstance(values, list) and step.isdigit() else step
        if isinstance(values, dict):
            values.setdefault(place, [] if following.isdigit() else {})
        try:
            values = values[place]
        except (IndexError, TypeError):
            raise InputError(f"The recipe has no '{axis}'.", f"There is no {step} to go into.", "Count lines and stages from 0.") from None
    if not isinstance(values, dict):
        raise InputError(f"The recipe has no '{axis}'.", "It ends in no field.", "Name a field, such as schemes.0.weights.bits.")
    values[steps[-1]] = value


def _for_all(recipe: Recipe, part: str, fields: Values | None) -> Recipe:
    """The recipe with these fields in the first line for all layers, which is made where there is none; None leaves the layers dense there."""
    values = recipe.to_dict()
    lines = values["schemes"]
    line = next((line for line in lines if line["match"] == "*"), None)
    if line is None:
        line = {"match": "*"}
        lines.insert(0, line)
    before = line.get(part) if part == "weights" else None  # the other parts are one decision
    line[part] = "dense" if fields is None else {**(before if isinstance(before, dict) else {}), **fields}
    return Recipe.from_dict(values)


def _sparsity(recipe: Recipe, value: Any) -> Recipe:
    """A share of zeros, or a pattern such as 2:4, which is half of them."""
    fields = {"ratio": 0.5, "pattern": value} if isinstance(value, str) else {"ratio": value}
    return _for_all(recipe, "sparsity", fields if value != 0 else None)


def _method(recipe: Recipe, value: Any) -> Recipe:
    """Another method in the place of the one of its kind, with its own options as they are by default."""
    kind = kinds()
    stages = [Stage(method=value) if kind.get(stage.method) == kind.get(value) else stage for stage in recipe.stages]
    return recipe.model_copy(update={"stages": stages if any(stage.method == value for stage in stages) else [*stages, Stage(method=value)]})


def _embedding(recipe: Recipe, value: Any) -> Recipe:
    return Recipe.from_dict({**recipe.to_dict(), "embedding": None if value == DENSE_BITS else {"bits": value}})


AXES: dict[str, Callable[[Recipe, Any], Recipe]] = {
    "bits": lambda recipe, value: _for_all(recipe, "weights", {"bits": value} if value != DENSE_BITS else None),
    "group_size": lambda recipe, value: _for_all(recipe, "weights", {"group_size": value}),
    "sparsity": _sparsity,
    "rank": lambda recipe, value: _for_all(recipe, "rank", {"keep": value} if value != 1 else None),
    "method": _method,
    "embedding": _embedding,
}
