"""The main page's wiring: edits reach the recipe, the cards say how they know, a run is found again, trouble is told in words."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from bitpress.app import state
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs import jobs
from bitpress.engine.runs.store import Run, Store

TINY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def open_page(app_home: Path, app_root: Path) -> Callable[..., AppTest]:
    def open_it(**link: str) -> AppTest:
        app = AppTest.from_file(app_root / "pages" / "explore.py", default_timeout=60)
        for name, value in link.items():
            app.query_params[name] = value
        return app.run()

    return open_it


@pytest.fixture
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are put in the queue and stay there."""
    monkeypatch.setattr(jobs, "pump", lambda home=None: None)


def recipe_of(app: AppTest) -> Recipe:
    return app.session_state["bitpress-session"].recipe


def select(app: AppTest, *names: str) -> AppTest:
    app.session_state[f"{state.MAP}-selection"] = (1, names)
    return app.run()


def words(app: AppTest) -> str:
    shown = [*app.markdown, *app.caption, *app.error, *app.warning, *app.info, *app.metric]
    return "\n".join(str(item.value) for item in shown)


def test_the_first_page_says_what_to_press_and_how_each_figure_is_known(open_page: Callable[..., AppTest]) -> None:
    app = open_page()
    assert not app.exception
    assert not app.error
    assert "Press Compress" in words(app)
    assert "recorded" in words(app)
    assert app.button(key="compress").disabled is False
    app.button_group(key="bits").set_value(3).run()
    shown = words(app)
    assert "Press Compress" in shown
    assert "recorded" not in shown
    assert "predicted, exact" in shown
    assert "ideal" in shown


def test_bits_of_everything_and_of_a_selection(open_page: Callable[..., AppTest], anatomy: Anatomy) -> None:
    app = open_page()
    before = app.metric[0].value
    app.button_group(key="bits").set_value(3).run()
    assert {scheme.weights.bits for scheme in recipe_of(app).resolve(anatomy).values()} == {3}
    assert app.metric[0].value != before
    select(app, TINY)
    app.button_group(key="bits").set_value(8).run()
    assert recipe_of(app).resolve(anatomy)[TINY].weights.bits == 8
    assert len(recipe_of(app).schemes) == 2


def test_undo_redo_and_reset_move_the_widgets_too(open_page: Callable[..., AppTest]) -> None:
    app = open_page()
    first = recipe_of(app)
    app.button_group(key="bits").set_value(2).run()
    edited = recipe_of(app)
    app.button(key="undo").click().run()
    assert recipe_of(app) == first
    assert app.button_group(key="bits").value == 4
    app.button(key="redo").click().run()
    assert recipe_of(app) == edited
    app.button(key="reset").click().run()
    assert recipe_of(app) == first


def test_a_group_is_chosen_by_name(open_page: Callable[..., AppTest], anatomy: Anatomy) -> None:
    app = open_page()
    app.button_group(key="scope").set_value("MLP").run()
    assert len(app.session_state[f"{state.MAP}-selection"][1]) == 18
    app.slider(key="zeros").set_value(30).run()
    schemes = recipe_of(app).resolve(anatomy)
    assert schemes["model.layers.1.mlp.up_proj"].sparsity.ratio == 0.3
    assert schemes[TINY].sparsity is None
    assert any("No kernel makes this pattern faster here" in caption.value for caption in app.caption)  # codes with zeros anywhere stay codes
    app.button_group(key="zeros-pattern").set_value("2:4").run()
    assert recipe_of(app).resolve(anatomy)["model.layers.1.mlp.up_proj"].sparsity.pattern == "2:4"


def test_ends_embedding_and_blocks(open_page: Callable[..., AppTest], anatomy: Anatomy) -> None:
    app = open_page()
    app.slider(key="protect-first").set_value(2).run()
    assert recipe_of(app).resolve(anatomy)[TINY].weights.bits == 8
    app.button_group(key="embedding-bits").set_value(16).run()
    assert recipe_of(app).embedding is None
    select(app, *(part.name for part in anatomy.of_block(3)))
    app.button(key="drop").click().run()
    assert recipe_of(app).dropped_blocks(anatomy) == [3]
    app.button(key="drop").click().run()
    assert recipe_of(app).dropped_blocks(anatomy) == []


def test_the_rank_of_a_selection(open_page: Callable[..., AppTest], anatomy: Anatomy) -> None:
    app = select(open_page(), TINY)
    app.slider(key="rank").set_value(40).run()
    assert recipe_of(app).resolve(anatomy)[TINY].rank.keep == 0.4
    assert [stage.method for stage in recipe_of(app).stages] == ["svd-llm", "rtn"]
    assert "break-even at rank" in words(app)
    app.slider(key="rank").set_value(100).run()
    assert recipe_of(app).resolve(anatomy)[TINY].rank is None
    assert not app.exception


def test_the_cache_and_its_bytes(open_page: Callable[..., AppTest]) -> None:
    app = open_page()
    app.session_state["cache"] = True  # the controls are unfolded
    app.run()
    app.button_group(key="cache-bits").set_value(4).run()
    app.slider(key="cache-rank").set_value(50).run()
    cache = recipe_of(app).kv_cache
    assert (cache.keys.bits, cache.rank.keep) == (4, 0.5)
    assert "times smaller at" in words(app)
    app.slider(key="cache-rank").set_value(100).run()
    app.button_group(key="cache-bits").set_value(16).run()
    assert recipe_of(app).kv_cache is None
    assert not app.exception


def test_presets_can_be_chosen_and_taken_back(open_page: Callable[..., AppTest], preset_recipe: Callable[[str], Recipe]) -> None:
    app = open_page()
    app.selectbox(key="preset").set_value("half-the-layers").run()
    assert recipe_of(app) == preset_recipe("half-the-layers")
    assert not app.exception
    app.button(key="undo").click().run()
    assert recipe_of(app) == preset_recipe("uniform-4bit")


def test_compress_queues_the_recipe_and_follows_the_run(open_page: Callable[..., AppTest], no_worker: None) -> None:
    app = open_page()
    app.button(key="compress").click().run()
    run = Store().list(kind="compress")[0]
    assert run.state == "queued"
    assert Store().get(run.id).recipe() == recipe_of(app)
    assert app.session_state["bitpress-session"].run == run.id
    assert app.query_params["run"] == run.id
    app.button(key="cancel").click().run()
    assert Store().get(run.id).status().state == "cancelled"


def test_the_stored_run_answers_instead_of_a_second_one(
    open_page: Callable[..., AppTest], make_run: Callable[..., Run], preset_recipe: Callable, no_worker: None
) -> None:
    run = make_run(preset_recipe("uniform-4bit"))
    app = open_page()
    assert "measured" in words(app)
    app.button(key="compress").click().run()
    assert [status.id for status in Store().list(kind="compress")] == [run.id]
    app.button(key="again").click().run()
    assert len(Store().list(kind="compress")) == 2


def test_figures_of_another_recipe_say_so(open_page: Callable[..., AppTest], make_run: Callable[..., Run], preset_recipe: Callable) -> None:
    run = make_run(preset_recipe("uniform-4bit"))
    app = open_page(run=run.id)
    assert ":material/verified: measured" in words(app)
    app.button_group(key="bits").set_value(3).run()
    shown = words(app)
    assert "previous recipe" in shown
    assert ":material/verified: measured" not in shown
    assert "ideal" in shown


def test_a_refresh_or_another_tab_finds_the_run_at_work(open_page: Callable[..., AppTest], make_run: Callable[..., Run], preset_recipe: Callable) -> None:
    run = make_run(preset_recipe("uniform-4bit"), state="running", layers=20)
    app = open_page()
    assert app.session_state["bitpress-session"].run == run.id
    assert app.button(key="cancel").disabled is False
    shown = words(app)
    assert "measuring" in shown
    assert "Windows are scored once every layer is done." in shown


@pytest.mark.parametrize(
    ("stopped", "told"),
    [
        ("failed", "The disk is full."),
        ("interrupted", "The worker stopped before the end."),
        ("cancelled", "Finished layers are kept"),
        ("cancelling", "cancelling"),
    ],
)
def test_every_ending_is_told(
    open_page: Callable[..., AppTest], make_run: Callable[..., Run], preset_recipe: Callable, stopped: str, told: str, no_worker: None
) -> None:
    run = make_run(preset_recipe("uniform-4bit"), state=stopped, layers=12)
    app = open_page(run=run.id)
    assert not app.exception
    assert told in words(app)
    if stopped != "cancelling":
        app.button(key=f"resume-{run.id}").click().run()
        assert run.status().state == "queued"


def test_samples_are_read_side_by_side(open_page: Callable[..., AppTest], make_run: Callable[..., Run], preset_recipe: Callable) -> None:
    run = make_run(preset_recipe("uniform-4bit"))
    app = open_page(run=run.id)
    assert "Side by side" in words(app)
    assert app.button_group(key=f"prompt-{run.id}").options


def test_an_inspection_is_asked_for_once_and_its_failure_is_told(app_home: Path, open_page: Callable[..., AppTest], no_worker: None) -> None:
    (app_home / "models" / "tiny-stories" / "anatomy.json").unlink()
    app = open_page()
    app.run()
    found = Store().list(kind="inspect")
    assert len(found) == 1
    assert "Reading the weights" in words(app)
    run = Store().get(found[0].id)
    values = json.loads((run.path / "status.json").read_text())
    error = {"what": "The model cannot be read.", "why": "It is damaged.", "remedy": "Fetch it again."}
    (run.path / "status.json").write_text(json.dumps({**values, "state": "failed", "error": error}))
    app.run()
    assert "The model cannot be read." in words(app)
    assert not app.exception


def test_a_model_that_is_not_here_offers_to_fetch_it(open_page: Callable[..., AppTest], no_worker: None) -> None:
    app = open_page(model="smollm2-135m")
    assert "is not on this machine yet" in words(app)
    app.button(key="fetch-smollm2-135m").click().run()
    assert Store().list(kind="install")[0].model == "smollm2-135m"
    assert not app.exception


def test_the_layer_that_is_selected_is_shown_from_near(open_page: Callable[..., AppTest]) -> None:
    app = select(open_page(), TINY)
    assert not app.exception
    assert TINY in words(app)


@pytest.mark.parametrize("overlay", ["sparsity", "rank", "sensitivity", "error", "bytes"])
def test_the_selection_survives_recolouring(open_page: Callable[..., AppTest], overlay: str) -> None:
    app = select(open_page(), TINY)
    app.button_group(key="overlay").set_value(overlay).run()
    assert not app.exception
    assert app.session_state[f"{state.MAP}-selection"][1] == (TINY,)
