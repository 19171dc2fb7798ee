"""What is known of a recipe on a model, and how it is known: exact sizes, the ideal bound, and the run that measured just this.

Knows runs and accounting, no widget. A number never outlives its recipe: it is found again by digest on every look.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from bitpress.app import state
from bitpress.app.ui.sensitivity_read import measured_of
from bitpress.engine.accounting import Size, size_of, weight_bytes_per_token
from bitpress.engine.data.texts import resolve_text
from bitpress.engine.errors import BitpressError
from bitpress.engine.home import assets_dir
from bitpress.engine.methods.catalogue import check_stages, read_catalogue
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Problem, Recipe, Scheme
from bitpress.engine.runs.jobs import digest_of
from bitpress.engine.runs.status import Status, read_status
from bitpress.engine.runs.store import Run, Store

KEPT_PREDICTIONS = 64


@dataclass(frozen=True)
class Prediction:
    """What needs no run: every linear's scheme, stored bytes exact to the byte, the ideal gain in decode speed. Or the problems in the way."""

    size: Size | None
    speedup: float = 1.0
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


_predictions: dict[tuple[str, str], Prediction] = {}


def predict(recipe: Recipe, anatomy: Anatomy) -> Prediction:
    """Size and bound of a recipe on a model, from shapes alone; remembered by digest."""
    key = (recipe.digest(), anatomy.fingerprint)
    if key not in _predictions:
        if len(_predictions) >= KEPT_PREDICTIONS:
            _predictions.pop(next(iter(_predictions)), None)
        _predictions[key] = _predict(recipe, anatomy)
    return _predictions[key]


def _predict(recipe: Recipe, anatomy: Anatomy) -> Prediction:
    problems = tuple(recipe.validate_for(anatomy))
    if any(problem.field.startswith(("schemes[", "structure")) for problem in problems):
        return Prediction(None, problems=problems)
    speedup = _dense_reads(anatomy) / weight_bytes_per_token(recipe, anatomy)
    return Prediction(size_of(recipe, anatomy), speedup, recipe.resolve(anatomy), problems)


_reads: dict[str, int] = {}


def _dense_reads(anatomy: Anatomy) -> int:
    """Bytes that a decode step of the dense model reads; it never changes, so it is worked out once a model."""
    if anatomy.fingerprint not in _reads:
        _reads[anatomy.fingerprint] = weight_bytes_per_token(None, anatomy)
    return _reads[anatomy.fingerprint]


_checked: dict[tuple[str, str, str], list[Problem]] = {}


def problems_of(recipe: Recipe, anatomy: Anatomy, prediction: Prediction) -> list[Problem]:
    """All that keeps a recipe from running: of the recipe itself, and of its stages where the method catalogue is known."""
    if prediction.problems:
        return list(prediction.problems)
    known = catalogue()
    if known is None:
        return []
    key = (recipe.digest(), anatomy.fingerprint, str(known.get("digest")))
    if key not in _checked:
        if len(_checked) >= KEPT_PREDICTIONS:
            _checked.pop(next(iter(_checked)), None)
        _checked[key] = check_stages(recipe, anatomy, known)
    return list(_checked[key])


def catalogue() -> dict[str, Any] | None:
    """The method catalogue that a worker wrote, None before the first one ran."""
    try:
        return read_catalogue()
    except (BitpressError, OSError, ValueError):
        return None


def measured_run(recipe: Recipe, anatomy: Anatomy) -> Run | None:
    """The newest finished run of exactly this recipe, model and text."""
    entry = next((entry for entry in state.models() if entry.id == recipe.model), None)
    if entry is None:
        return None
    text, _ = resolve_text(recipe.measure.text, entry, "evaluation")
    return Store().find_finished(digest_of(recipe, anatomy.fingerprint, text))


def recorded_run(recipe: Recipe, preset: str) -> Run | None:
    """The recording shipped with Bitpress for a preset on a model, where the recipe on screen is that preset."""
    run = Run(assets_dir() / "recorded" / f"{recipe.model}-{preset}")
    if not (run.path / "metrics.json").exists():
        return None
    return run if same_work(run, recipe) else None


def same_work(run: Run, recipe: Recipe) -> bool:
    """Whether a run did what this recipe says, by the recipe's digest."""
    return _recipe_digest(str(run.path)) == recipe.digest()


@lru_cache(maxsize=256)
def _recipe_digest(folder: str) -> str | None:
    recipe = Run(Path(folder)).recipe()
    return recipe.digest() if recipe else None


def open_job(model: str | None = None) -> Status | None:
    """The newest compress run that waits or works, of one model or of any."""
    active = Store().list(kind="compress", state=("queued", "running", "cancelling"))
    return next((status for status in active if model is None or status.model == model), None)


def run_of(status: Status) -> Run:
    """The run of a record."""
    return Store().get(status.id)


def is_recording(run: Run) -> bool:
    """Whether a run is one that ships with Bitpress."""
    return run.path.parent == assets_dir() / "recorded"


def status_of(run: Run) -> Status:
    """The record of a run; a recording that has none counts as finished."""
    return read_status(run.path) or Status(run.id, "compress", state="finished")


def sensitivity_of(anatomy: Anatomy) -> tuple[dict[str, float], str]:
    """Score by layer of the last measured sensitivity at 4 bits, the kind nearest to the truth that was measured, and which score it is."""
    found = measured_of(anatomy)
    if found is None:
        return {}, ""
    kind = next((name for name in ("kl", "fisher", "activation") if name in found.tables), next(iter(found.tables)))
    option = next((name for name in found.tables[kind] if name.startswith("4")), next(iter(found.tables[kind])))
    return dict(found.tables[kind][option]), f"{kind.replace('_', ' ')}, {option}"
