"""What one browser tab is working on: a model, the recipe being edited with its undo and redo, the run it follows. Knows no widget.

The recipe on screen is always `session().recipe`; widgets are drawn from it and change it through `edit`. Everything here
can be rebuilt from the link: model, preset or recipe digest, run.
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import streamlit as st

from bitpress.app.ui.layer_map import select
from bitpress.engine.data.texts import TextEntry, list_texts
from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.home import home
from bitpress.engine.model import library
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.model.library import ModelEntry
from bitpress.engine.recipe import Recipe
from bitpress.engine.recipe_presets import Preset, for_model, list_presets
from bitpress.engine.runs.store import Run, Store

FIRST_MODEL = "tiny-stories"
FIRST_PRESET = "uniform-4bit"
MAP = "layer-map"
KEPT_EDITS = 200
LOOK_AGAIN_SECONDS = 15.0
_KEY = "bitpress-session"


@dataclass(frozen=True)
class History:
    """Recipes before, now and after; every change gives a new history."""

    now: Recipe
    past: tuple[Recipe, ...] = ()
    future: tuple[Recipe, ...] = ()

    def edited(self, recipe: Recipe) -> "History":
        """With one more edit; an edit that changes nothing leaves no trace. What was undone before is forgotten."""
        return self if recipe == self.now else History(recipe, (*self.past, self.now)[-KEPT_EDITS:])

    def undone(self) -> "History":
        """One step back, as far as there is one."""
        return History(self.past[-1], self.past[:-1], (self.now, *self.future)) if self.past else self

    def redone(self) -> "History":
        """One step forward again, as far as there is one."""
        return History(self.future[0], (*self.past, self.now), self.future[1:]) if self.future else self


@dataclass
class Session:
    """The state of one tab. `edits` rises with every change of the recipe and keys what must be drawn afresh after one."""

    model: str
    preset: str
    history: History
    run: str | None = None
    edits: int = 0
    notice: BitpressError | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe on screen."""
        return self.history.now

    @property
    def base(self) -> Recipe:
        """The chosen preset, unedited."""
        return preset_recipe(self.preset, self.model)


def session() -> Session:
    """The state of this tab; on the first call it is restored from the link, or starts at the tiny model."""
    if _KEY not in st.session_state:
        st.session_state[_KEY] = _from_link()
    return st.session_state[_KEY]


def models() -> list[ModelEntry]:
    """Every model that can be picked, looked up again every few seconds."""
    return _models(str(home()))


def forget_models() -> None:
    """Look the models up again at once: one was added or has become ready."""
    _models.clear()


def texts() -> list[TextEntry]:
    """Every text that can be picked, looked up again every few seconds."""
    return _texts(str(home()))


def presets() -> dict[str, Preset]:
    """All presets by id, in the order in which they are offered."""
    return {preset.id: preset for preset in list_presets()}


# The home folder is part of each key: a process that turns to another home must not see the old one's answers.


@st.cache_data(ttl=LOOK_AGAIN_SECONDS, show_spinner=False)
def _models(home_folder: str) -> list[ModelEntry]:
    return library.list_models()


@st.cache_data(ttl=LOOK_AGAIN_SECONDS, show_spinner=False)
def _texts(home_folder: str) -> list[TextEntry]:
    return list_texts()


@st.cache_data(ttl=LOOK_AGAIN_SECONDS, show_spinner=False)
def _anatomy_path(model: str, home_folder: str) -> Path:
    return library.anatomy_path(model)


def preset_recipe(preset: str, model: str) -> Recipe:
    """A preset made out to a model. Raises InputError for an id that no preset has."""
    known = presets()
    if preset not in known:
        raise InputError(f"There is no preset '{preset}'.", "", f"Choose one of {', '.join(known)}.")
    return for_model(known[preset], model)


def open_model(model: str) -> None:
    """Turn to another model: the same preset, an empty selection, no run, a new undo history."""
    now = session()
    st.session_state[_KEY] = Session(model, now.preset, History(preset_recipe(now.preset, model)), edits=now.edits + 1)
    select(MAP, ())


def choose_preset(preset: str) -> None:
    """Start from another preset. It can be undone like any edit."""
    now = session()
    now.preset = preset
    edit(replace_method_options(now.base, now.recipe))


def replace_method_options(preset: Recipe, before: Recipe) -> Recipe:
    """A preset keeps what the person chose to measure and on which text."""
    return preset.model_copy(update={"measure": before.measure, "calibration": before.calibration})


def edit(recipe: Recipe) -> None:
    """Put an edited recipe on screen."""
    _turn(session().history.edited(recipe))


def undo() -> None:
    """Take the last edit back."""
    _turn(session().history.undone())


def redo() -> None:
    """Do again what was taken back."""
    _turn(session().history.redone())


def reset() -> None:
    """Back to the preset; an edit like any other."""
    edit(session().base)


def _turn(history: History) -> None:
    now = session()
    if history.now != now.recipe:
        now.edits += 1
    now.history = history


def follow(run: str | None) -> None:
    """Show this run on the screens that show one."""
    session().run = run


def followed_run() -> Run | None:
    """The run that the tab follows, None when it has gone or there is none."""
    wanted = session().run
    if wanted is None:
        return None
    try:
        return Store().get(wanted)
    except InputError:
        return None


def open_run(run: Run) -> None:
    """Turn to a run's model and recipe and follow it, whatever the tab showed before."""
    recipe, now = run.recipe(), session()
    if recipe is not None:
        st.session_state[_KEY] = Session(recipe.model, now.preset, History(recipe), run.id, now.edits + 1)
        select(MAP, ())
    else:
        follow(run.id)


def anatomy_of(model: str) -> Anatomy | None:
    """The anatomy record of a model, None until a worker has inspected it. Raises BitpressError for an unknown model."""
    path = _anatomy_path(model, str(home()))
    try:
        return _anatomy(str(path), path.stat().st_mtime_ns)
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=16)
def _anatomy(path: str, changed: int) -> Anatomy:
    return Anatomy.load(Path(path))


# --- the link -----------------------------------------------------------------------------------------------------


def write_link() -> None:
    """Keep the address bar a link that restores this tab: short names, an edited recipe by its digest."""
    now = session()
    wanted = {"model": now.model, "preset": now.preset}
    if now.recipe != now.base:
        wanted["recipe"] = keep_recipe(now.recipe)
    if now.run:
        wanted["run"] = now.run
    for name in {"model", "preset", "recipe", "run"} - wanted.keys():
        st.query_params.pop(name, None)
    for name, value in wanted.items():
        if st.query_params.get(name) != value:
            st.query_params[name] = value


def keep_recipe(recipe: Recipe) -> str:
    """Store a recipe under its digest, so that a link can name it. Gives the digest."""
    path = home() / "recipes" / f"{recipe.digest()}.yaml"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".partial")
        part.write_text(recipe.to_yaml(), encoding="utf8")
        part.replace(path)
    return recipe.digest()


def kept_recipe(digest: str) -> Recipe:
    """The recipe that a link names. Raises InputError when it is not kept here."""
    if not re.fullmatch(r"[0-9a-f]{16}", digest):
        raise InputError("The link names no recipe.", f"'{digest}' is not a digest.", "Ask for the recipe file and upload it.")
    return Recipe.from_yaml(home() / "recipes" / f"{digest}.yaml")


def _from_link() -> Session:
    """What the link asks for; what of it cannot be had is told in `notice` and replaced by the first visit's state."""
    asked = st.query_params
    found = Session(FIRST_MODEL, FIRST_PRESET, History(preset_recipe(FIRST_PRESET, FIRST_MODEL)))
    try:
        model = library.find(asked.get("model", FIRST_MODEL)).id
        found = replace(found, model=model, history=History(preset_recipe(FIRST_PRESET, model)))
        if "preset" in asked:
            found = replace(found, preset=asked["preset"], history=History(preset_recipe(asked["preset"], model)))
        if "run" in asked:
            run = Store().get(asked["run"])
            recipe = run.recipe()
            found = replace(found, run=run.id, **({"model": recipe.model, "history": History(recipe)} if recipe else {}))
        if "recipe" in asked:
            recipe = kept_recipe(asked["recipe"])
            found = replace(found, model=recipe.model, history=History(recipe))
    except BitpressError as error:
        found.notice = error
    return found
