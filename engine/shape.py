"""From a recipe to the shape of its model: runs the stages that choose what goes, once, and rebuilds what they chose. Knows the order of things.

What is chosen is written to the run's `shape.safetensors` (with the repaired weights) and, for readers without torch, `chosen.json`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bitpress.engine.chosen import decided, write_chosen
from bitpress.engine.decode import check_cache
from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.layer_store import MadeFrom, ShapeStore
from bitpress.engine.methods import registry
from bitpress.engine.methods.base import MethodOptions, ShapeMethod
from bitpress.engine.model import sharing, surgery
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import Recipe
from bitpress.engine.scene import Scene, load_repaired, moved, reshape
from bitpress.engine.structure import Structure, ends_warning

Emit = Callable[[str, dict[str, Any]], None]
ShapeStages = list[tuple[ShapeMethod, MethodOptions, str]]  # method, options, targets


@dataclass(frozen=True)
class Chosen:
    """A recipe with everything decided, and the weights that were repaired on the way, by the dense model's names."""

    recipe: Recipe
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Shaped:
    """A twin of the dense model in its new shape, its anatomy, and the place in it of every block linear that stays."""

    model: nn.Module
    anatomy: Anatomy
    places: dict[str, str]


def shape_stages(recipe: Recipe) -> ShapeStages:
    """The stages of a recipe that choose what goes. Raises InputError for unknown methods and options."""
    staged = [(registry.get(stage.method), stage) for stage in recipe.stages]
    return [(method, method.parse(stage.options), stage.targets) for method, stage in staged if isinstance(method, ShapeMethod)]


def reads_text(recipe: Recipe) -> bool:
    """Whether a stage that chooses what goes looks at text."""
    return any(method.reads_text(options) for method, options, _ in shape_stages(recipe))


def choose(loaded: Loaded, recipe: Recipe, ids_SL: Tensor | None, emit: Emit, should_stop: Callable[[], bool]) -> Chosen:
    """Run the stages that choose. Says `stage_started` and `progress` for each. Raises as its methods do, Cancelled when told to stop."""
    stages = shape_stages(recipe)
    if not stages:
        return Chosen(recipe, {})
    scene = Scene(loaded, recipe, ids_SL, lambda done, total: emit("progress", {"done": done, "total": total}), should_stop)
    for method, options, targets in stages:
        emit("stage_started", {"stage": f"choosing what goes: {method.title}", "total": 0})
        scene.targets = targets
        method.shape(scene, options)
    made = decided(recipe, scene.structure, scene.ratios)
    emit("note", {"level": "info", "text": summary(made, loaded.anatomy)})
    return Chosen(made, scene.tensors())


def summary(made: Recipe, anatomy: Anatomy) -> str:
    """What was chosen, in a sentence."""
    reduced = made.reduced(anatomy)
    units = [reduced.units_of(block) for block in reduced.present]
    share = 1 - reduced.linear_params / anatomy.linear_params
    heads, neurons = sum(unit.heads for unit in units), sum(unit.neurons for unit in units)
    if made.structure.share_blocks:
        words = "; ".join(f"{', '.join(map(str, group[:-1]))} and {group[-1]}" for group in made.structure.share_blocks)
        return f"Blocks {words} share their matrices, each with rank {made.structure.share_rank or 0} of its own."
    counts = f"{heads} of {anatomy.blocks * anatomy.heads} heads, {neurons:,} of {anatomy.blocks * anatomy.ffn:,} neurons"
    if stream := made.structure.stream:
        extra = stream.turns(anatomy.hidden, anatomy.blocks) / anatomy.linear_params
        counts = f"{stream.width} of {anatomy.hidden} channels between them"
        return f"{len(units)} of {anatomy.blocks} blocks, {counts} stay; {share:.1%} of the block linears' weights are gone, and {extra:.1%} came to turn them."
    return f"{len(units)} of {anatomy.blocks} blocks, {counts} stay; {share:.1%} of the block linears' weights are gone."


def tell_ends(recipe: Recipe, anatomy: Anatomy, emit: Emit) -> None:
    """Say so when the first or the last block goes, which only a recipe can name: no method takes them."""
    if text := ends_warning(recipe.dropped_blocks(anatomy), anatomy.blocks):
        emit("note", {"level": "warning", "text": text})


def chosen_for(
    loaded: Loaded, recipe: Recipe, ids_SL: Tensor | None, made_from: MadeFrom, emit: Emit, folder: Path | None, should_stop: Callable[[], bool]
) -> Chosen:
    """What an earlier start of the run chose, else a choice made and kept now."""
    kept = ShapeStore(folder).load(made_from) if folder else None
    if kept is not None:
        return _restored(recipe, *kept)
    made = choose(loaded, recipe, ids_SL, emit, should_stop)
    if folder and shape_stages(recipe):
        ratios = {line.match: line.sparsity.ratio for line in made.recipe.schemes[len(recipe.schemes) :] if line.sparsity and line.sparsity != "dense"}
        values = {"structure": made.recipe.structure.model_dump(mode="json"), "ratios": ratios}
        ShapeStore(folder).save(values, dict(made.tensors), made_from)
        write_chosen(folder, values)
    return made


def restore(recipe: Recipe, folder: Path, made_from: MadeFrom) -> Chosen:
    """What a finished run chose. Raises BitpressError when it should have chosen and has not."""
    if not shape_stages(recipe):
        return Chosen(recipe, {})
    kept = ShapeStore(folder).load(made_from)
    if kept is None:
        raise BitpressError(f"The run {folder.name} is not finished.", "What it removes is not chosen yet.", "Resume the run.")
    return _restored(recipe, *kept)


def _restored(recipe: Recipe, values: dict[str, Any], tensors: dict[str, Tensor]) -> Chosen:
    return Chosen(decided(recipe, Structure.model_validate(values["structure"]), values["ratios"]), tensors)


def shape_twin(loaded: Loaded, chosen: Chosen) -> Shaped:
    """The twin that a decided recipe's structure asks for; what is neither smaller nor repaired is still the dense model's."""
    model, anatomy, recipe = surgery.twin(loaded.model), loaded.anatomy, chosen.recipe
    if found := recipe.validate_for(anatomy):
        raise InputError("What was chosen does not fit the recipe's schemes.", " ".join(map(str, found)), "Change the named fields.")
    if recipe.kv_cache:
        model.kv_scheme = recipe.kv_cache  # type: ignore[assignment]  # read by whatever decodes or scores the model
        check_cache(model)
    numbers = reshape(model, anatomy, recipe.structure)
    reduced = recipe.reduced(anatomy)
    made = moved(reduced, sorted(numbers))
    places = {old.name: new.name for old, new in zip(reduced.linears, made.linears, strict=True)}
    load_repaired(model, chosen.tensors, places)
    sharing.share(model, sharing.layers_together(anatomy, recipe.structure.share_blocks), places)
    return Shaped(model, made, places)
