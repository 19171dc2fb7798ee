"""The frame: every page opens from the navigation, the sidebar picks models, additions are refused in words, no torch."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from bitpress.app.ui import model_picker, notices
from bitpress.engine.errors import InputError
from bitpress.engine.runs import jobs
from bitpress.engine.runs.status import Status
from bitpress.engine.runs.store import Store


@pytest.fixture
def open_app(app_home: Path, app_root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], AppTest]:
    monkeypatch.setattr(jobs, "pump", lambda home=None: None)
    return lambda: AppTest.from_file(app_root / "main.py", default_timeout=60).run()


def test_the_frame_opens_on_explore_with_the_model_in_the_sidebar(open_app: Callable[[], AppTest]) -> None:
    app = open_app()
    assert not app.exception
    assert app.selectbox(key="model").value == "tiny-stories"
    assert app.button(key="compress")


@pytest.mark.parametrize("page", ["sensitivity", "autotune", "compare", "generate", "runs"])
def test_every_page_opens(open_app: Callable[[], AppTest], page: str) -> None:
    app = open_app()
    app.switch_page(f"pages/{page}.py").run()
    assert not app.exception


def test_another_model_starts_with_an_empty_selection(open_app: Callable[[], AppTest]) -> None:
    app = open_app()
    app.session_state["layer-map-selection"] = (1, ("x",))
    app.selectbox(key="model").set_value("smollm2-135m").run()
    assert app.session_state["bitpress-session"].model == "smollm2-135m"
    assert app.session_state["layer-map-selection"][1] == ()


def test_a_path_that_is_no_model_is_refused_in_place(open_app: Callable[[], AppTest], tmp_path: Path) -> None:
    app = open_app()
    app.session_state["add-box"] = True  # the popover is open
    app.run()
    app.text_input(key="add-path").set_value(str(tmp_path / "nowhere")).run()
    app.button(key="add-local").click().run()
    assert len(app.error) == 1
    assert not app.exception
    app.text_input(key="add-hub").set_value("not a hub id").run()
    app.button(key="add-from-hub").click().run()
    assert len(app.error) == 1


def test_a_first_visit_starts_one_fetch_of_the_recommended_model(open_app: Callable[[], AppTest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITPRESS_FETCH", "1")
    app = open_app()
    app.run()
    assert [status.model for status in Store().list(kind="install")] == ["smollm2-135m"]
    assert [status.model for status in Store().list(kind="inspect")] == ["tiny-stories"], "which describes the methods"


def test_a_fetch_is_told_in_bytes_and_rate() -> None:
    words = model_picker.fetch_words("SmolLM2", Status("x", "install", state="running", done=20_000_000, total=90_000_000, started=0.0, ended=10.0, eta_s=35))
    assert words == "SmolLM2: 20.0\u2009MB of 90.0\u2009MB · 2.00\u2009MB/s · 35\u2009s left"
    assert model_picker.fetch_words("SmolLM2", Status("x", "install")) == "SmolLM2: waiting"
    inspecting = Status("x", "install", state="running", phase="inspecting", done=3, total=210, started=0.0)
    assert model_picker.fetch_words("SmolLM2", inspecting) == "SmolLM2: reading the weights, layer 3 of 210", "layers are no bytes"


def test_trouble_never_shows_a_traceback() -> None:
    def broken() -> None:
        from bitpress.app.ui.notices import guarded
        from bitpress.engine.errors import InputError

        with guarded():
            raise InputError("The *thing* is wrong.", "It is `bad`.", "Use another.")
        with guarded():
            raise ZeroDivisionError("division by zero")

    app = AppTest.from_function(broken).run()
    assert not app.exception
    assert app.error[0].value == notices.error_markdown("The *thing* is wrong.", "It is `bad`.", "Use another.")
    assert "ZeroDivisionError" in app.error[1].value


def test_markup_in_messages_is_shown_as_text() -> None:
    assert notices.plain("model.layers.*.mlp_[0] $x$") == "model.layers.\\*.mlp\\_\\[0\\] \\$x\\$"
    assert isinstance(InputError("a").as_dict(), dict)


def test_the_whole_app_runs_without_torch(app_home: Path, app_root: Path) -> None:
    code = (
        "import sys\nfrom streamlit.testing.v1 import AppTest\n"
        f"app = AppTest.from_file({str(app_root / 'main.py')!r}, default_timeout=100).run()\nassert not app.exception, app.exception\n"
        "print(sorted(set(sys.modules) & {'torch', 'transformers', 'accelerate', 'safetensors', 'bitsandbytes', 'datasets'}))"
    )
    environment = {**os.environ, "BITPRESS_HOME": str(app_home), "BITPRESS_FETCH": "0"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=environment)
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert shown.stdout.strip().splitlines()[-1] == "[]"
