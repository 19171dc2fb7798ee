"""The autotune page: slider ranges, reasons and locks as pure functions; every state of the page; verify, use, restore from the link."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from bitpress.app import state
from bitpress.app.ui import autotune_view as view
from bitpress.app.ui.locks import written
from bitpress.engine.allocate import allocate, reasons
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.predict import predicted_kl
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs import jobs
from bitpress.engine.runs.status import change_status
from bitpress.engine.runs.store import Run, Store
from bitpress.engine.sensitivity_file import FISHER, OPTIONS, Score, SensitivityReport

HARM = {"8-bit": 1e-5, "4-bit": 4e-3, "3-bit": 2e-2, "2-bit": 0.12, "50%": 0.06, "2:4": 0.1}
FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def report(app_home: Path, anatomy: Anatomy) -> SensitivityReport:
    """A kept measurement: later blocks suffer more."""
    harms = {(part.name, option): harm * 1.3 ** (part.block or 0) / 10 for part in anatomy.linears for option, harm in HARM.items()}
    scores = [Score(layer=name, option=option, kind=FISHER, score=harm) for (name, option), harm in harms.items()]
    scores += [Score(layer=anatomy.embedding.name, option=option, kind=FISHER, score=harm) for option, harm in (("8-bit", 1e-4), ("4-bit", 0.1))]
    made = SensitivityReport(
        digest="d" * 16, model=anatomy.model, fingerprint=anatomy.fingerprint, kinds=(FISHER,), text="stories", tokens_sha256="0", protocol="made up",
        options=OPTIONS, seconds_of={FISHER: 3.0}, scores=scores,
    )  # fmt: skip
    made.save()
    return made


@pytest.fixture
def open_page(app_root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(jobs, "pump", lambda home=None: None)

    def build(**link: str) -> AppTest:
        app = AppTest.from_file(str(app_root / "pages" / "autotune.py"), default_timeout=60)
        for name, value in link.items():
            app.query_params[name] = value
        app.run()
        assert not app.exception
        return app

    return build


def said(app: AppTest) -> str:
    return " ".join(element.value for kind in (app.markdown, app.caption, app.error, app.info, app.warning) for element in kind)


def metric(app: AppTest, label: str) -> Any:
    return next(found for found in app.metric if found.label == label)


def test_before_scores_the_page_says_what_to_press(app_home: Path, open_page: Any) -> None:
    app = open_page()
    assert "Nothing is known" in said(app)
    app.button(key="measure").click().run()
    assert [status.model for status in Store().list(kind="sensitivity")] == ["tiny-stories"]
    assert app.button(key="cancel-measure")


def test_the_slider_moves_the_recipe(report: SensitivityReport, open_page: Any, anatomy: Anatomy) -> None:
    app = open_page()
    assert app.slider(key="limit-linear_bits").value == 3.5
    before = metric(app, "How good").value
    app.slider(key="limit-linear_bits").set_value(5.0).run()
    assert not app.exception
    assert metric(app, "How good").value != before
    app.selectbox(key="budget").set_value("perplexity_ratio").run()
    assert app.slider(key="limit-perplexity_ratio")
    app.selectbox(key="second").set_value("bytes").run()
    assert not app.exception
    assert "cannot both be met" in said(app) or metric(app, "How small").value


def test_verify_puts_this_recipe_in_the_queue_and_use_takes_it_to_explore(report: SensitivityReport, open_page: Any, anatomy: Anatomy) -> None:
    app = open_page()
    app.button(key="verify").click().run()
    assert not app.exception
    (status,) = Store().list(kind="compress")
    recipe = Store().get(status.id).recipe()
    assert recipe is not None
    assert recipe.validate_for(anatomy) == []
    assert {line.weights.bits for line in recipe.schemes} <= {2, 3, 4, 8}  # type: ignore[union-attr]
    assert app.button(key="verify").disabled
    use = next(found for found in app.button if found.key == "use")
    assert not use.disabled


def test_locks_hold_are_shown_and_come_back_with_the_link(report: SensitivityReport, open_page: Any, anatomy: Anatomy) -> None:
    app = open_page(locks="role:q & blocks:0=dense; nonsense; blocks:99=8-bit")
    assert app.session_state["autotune-locks"][1] == {FIRST: "dense"}
    assert "1 of 42 matrices locked" in said(app)
    app.session_state["autotune-map-selection"] = (1, (FIRST, "model.layers.5.mlp.down_proj"))
    app.run()
    app.selectbox(key="lock-option").set_value("8-bit").run()
    app.button(key="lock").click().run()
    assert app.session_state["autotune-locks"][1] == {FIRST: "8-bit", "model.layers.5.mlp.down_proj": "8-bit"}
    assert "It is locked to 8-bit" in said(app)
    app.button(key="unlock").click().run()
    assert app.session_state["autotune-locks"][1] == {}
    assert "would save" in said(app), "why this layer: what the next option up would bring"


def test_locks_that_leave_nothing_name_the_nearest(report: SensitivityReport, open_page: Any) -> None:
    app = open_page(locks="*=8-bit")
    assert app.slider(key="limit-linear_bits").min > 8, "a slider ends where the locks do"
    assert metric(app, "How small").value
    app = open_page(locks="*=9-bit")
    assert "no option" in said(app)
    app.button(key="release-refused").click().run()
    assert metric(app, "How small").value


def test_measured_runs_stand_beside_their_predictions(report: SensitivityReport, open_page: Any, make_run: Any, preset_recipe: Any, anatomy: Anatomy) -> None:
    runs: list[Run] = [make_run(preset_recipe(preset)) for preset in ("uniform-8bit", "uniform-4bit", "uniform-3bit", "uniform-2bit")]
    found = view.measured_runs(anatomy, report, FISHER, {run.id: run.id for run in runs})
    assert len(found) == 4
    assert sorted(run.predicted for run in found if run.predicted) == [run.predicted for run in found]
    assert view.rank_correlation(found[:3]) is None
    app = open_page()
    assert "4 runs on tinystories" in said(app)


def test_an_edited_recipe_is_foretold_between_what_was_scored(report: SensitivityReport, anatomy: Anatomy) -> None:
    def told(**line: Any) -> float | None:
        return predicted_kl(Recipe.from_dict({"model": "tiny-stories", "schemes": [{"match": "*", **line}]}), anatomy, report)

    four, five, eight = (told(weights={"bits": bits}) for bits in (4, 5, 8))
    assert four is not None and five is not None and eight is not None
    assert eight < five < four
    assert four == pytest.approx(sum(score.score for score in report.scores if score.option == "4-bit" and score.layer != anatomy.embedding.name))
    half, third = told(sparsity={"ratio": 0.5}), told(sparsity={"ratio": 0.25})
    assert half is not None and third is not None
    assert 0 < third < half
    assert told(rank={"keep": 0.5}) is None
    assert predicted_kl(Recipe(model="tiny-stories"), anatomy, report) == 0


def test_ranges_reasons_and_locks_in_words(report: SensitivityReport, anatomy: Anatomy) -> None:
    choices, curve = view.table_of(report, anatomy, FISHER, (), {}, 8)
    assert view.table_of(report, anatomy, FISHER, (), {}, 8)[1] is curve
    for kind, slide in view.slides(curve).items():
        assert slide.low <= slide.start <= slide.high
        for place in (slide.low, slide.start, slide.high):
            allocate(choices, {kind: slide.budget(place, kind)})
    found = allocate(choices, {"linear_bits": 3.5})
    sentence = view.why(reasons(choices, found, FIRST), FIRST, found, (FIRST,), False)
    assert found.options[FIRST] in sentence
    assert "nat a MB" in sentence
    assert written({part.name: "8-bit" for part in anatomy.linears if part.role == "v"}, anatomy) == "role:v=8-bit"
    assert anatomy.model == state.FIRST_MODEL


# Trying many -------------------------------------------------------------------------------------------------------


def sweep_in(state_: str, records: list[dict[str, Any]], total: int = 3) -> Run:
    """A sweep on record in a state, with these points."""
    run = Store().create("sweep", {"model": "tiny-stories", "plan": {}}, title="Search around tiny-stories")
    (run.path / "points.json").write_text(json.dumps({"v": 1, "tag": "", "points": records}))
    change_status(run.path, lambda _: {"state": state_, "phase": "trying recipes", "done": 1, "total": total, "eta_s": 65.0, "host": "elsewhere"})
    return run


def point(number: int, run: str, size: float, kl: float, **more: Any) -> dict[str, Any]:
    figures = {"bytes": size, "kl_mean": kl, "perplexity": 6.0, "bits_per_weight_linears": 3.5}
    return {"number": number, "name": f"plan {number}", "given": {}, "digest": None, "run": run, "state": "finished", "predicted": kl * 1.2, "wrong": "",
            "figures": figures, "seconds": 4.0, **more}  # fmt: skip


def test_a_search_is_started_from_the_form(report: SensitivityReport, open_page: Any) -> None:
    app = open_page()
    app.number_input(key="sweep-trials").set_value(6).run()
    app.slider(key="sweep-range").set_value((3.0, 5.0)).run()
    app.button(key="sweep-start").click().run()
    assert not app.exception
    (status,) = Store().list(kind="sweep")
    plan = Store().get(status.id).request()["args"]["plan"]
    assert plan["search"] == {"trials": 6, "low": 3.0, "high": 5.0, "methods": ["rtn"]}
    assert plan["base"]["model"] == "tiny-stories"
    assert app.button(key="sweep-pause")


def test_a_grid_needs_no_scores_and_says_how_many_it_makes(app_home: Path, open_page: Any) -> None:
    app = open_page()
    app.segmented_control(key="sweep-way").set_value("grid").run()
    assert app.button(key="sweep-start").disabled
    app.multiselect(key="sweep-bits").set_value([3, 4]).run()
    app.multiselect(key="sweep-sparsity").set_value([0, "2:4"]).run()
    assert "4 recipes" in said(app)
    app.button(key="sweep-start").click().run()
    assert not app.exception
    (status,) = Store().list(kind="sweep")
    assert Store().get(status.id).request()["args"]["plan"]["grid"] == {"bits": [3, 4], "sparsity": [0, "2:4"]}


def test_a_sweep_at_work_can_be_paused_and_a_paused_one_resumed(report: SensitivityReport, open_page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(jobs, "cancel", asked.append)
    monkeypatch.setattr(jobs, "resume", asked.append)
    run = sweep_in("running", [point(0, "a", 2e6, 0.2)])
    app = open_page()
    app.button(key="sweep-pause").click().run()
    assert asked == [run.id]
    change_status(run.path, lambda _: {"state": "cancelled"})
    app = open_page()
    assert "paused" in said(app)
    assert "1 of 3 recipes" in said(app)
    app.button(key="sweep-resume").click().run()
    assert asked == [run.id, run.id]


def test_the_table_of_a_sweep_marks_its_front_and_says_what_failed(report: SensitivityReport, open_page: Any) -> None:
    records = [point(0, "a", 2e6, 0.2), point(1, "b", 3e6, 0.3), point(2, "c", 4e6, 0.1)]
    records.append(point(3, "d", 0, 0, state="failed", figures={}, wrong="The disk is full."))
    sweep_in("finished", records, 4)
    app = open_page()
    table = next(frame.value for frame in app.dataframe if "recipe" in frame.value)
    assert list(table["front"]) == ["◆", "", "◆", ""]
    assert list(table["why not"])[3] == "The disk is full."
    assert app.button(key="sweep-compare")


def test_operations_and_cache_are_budgets_where_they_are_scored(report: SensitivityReport, open_page: Any, anatomy: Anatomy) -> None:
    drops = [Score(layer=f"{anatomy.block_prefix}.{block}", option="drop", kind=FISHER, score=0.5 - block / 20) for block in range(anatomy.blocks)]
    places = itertools.product(range(anatomy.blocks), (8, 4, 3, 2))
    cached = [Score(layer=f"kv_cache.{block}", option=f"{bits}-bit", kind=FISHER, score=0.1 / 4**bits) for block, bits in places]
    report.model_copy(update={"scores": [*report.scores, *drops, *cached], "seconds_of": {FISHER: 4.0}}).save()
    app = open_page()
    app.selectbox(key="budget").set_value("flops").run()
    app.selectbox(key="second").set_value("kv_bytes").run()
    assert not app.exception
    assert "left out; KV cache at" in said(app)
    app.button(key="verify").click().run()
    (status,) = Store().list(kind="compress")
    recipe = Store().get(status.id).recipe()
    assert recipe is not None
    assert recipe.structure.drop_blocks
    assert recipe.kv_cache is not None
