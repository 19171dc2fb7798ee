"""How sensitivity scores become squares, a legend, a table and an edit. Pure functions over scores; knows no widget and no file."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log10
from typing import Any

from bitpress.app import edits
from bitpress.app.ui.layer_map import Cell, Legend, grid
from bitpress.app.ui.numbers import amount, whole
from bitpress.engine.model.anatomy import Anatomy, Part
from bitpress.engine.recipe import Recipe

Scores = Mapping[str, float]  # layer name -> harm of one option
Table = Mapping[str, Scores]  # option -> its scores
UNMEASURED = "not measured yet"


@dataclass(frozen=True)
class Bounds:
    """The ends of the logarithmic colour scale."""

    low: float
    high: float

    def place(self, score: float) -> float:
        """Place of a score in 0..1; what is not above zero stands at the beginning."""
        if score <= 0 or self.high <= self.low:
            return 0.0
        return min(1.0, max(0.0, log10(score / self.low) / log10(self.high / self.low)))

    def at(self, place: float) -> float:
        """The score at a place of the scale."""
        return self.low * (self.high / self.low) ** place


def bounds_of(scores: Iterable[float]) -> Bounds | None:
    """From the least to the largest score above zero; None when there is none."""
    found = [score for score in scores if score > 0]
    return Bounds(min(found), max(found)) if found else None


def cells(anatomy: Anatomy, scores: Scores, bounds: Bounds | None, option: str) -> list[Cell]:
    """A square for every role and block, coloured by its score."""

    def draw(part: Part) -> Cell:
        score = scores.get(part.name)
        place = bounds.place(score) if bounds and score is not None else None
        said = f"harm at {option}: {amount(score)}" if score is not None else UNMEASURED
        title = f"Block {part.block}, {part.role}\n{said}\n{whole(part.out_features)} × {whole(part.in_features)}\n{part.name}"
        return Cell(part.name, part.role, part.block, place, amount(score, 2) if score is not None else "", title, level=place)

    return grid(anatomy, draw)


def legend(bounds: Bounds | None, title: str) -> Legend:
    """Five numbers along the logarithmic scale."""
    if bounds is None:
        return Legend(title, ((UNMEASURED, None),))
    places = (0.0, 0.25, 0.5, 0.75, 1.0)
    return Legend(title, tuple((amount(bounds.at(place), 2), place) for place in places), ("logarithmic",))


def ranked(scores: Scores) -> list[str]:
    """Layer names, the most harmed first; equal scores by name."""
    return sorted(scores, key=lambda name: (-scores[name], name))


def rows(anatomy: Anatomy, table: Table, option: str, recipe: Recipe | None) -> dict[str, list[Any]]:
    """The table twin of the heatmap, sorted by the harm of one option, with the width each layer has in the recipe."""
    order = ranked(table[option])
    parts = [anatomy.by_name[name] for name in order]
    words = edits.describe_layers(recipe, anatomy) if recipe is not None else {}
    columns: dict[str, list[Any]] = {
        "rank": list(range(1, len(order) + 1)),
        "block": [part.block for part in parts],
        "role": [part.role for part in parts],
    }
    for name in (option, *(other for other in table if other != option)):
        columns[name] = [table[name].get(layer) for layer in order]
    columns["in the recipe"] = [words.get(name, edits.describe(None) if recipe is not None else "") for name in order]
    columns["layer"] = order
    return columns


def usual_count(layers: int) -> int:
    """How many layers an edit takes unless told otherwise: a fifth of them, at most 20."""
    return max(1, min(20, layers // 5))


def set_bits(recipe: Recipe, anatomy: Anatomy, layers: Sequence[str], bits: int) -> Recipe:
    """The recipe with these layers at one width."""
    return edits.set_weights(recipe, edits.pattern_of(layers, anatomy), anatomy, bits=bits)


def what_changed(before: Recipe, after: Recipe, anatomy: Anatomy, layers: Sequence[str]) -> str:
    """One sentence on an edit: how many layers changed, from what, to what."""
    old, new = before.resolve(anatomy), after.resolve(anatomy)
    changed = [name for name in layers if old.get(name) != new.get(name)]
    if not changed:
        return "Nothing changed: these layers have that width already."
    origins: dict[str, int] = {}
    for name in changed:
        origins[edits.describe(old.get(name))] = origins.get(edits.describe(old.get(name)), 0) + 1
    listed = "; ".join(f"{count} from {origin}" for origin, count in origins.items())
    goals = sorted({edits.describe(new.get(name)) for name in changed})
    return f"{len(changed)} layers changed ({listed}) to {' or '.join(goals)}."


def estimate_seconds(weights: int, past: Sequence[tuple[int, float]], params: int, calibration_tokens: int) -> float:
    """Time that a measurement will take: at the rate of earlier ones on this machine, given as (weights, seconds), else a rough guess.

    The guess counts a forward pass of two operations a weight and token at 1e11 a second, and rounding and comparing every
    weight five times at 5e7 a second, as a laptop with two free cores does.
    """
    if past:
        rates = sorted(seconds / size for size, seconds in past if size)
        return weights * rates[len(rates) // 2]
    return 3.0 + 2.0 * params * calibration_tokens / 1e11 + 5.0 * weights / 5e7
