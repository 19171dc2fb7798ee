"""The runs page: rows and figures, filters, every state, what the buttons do; and five hundred runs in time."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from bitpress.app.ui.run_list import Filter, figures_of, progress_of, row_of, rows_of, sentence, table
from bitpress.app.ui.run_names import plan_of
from bitpress.engine.recipe import Recipe
from bitpress.engine.recipe_presets import find_preset, for_model
from bitpress.engine.runs import jobs
from bitpress.engine.runs.status import Status, change_status
from bitpress.engine.runs.store import Run, Store

MakeRun = Callable[..., Run]


def recipe(preset: str = "uniform-4bit") -> Recipe:
    return for_model(find_preset(preset), "tiny-stories")


def open_page(app_root: Path, **link: str) -> AppTest:
    app = AppTest.from_file(str(app_root / "pages" / "runs.py"), default_timeout=60)
    for name, value in link.items():
        app.query_params[name] = value
    app.run()
    assert not app.exception
    return app


def button(app: AppTest, key: str) -> Any:
    return next(found for found in app.button if found.key == key)


def said(app: AppTest) -> str:
    return " ".join(element.value for kind in (app.markdown, app.caption, app.error, app.info, app.warning) for element in kind)


# --- rows ---------------------------------------------------------------------------------------------------------


def test_figures_compare_the_compressed_side_with_dense() -> None:
    found = figures_of(
        {"dense": {"bytes": 300, "perplexity": 5.0, "decode_tokens_per_s": 10.0}, "compressed": {"bytes": 100, "perplexity": 5.5, "decode_tokens_per_s": 25.0}}
    )
    assert found == {"bytes": 100, "perplexity": 5.5, "speed": 25.0, "smaller": 3.0, "faster": 2.5, "change": pytest.approx(0.1)}


def test_figures_that_were_not_measured_are_none() -> None:
    found = figures_of({"dense": {"bytes": 300}, "compressed": {"bytes": 100}})
    assert (found["perplexity"], found["change"], found["speed"], found["faster"]) == (None, None, None, None)
    assert figures_of({}) == {"bytes": None, "perplexity": None, "speed": None}


@pytest.mark.parametrize(
    ("wanted", "takes"),
    [
        (Filter(), True),
        (Filter(kinds=("measure",)), False),
        (Filter(kinds=()), True),
        (Filter(states=("failed",)), False),
        (Filter(text="4 BITS tiny"), True),
        (Filter(text="4 bits smollm"), False),
        (Filter(text="a1b2"), True),
    ],
)
def test_filter(wanted: Filter, takes: bool) -> None:
    status = Status("20260101-120000-a1b2", "compress", model="tiny-stories", state="finished")
    assert wanted.takes(status, "4 bits everywhere") is takes


def test_a_plan_is_named_after_its_preset_or_after_its_first_line() -> None:
    assert plan_of(recipe()) == find_preset("uniform-4bit").title
    edited = Recipe.from_dict(
        {"model": "m", "schemes": [{"match": "*", "weights": {"bits": 5}}, {"match": "role:v", "weights": {"bits": 8}}], "stages": [{"method": "rtn"}]}
    )
    assert plan_of(edited) == "5 bit, 1 more line"
    assert plan_of(Recipe(model="m")) == "Dense blocks"


def test_table_keeps_numbers_as_numbers_and_gaps_as_none(make_run: MakeRun) -> None:
    make_run(recipe())
    make_run(recipe(), state="failed", layers=3)
    shown = table(rows_of(Store().list(), Filter()))
    assert sorted(shown["state"]) == ["✓ finished", "✕ failed"]
    figures = dict(zip(shown["state"], shown["change, %"], strict=True))
    assert figures["✓ finished"] == pytest.approx(100 * (5.9 / 5.4 - 1))
    assert figures["✕ failed"] is None


def test_a_finished_run_in_one_sentence(make_run: MakeRun) -> None:
    status = make_run(recipe()).status()
    assert sentence(row_of(status, "4 bit")) == "2.03\u2009MB, 3.00× smaller · perplexity 5.90 (+9.26\u2009%) · 520 tokens/s, 1.68× dense"


def test_a_waiting_run_is_not_said_to_be_at_work() -> None:
    waiting = Status("20260101-120000-a1b2", "compress", state="queued", created=1.0, started=2.0, host="box")
    assert "at work" not in progress_of(waiting)


# --- the page -----------------------------------------------------------------------------------------------------


def test_first_visit_says_what_to_do(app_root: Path, app_home: Path) -> None:
    assert "press Compress" in said(open_page(app_root))


def test_every_state_is_listed_with_word_and_sign(app_root: Path, make_run: MakeRun) -> None:
    for state in ("finished", "failed", "cancelled", "interrupted", "running"):
        make_run(recipe(), state=state)
    shown = set(open_page(app_root).dataframe[0].value["state"])
    assert shown == {"✓ finished", "✕ failed", "⊘ cancelled", "△ interrupted", "● running"}


def test_each_open_run_has_its_own_cancel_in_plain_sight(app_root: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[str] = []
    monkeypatch.setattr(jobs, "cancel", cancelled.append)
    runs = [make_run(recipe(), state="running"), make_run(recipe(), state="cancelling")]
    app = open_page(app_root)
    assert button(app, f"cancel-{runs[1].id}").disabled
    assert button(app, f"cancel-{runs[1].id}").label == "Cancelling"
    button(app, f"cancel-{runs[0].id}").click().run()
    assert cancelled == [runs[0].id]


def test_failed_run_tells_what_why_and_remedy_and_can_be_resumed(app_root: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    resumed: list[str] = []
    monkeypatch.setattr(jobs, "resume", resumed.append)
    run = make_run(recipe(), state="failed", layers=5)
    (run.path / "log.txt").write_text("line of the log\n")
    app = open_page(app_root, run=run.id)
    for part in ("The disk is full", "Writing layer 12 failed", "Free 40 MB and resume"):
        assert part in said(app)
    assert any("line of the log" in code.value for code in app.code)
    button(app, "resume").click().run()
    assert resumed == [run.id]


def test_finished_run_offers_no_resume_and_its_files(app_root: Path, make_run: MakeRun) -> None:
    app = open_page(app_root, run=make_run(recipe()).id)
    keys = {found.key for found in app.button}
    assert "resume" not in keys
    assert {"open", "again"} <= keys
    assert {found.label for found in app.get("download_button")} == {"Recipe", "Metrics"}
    assert "perplexity 5.90" in said(app)


def test_run_again_submits_the_same_request_and_shows_the_new_run(app_root: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(recipe())
    asked: list[tuple] = []
    monkeypatch.setattr(jobs, "submit", lambda kind, args, plan, title: asked.append((kind, args, plan)) or run)
    button(open_page(app_root, run=run.id), "again").click().run()
    assert asked == [("compress", {"model": "tiny-stories"}, recipe())]


def test_link_to_a_run_that_is_gone_is_told_without_a_traceback(app_root: Path, make_run: MakeRun) -> None:
    make_run(recipe())
    assert "There is no run '20200101-000000-0000'" in said(open_page(app_root, run="20200101-000000-0000")).replace("\\", "")


def test_damaged_metrics_leave_the_page_standing(app_root: Path, make_run: MakeRun) -> None:
    run = make_run(recipe())
    (run.path / "metrics.json").write_text("{")
    app = open_page(app_root, run=run.id)
    assert list(app.dataframe[0].value["perplexity"].isna()) == [True]


def test_filter_of_the_link_is_taken(app_root: Path, make_run: MakeRun) -> None:
    make_run(recipe())
    make_run(recipe(), state="failed")
    assert list(open_page(app_root, states="failed").dataframe[0].value["state"]) == ["✕ failed"]


def test_five_hundred_runs_open_in_time(app_root: Path, app_home: Path, make_run: MakeRun) -> None:
    """Counted in this process's own seconds, so that a busy machine does not decide. Every run has a recipe of its own."""
    first = make_run(recipe())
    metrics, plan, record = first.metrics(), first.recipe(), json.loads((first.path / "status.json").read_text())
    assert plan is not None
    open_page(app_root)  # imports and the index
    for number in range(500):
        folder = app_home / "runs" / f"20250101-{number // 60:02d}{number % 60:02d}00-{number:04x}"
        folder.mkdir()
        (folder / "recipe.yaml").write_text(plan.model_copy(update={"seed": number}).to_yaml())
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / "status.json").write_text(json.dumps(record | {"id": folder.name, "created": float(number)}))
    began = time.process_time()
    app = open_page(app_root)
    seconds = time.process_time() - began
    assert len(app.dataframe[0].value) == 501
    assert seconds < 1.5


def test_a_changed_record_is_seen_at_the_next_look(app_root: Path, make_run: MakeRun) -> None:
    run = make_run(recipe(), state="interrupted")
    app = open_page(app_root)
    change_status(run.path, lambda _: {"state": "cancelled"})
    assert list(app.run().dataframe[0].value["state"]) == ["⊘ cancelled"]
