"""The tab's state: undo and redo, links that restore it, links that cannot."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some
from streamlit.testing.v1 import AppTest

from bitpress.app import state
from bitpress.app.state import History
from bitpress.app.ui.recipe_menu import read_upload
from bitpress.engine.errors import InputError
from bitpress.engine.recipe import MAX_YAML_BYTES, Recipe
from bitpress.engine.runs.store import Run

ONE, TWO, THREE = (Recipe(model="m", seed=seed) for seed in (1, 2, 3))


def test_undo_and_redo_walk_the_history() -> None:
    history = History(ONE).edited(TWO).edited(THREE)
    assert history.undone().now == TWO
    assert history.undone().undone().undone().now == ONE
    assert history.undone().redone() == history
    assert history.undone().edited(ONE).future == ()


def test_an_edit_that_changes_nothing_leaves_no_trace() -> None:
    assert History(ONE).edited(ONE).past == ()


@given(some.lists(some.sampled_from(["edit", "undo", "redo"]), max_size=40))
def test_history_is_kept_short_and_whole(actions: list[str]) -> None:
    history, seed = History(ONE), 10
    for action in actions:
        seed += 1
        history = {"edit": lambda h=history, s=seed: h.edited(Recipe(model="m", seed=s)), "undo": history.undone, "redo": history.redone}[action]()
        assert len(history.past) + len(history.future) <= state.KEPT_EDITS


def page(app_root: Path, **link: str) -> AppTest:
    app = AppTest.from_file(app_root / "pages" / "explore.py", default_timeout=60)
    for name, value in link.items():
        app.query_params[name] = value
    return app.run()


def test_the_first_visit_opens_the_tiny_model(app_home: Path, app_root: Path) -> None:
    app = page(app_root)
    assert not app.exception
    found = app.session_state["bitpress-session"]
    assert (found.model, found.preset) == ("tiny-stories", "uniform-4bit")
    assert app.query_params["model"] == "tiny-stories"


def test_a_link_restores_an_edited_recipe(app_home: Path, app_root: Path, preset_recipe: Callable[[str], Recipe]) -> None:
    edited = preset_recipe("uniform-4bit").model_copy(update={"seed": 9})
    digest = state.keep_recipe(edited)
    found = page(app_root, recipe=digest).session_state["bitpress-session"]
    assert found.recipe == edited


def test_a_link_restores_a_run(app_home: Path, app_root: Path, make_run: Callable[..., Run], preset_recipe: Callable[[str], Recipe]) -> None:
    run = make_run(preset_recipe("uniform-3bit"))
    found = page(app_root, run=run.id).session_state["bitpress-session"]
    assert found.run == run.id
    assert found.recipe == preset_recipe("uniform-3bit")


@pytest.mark.parametrize(
    "link", [{"model": "no-such-model"}, {"preset": "no-such-preset"}, {"recipe": "../../etc/passwd"}, {"recipe": "0" * 16}, {"run": "20200101-000000-0000"}]
)
def test_a_link_that_cannot_be_followed_says_so_and_opens_the_first_visit(app_home: Path, app_root: Path, link: dict[str, str]) -> None:
    app = page(app_root, **link)
    assert not app.exception
    assert len(app.error) == 1
    assert app.session_state["bitpress-session"].model == "tiny-stories"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"a" * (MAX_YAML_BYTES + 1), "too large"),
        (b"\xff\xfe", "no text"),
        (b"- 1", "not a mapping"),
        (b"model: m\nbits: 4", "cannot be used"),
        (b"model: [", "not valid YAML"),
    ],
)
def test_uploads_are_refused_in_words(data: bytes, told: str) -> None:
    with pytest.raises(InputError, match=told):
        read_upload(data)


def test_an_upload_is_a_recipe(preset_recipe: Callable[[str], Recipe]) -> None:
    recipe = preset_recipe("sparse-50")
    assert read_upload(recipe.to_yaml().encode()) == recipe
