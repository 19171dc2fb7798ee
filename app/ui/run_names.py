"""What a run is called on a screen: its plan in a few words, and a short id that tells it from the next. Knows recipes and presets."""

from functools import lru_cache

from bitpress.engine.errors import BitpressError
from bitpress.engine.recipe import Recipe
from bitpress.engine.recipe_presets import list_presets
from bitpress.engine.runs.status import Status
from bitpress.engine.runs.store import Run, Store

DENSE = "dense"
MODEL_AND_TEXT = {"model", "measure", "calibration", "seed"}


def short_id(run_id: str) -> str:
    """The last four digits of a run's id."""
    return run_id[-4:]


def plan_of(recipe: Recipe) -> str:
    """The preset that the recipe is, else what its first line says and how many more it has."""
    plan = recipe.model_dump(exclude=MODEL_AND_TEXT)
    for preset in list_presets():
        if preset.recipe.model_dump(exclude=MODEL_AND_TEXT) == plan:
            return preset.title
    if not recipe.schemes:
        return "Dense blocks"
    first, more = recipe.schemes[0], len(recipe.schemes) - 1
    weights, sparsity = first.weights, first.sparsity
    said = f"{weights.bits} bit" if hasattr(weights, "bits") and weights.bits else ""
    if hasattr(sparsity, "ratio"):
        said = " ".join(part for part in (said, f"{sparsity.ratio:.0%} zeros") if part)
    return f"{said or 'Custom'}{f', {more} more lines' if more > 1 else ', 1 more line' if more else ''}"


@lru_cache(maxsize=2048)
def _plan(folder: str, run_id: str) -> str:
    try:
        recipe = Run(Store().folder / run_id).recipe()
    except (BitpressError, OSError):
        return ""
    return plan_of(recipe) if recipe else ""


def plan_of_run(status: Status) -> str:
    """The plan of a compress run, the title of any other. A run's recipe never changes, so it is read once."""
    return (_plan(str(Store().folder), status.id) if status.kind == "compress" else "") or status.title


def title_of_run(status: Status) -> str:
    """Plan and short id."""
    return f"{plan_of_run(status)} · {short_id(status.id)}"


def finished_runs(model: str, limit: int = 100) -> dict[str, str]:
    """Finished compress runs of a model, newest first: id -> title."""
    found = Store().list(kind="compress", state="finished", limit=1000)
    return {status.id: title_of_run(status) for status in [status for status in found if status.model == model][:limit]}
