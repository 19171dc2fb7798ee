"""What the stages of a run chose to remove, as a file that a reader without torch can read. Knows recipes and one JSON file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitpress.engine.recipe import Recipe, SchemeLine, SparsityScheme
from bitpress.engine.structure import Structure

NAME = "chosen.json"


def write_chosen(folder: Path, values: Mapping[str, Any]) -> None:
    """Write {structure, ratios} whole or not at all."""
    partial = folder / f"{NAME}.partial"
    partial.write_text(json.dumps(values))
    partial.replace(folder / NAME)


def decided_recipe(folder: Path, recipe: Recipe) -> Recipe:
    """The recipe with what its run has chosen; the recipe itself where nothing had to be chosen, or is not chosen yet."""
    try:
        values = json.loads((folder / NAME).read_text())
    except FileNotFoundError:
        return recipe
    return decided(recipe, Structure.model_validate(values["structure"]), values["ratios"])


def decided(recipe: Recipe, structure: Structure, ratios: Mapping[str, float]) -> Recipe:
    """The recipe with a structure in numbers, and a line for every layer whose share of zeros was chosen."""
    lines = [SchemeLine(match=name, sparsity=SparsityScheme(ratio=ratio)) for name, ratio in ratios.items()]
    return recipe.model_copy(update={"structure": structure, "schemes": [*recipe.schemes, *lines]})
