"""The scatter of a search for ranks: figure and table hold the same numbers, points land from events, the best ranks reach the recipe."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from bitpress.app.ui.rank_search_view import best_so_far, trials_figure, trials_of, trials_table
from bitpress.engine.runs import jobs
from bitpress.engine.runs.store import Run, Store

RATIOS = {"qk-0": 0.5, "o-0": 0.5, "gate-0": 0.8, "up-0": 0.8, "down-0": 0.9}
TRIALS = [{"ratios": RATIOS, "objective": value, "perplexity": 3 * value, "keep": 0.8, "read": read} for value, read in ((3.0, 1.0), (6.0, 0.5), (2.5, 1.0))]


def test_figure_and_table_hold_the_same_numbers() -> None:
    whole, part, best = trials_figure(TRIALS).data
    assert list(whole.x) == [1, 3] and list(part.x) == [2] and whole.marker.symbol != part.marker.symbol
    assert list(best.y) == best_so_far(TRIALS) == [3.0, 3.0, 2.5]
    table = trials_table(TRIALS)
    assert table["objective"] == [3.0, 6.0, 2.5] and table["down-0"] == [0.9] * 3


@pytest.fixture
def started(app_home: Path, app_root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[AppTest, Run]:
    """Explore with a search that was asked for, and its run, which no worker takes."""
    monkeypatch.setattr(jobs, "pump", lambda home=None: None)
    app = AppTest.from_file(app_root / "pages" / "explore.py", default_timeout=60).run()
    app.session_state["search-box"] = True  # unfolded
    app.run()
    app.button(key="search").click().run()
    assert not app.exception
    (status,) = Store().list(kind="ranks")
    return app, Store().get(status.id)


def test_a_search_is_asked_for_followed_and_used(started: tuple[AppTest, Run]) -> None:
    app, run = started
    assert run.request()["args"]["removed"] == 0.2 and run.request()["args"]["evaluations"] == 50
    assert "A point lands here" in " ".join(item.value for item in app.caption)
    with run.writer() as events:
        for trial in TRIALS:
            events.write("trial", trial)
        events.write("trial", {"recipe": "of a sweep"})
    assert trials_of(run) == TRIALS
    best = {"model": run.request()["args"]["model"], "schemes": [{"match": "role:up", "rank": {"rank": 8, "bias": True}}], "stages": [{"method": "bolaco"}]}
    (run.path / "result.json").write_text(json.dumps({"recipe": best, "trials": TRIALS}))
    app.run()
    assert "Best of 3: 2.50 nats a token, number 3" in " ".join(item.value for item in app.caption)
    app.button(key="search-use").click().run()
    assert app.session_state["bitpress-session"].recipe.schemes[0].rank.rank == 8


def test_the_runs_page_shows_the_trials(started: tuple[AppTest, Run], app_root: Path, make_run: Callable[..., Run]) -> None:
    _, run = started
    with run.writer() as events:
        events.write("trial", TRIALS[0])
    app = AppTest.from_file(app_root / "pages" / "runs.py", default_timeout=60)
    app.query_params["run"] = run.id
    app.run()
    assert not app.exception and "Best of 1" in " ".join(item.value for item in app.caption)
