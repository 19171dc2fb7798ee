"""What the method picker says of a method, from its catalogue entry alone."""

from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from bitpress.app.ui import method_form
from bitpress.app.ui.method_form import explained


def test_needs_cost_and_use_are_told() -> None:
    entry = {"needs": ["gram"], "gradients": True, "cost": "A minute.", "use_when": "Choose it at 4 bits."}
    assert explained(entry) == "Needs calibration text and gradients. A minute. Choose it at 4 bits."


def test_what_an_entry_does_not_say_is_left_out() -> None:
    assert explained({"needs": []}) == "Needs no text."


def test_every_method_that_gives_bits_is_offered_in_place_of_another(app_home: Path, app_root: Path) -> None:
    from bitpress.engine.methods import registry  # imports torch, which the other tests here do without

    registry.write_catalogue()
    app = AppTest.from_file(app_root / "pages" / "explore.py", default_timeout=60).run()
    offered = app.selectbox(key="method-0").options
    assert {registry.get(name).title for name in ("rtn", "gptq", "hqq", "flexround", "uniquanf", "quantgpt", "nf4")} <= set(offered)
    for chosen in ("flexround", "quantgpt", "rtn"):
        app.selectbox(key="method-0").set_value(chosen).run()
        assert not app.exception
        assert [stage.method for stage in app.session_state["bitpress-session"].recipe.stages] == [chosen]


def test_until_the_methods_are_described_a_sentence_stands_in(app_home: Path, app_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitpress.engine.methods import registry

    app = AppTest.from_file(app_root / "pages" / "explore.py", default_timeout=60).run()
    assert said(app) == ["Methods: rtn. They can be chosen here once a job has run."], "nothing is at work that would describe them"
    monkeypatch.setattr(method_form, "_being_described", lambda: True)
    assert ["being described" in words for words in said(app.run())] == [True]
    registry.write_catalogue()
    app.run()
    assert not said(app)
    assert app.selectbox(key="method-0").value == "rtn"


def said(app: AppTest) -> list[str]:
    """What the sidebar says of the methods as a whole."""
    return [caption.value for caption in app.sidebar.caption if "ethods" in caption.value]
