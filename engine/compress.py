"""Run a recipe on a model: block by block, every finished layer durable. Knows the order of things; the mathematics is the methods'.

The dense model stays whole and untouched: the compressed one is a twin that shares its weights, and only what a scheme
changes is replaced in it, by packed codes or by new dense weights. Memory grows by the packed model and one layer's work.

What is to be made is `layer_job`'s to say, one matrix is `layer_make`'s and `layer_install`'s, the pass over all is `making`'s.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bitpress.engine.accounting import kept_whole
from bitpress.engine.calibration_set import CalibrationSet, calibration_set
from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.layer_install import install
from bitpress.engine.layer_job import plan_jobs
from bitpress.engine.layer_store import LayerStore, MadeFrom
from bitpress.engine.making import Emit, LayerResult, Making, ShouldStop
from bitpress.engine.measure.memory import weights_of
from bitpress.engine.methods import registry
from bitpress.engine.methods.catalogue import problems
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.model.load import Loaded
from bitpress.engine.prepare import needs_text, preparations, prepare, prepare_again
from bitpress.engine.recipe import Recipe
from bitpress.engine.shape import chosen_for, reads_text, restore, shape_twin, tell_ends

__all__ = ["Compressed", "LayerResult", "LayerStore", "compress", "load_compressed"]


@dataclass
class Compressed:
    """The compressed model beside its dense twin, its matrices in the order in which they were made, and its stored bytes.

    recipe: the one given, with what its stages chose to remove.
    """

    model: nn.Module
    layers: list[LayerResult]
    bytes: int
    seconds: float
    recipe: Recipe


def quiet(kind: str, data: dict[str, Any]) -> None:
    """An `emit` that says nothing."""


def never() -> bool:
    """A `should_stop` that never stops."""
    return False


def compress(
    loaded: Loaded,
    recipe: Recipe,
    emit: Emit = quiet,
    store: LayerStore | None = None,
    should_stop: ShouldStop = never,
    calibration: CalibrationSet | None = None,
) -> Compressed:
    """Make the model that a recipe describes.

    Says `stage_started`, and for every matrix `layer_done` and `progress`. With a store every finished layer is written,
    and found again by a later call. calibration: None draws the recipe's own text, if a method needs any. Raises
    InputError when the recipe does not fit the model, Cancelled when told to stop, BitpressError when a layer cannot be
    kept or belongs to another run.
    """
    _check(recipe, loaded.anatomy)
    started = time.perf_counter()
    texts = _Texts(loaded, recipe, calibration)
    folder = store.folder.parent if store else None
    if any(preparations(recipe)):
        text = texts.get(needs_text(recipe))
        loaded = prepare(loaded, recipe, text.ids_SL if text else None, texts.made_from(text), folder, emit, should_stop)
    text = texts.get(reads_text(recipe))
    chosen = chosen_for(loaded, recipe, text.ids_SL if text else None, texts.made_from(text), emit, folder, should_stop)
    shaped = shape_twin(loaded, chosen)
    jobs = plan_jobs(chosen.recipe, loaded.anatomy, shaped.places)
    calibration = texts.get(any(job.needs or job.trained or job.taught for job in jobs))
    made_from = texts.made_from(calibration)
    if store:
        store.check(job.part.name for job in jobs)
    tell_whole(chosen.recipe, loaded.anatomy, emit)
    tell_ends(chosen.recipe, loaded.anatomy, emit)
    making = Making(loaded.model, shaped, jobs, made_from, recipe.seed, emit, store, should_stop)
    making.run(calibration)
    size = weights_of(shaped.model, loaded.anatomy.block_prefix, loaded.anatomy.itemsize).stored_bytes
    return Compressed(shaped.model, making.results, size, time.perf_counter() - started, chosen.recipe)


class _Texts:
    """The text that a run may look at, drawn once and only when something asks for it."""

    def __init__(self, loaded: Loaded, recipe: Recipe, given: CalibrationSet | None) -> None:
        self.loaded, self.recipe, self.drawn = loaded, recipe, given

    def get(self, needed: bool) -> CalibrationSet | None:
        """The text; None when it is not needed."""
        if not needed:
            return None
        self.drawn = self.drawn or calibration_set(self.loaded, self.recipe.calibration, self.recipe.seed)
        return self.drawn

    def made_from(self, text: CalibrationSet | None) -> MadeFrom:
        """What a result depends on that has looked at this text."""
        return MadeFrom(self.loaded.anatomy.fingerprint, self.recipe.digest(), text.sha256 if text else "")


def tell_whole(recipe: Recipe, anatomy: Anatomy, emit: Emit) -> None:
    """Say which layers stay whole because their factors would be no smaller."""
    if layers := kept_whole(recipe, anatomy):
        others = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
        emit("note", {"level": "info", "text": f"{layers[0]}{others} stay whole: at or past the break-even rank two factors are no smaller than the matrix."})


def load_compressed(run_folder: Path, loaded: Loaded) -> nn.Module:
    """The compressed model of a finished run, rebuilt from its layers on the dense model it was made from.

    Raises BitpressError when a layer is missing, damaged or was made from something else.
    """
    folder = Path(run_folder)
    recipe = Recipe.from_yaml(folder / "recipe.yaml")
    store, made_from = LayerStore(folder), MadeFrom(loaded.anatomy.fingerprint, recipe.digest(), calibration=None)
    if any(preparations(recipe)):
        loaded = prepare_again(loaded, recipe, folder, made_from)
    chosen = restore(recipe, folder, made_from)
    shaped = shape_twin(loaded, chosen)
    for job in plan_jobs(chosen.recipe, loaded.anatomy, shaped.places):
        stored = store.load(job.part.name, made_from)
        if stored is None:
            raise BitpressError(f"The run {folder.name} is not finished.", f"The layer {job.part.name} is missing.", "Resume the run.")
        install(shaped.model, job, stored)
    return shaped.model


def _check(recipe: Recipe, anatomy: Anatomy) -> None:
    if found := problems(recipe, anatomy, registry.catalogue()):
        raise InputError("This recipe does not fit the model.", " ".join(map(str, found)), "Correct the named fields and try again.")
