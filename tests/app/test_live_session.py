"""A live session on the explore page: foretold first, measured window by window after, one order a recipe, and its end redraws the page."""

from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from bitpress.app.ui import live_session
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.runs import jobs
from bitpress.engine.runs.store import Store
from bitpress.engine.sensitivity_file import FISHER, OPTIONS, Score, SensitivityReport


@pytest.fixture
def report(app_home: Path, anatomy: Anatomy) -> SensitivityReport:
    harms = {option.id: 0.001 * 4.0**place for place, option in enumerate(OPTIONS)}
    scores = [Score(layer=part.name, option=option, kind=FISHER, score=harm) for part in anatomy.linears for option, harm in harms.items()]
    scores += [Score(layer=anatomy.embedding.name, option=f"{bits}-bit", kind=FISHER, score=0.01) for bits in (8, 4)]
    made = SensitivityReport(
        digest="e" * 16, model=anatomy.model, fingerprint=anatomy.fingerprint, kinds=(FISHER,), text="stories", tokens_sha256="0", protocol="made up",
        options=OPTIONS, scores=scores,
    )  # fmt: skip
    made.save()
    return made


@pytest.fixture
def open_page(app_root: Path, app_home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(jobs, "pump", lambda home=None: None)

    def build() -> AppTest:
        app = AppTest.from_file(str(app_root / "pages" / "explore.py"), default_timeout=60).run()
        assert not app.exception
        return app

    return build


def card(app: AppTest) -> Any:
    return next(found for found in app.metric if found.label == "How good")


def test_an_unmeasured_recipe_is_foretold(report: SensitivityReport, open_page: Any) -> None:
    app = open_page()
    app.segmented_control(key="bits").set_value(3).run()
    before = card(app).value
    app.segmented_control(key="bits").set_value(2).run()
    assert card(app).value != before
    assert any("foretold" in caption.value for caption in app.caption)


def test_every_recipe_is_asked_for_once_and_its_windows_take_the_place_of_the_prediction(report: SensitivityReport, open_page: Any) -> None:
    app = open_page()
    app.segmented_control(key="bits").set_value(3).run()
    app.toggle(key="live").set_value(True).run()
    app.run()
    assert not app.exception
    (desk,) = Store().list(kind="desk")
    run = Store().get(desk.id)
    asked: live_session.Asked = app.session_state[live_session._KEY]
    app.run()
    assert (run.path / "orders.jsonl").read_text().count('"scheme"') == 1, "the same recipe is not asked for again"
    with run.writer() as events:
        for index in range(3):
            window = {"order": asked.order, "index": index, "nll_dense": 1.0, "nll": 1.5, "ratio": 1.6, "low": 1.5, "high": 1.8}
            events.write("window", window)
    app.run()
    assert card(app).value == "4.48"
    assert "+64.9" in card(app).delta
    with run.writer() as events:
        events.write("order_done", {"order": asked.order, "layers": 42, "seconds": 0.8, "notes": ["A stands in for B."], "metrics": {}})
    app.run()
    assert any("42 layers made anew, answered in 800" in caption.value for caption in app.caption)
    app.segmented_control(key="bits").set_value(2).run()
    assert (run.path / "orders.jsonl").read_text().count('"scheme"') == 2
    assert card(app).value != "4.48", "no figure outlives its recipe"


def test_a_refusal_is_told_beside_the_switch(report: SensitivityReport, open_page: Any) -> None:
    app = open_page()
    app.toggle(key="live").set_value(True).run()
    (desk,) = Store().list(kind="desk")
    asked: live_session.Asked = app.session_state[live_session._KEY]
    with Store().get(desk.id).writer() as events:
        events.write("order_failed", {"order": asked.order, "what": "This recipe cannot be shown live.", "why": "", "remedy": "Press Compress."})
    app.run()
    assert any("cannot be shown live" in caption.value for caption in app.caption)
