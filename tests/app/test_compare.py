"""Comparing runs: differences, front, knee and constraints as pure functions; the page with many runs; labels that are kept and taken back."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some
from streamlit.testing.v1 import AppTest

from bitpress.app.ui import compare_charts as charts
from bitpress.app.ui import compare_view as view
from bitpress.app.ui.numbers import MINUS
from bitpress.app.ui.parallel_lines import Axis, payload
from bitpress.engine.errors import InputError
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs import jobs, labels
from bitpress.engine.runs.labels import Labels
from bitpress.engine.runs.store import Run, Store


def entry(name: str, size: float, perplexity: float, speed: float | None = None, protocol: str = "wiki", **said: Any) -> view.Entry:
    figures = {"size": size, "perplexity": perplexity} | ({"speed": speed} if speed is not None else {})
    return view.Entry(name, name, "tiny-stories", 0.0, figures, protocol, Labels(**said))


@given(some.lists(some.tuples(some.floats(1, 100), some.floats(1, 100)), min_size=1, max_size=25))
def test_nothing_on_the_front_is_beaten_and_everything_else_is(points: list[tuple[float, float]]) -> None:
    runs = [entry(str(number), x, y) for number, (x, y) in enumerate(points)]
    front = view.front(runs, "size", "perplexity")
    values = [(run.figures["size"], run.figures["perplexity"]) for run in front]
    assert values == sorted(values)
    for run in runs:
        x, y = run.figures["size"], run.figures["perplexity"]
        beaten = any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
        assert ((x, y) in values) == (not beaten)


def test_more_is_better_where_it_is() -> None:
    runs = [entry("slow", 10, 5, 100.0), entry("fast", 10, 6, 300.0), entry("worst", 10, 7, 90.0)]
    assert [run.id for run in view.front(runs, "speed", "perplexity")] == ["fast", "slow"]
    assert view.is_better(0.1, view.QUANTITIES["speed"]) is True
    assert view.is_better(0.1, view.QUANTITIES["perplexity"]) is False
    assert view.said(0.1, view.QUANTITIES["speed"]).startswith("▲ +10")
    assert view.said(-0.1, view.QUANTITIES["speed"]).startswith(f"▽ {MINUS}10")
    assert view.said(1e-5, view.QUANTITIES["size"]) == "= same"


def test_the_knee_is_where_the_front_bends() -> None:
    runs = [entry("a", 1, 100), entry("knee", 2, 10), entry("b", 50, 8), entry("c", 100, 7)]
    best = view.knee(view.front(runs, "size", "perplexity"), "size", "perplexity")
    assert best is not None and best.id == "knee"
    assert view.knee(runs[:2], "size", "perplexity") is None


def test_constraints_and_protocols_leave_runs_out() -> None:
    runs = [entry("a", 1, 5), entry("b", 2, 4), entry("c", 3, 3, protocol="stories"), entry("d", 4, 2, 50.0)]
    assert [run.id for run in view.allowed(runs, {"size": (2, 4)})] == ["b", "c", "d"]
    assert [run.id for run in view.allowed(runs, {"speed": (0, 100)})] == ["d"], "a figure that is missing is not within"
    assert [run.id for run in view.placed(runs, "size", "perplexity")] == ["a", "b", "d"], "two protocols never share an axis"
    assert [run.id for run in view.placed(runs, "size", "perplexity", "stories")] == ["c"], "a reference keeps to the protocol of what it stands beside"
    assert view.span(runs, "size") == (1.0, 4.0)
    assert view.span(runs[:1], "size") is None


def test_a_difference_of_quality_needs_the_same_text() -> None:
    base = entry("base", 2, 4)
    columns = view.table([base, entry("a", 1, 5), entry("c", 3, 3, protocol="stories")], base, ("size", "perplexity"))
    assert columns["plan"][0] == "base · baseline"
    assert columns["Δ stored size"] == ["", f"▲ {MINUS}50.0\u2009%", "▽ +50.0\u2009%"]
    assert columns["Δ perplexity"] == ["", "▽ +25.0\u2009%", ""]


def test_what_is_looked_for_is_found_and_what_is_hidden_is_not() -> None:
    runs = [entry("a", 1, 1, tags=("demo",)), entry("b", 1, 1, star=True, note="the good one"), entry("c", 1, 1, archived=True)]
    ids = lambda *asked: [run.id for run in view.sieved(runs, *asked)]  # noqa: E731
    assert ids("", (), False, False) == ["b", "a"]
    assert ids("", (), False, True) == ["b", "a", "c"]
    assert ids("good", (), False, False) == ["b"]
    assert ids("", ("demo",), False, False) == ["a"]
    assert ids("", (), True, True) == ["b"]


def test_labels_are_kept_in_the_folder_and_a_deletion_can_be_taken_back(make_run: Callable[..., Run], preset_recipe: Callable[[str], Recipe]) -> None:
    run = make_run(preset_recipe("uniform-4bit"))
    assert labels.read_labels(run.path) == Labels()
    labels.change_labels(run.path, star=True, tags=["a ", "a", "", "b"], note="hello")
    assert labels.read_labels(run.path) == Labels(star=True, tags=("a", "b"), note="hello")
    labels.delete(run.path)
    assert labels.read_labels(run.path).deleted
    assert labels.empty_bin() == []
    labels.restore(run.path)
    assert labels.read_labels(run.path).deleted is None
    labels.change_labels(run.path, deleted=time.time() - 8 * 86400)
    assert labels.empty_bin() == [run.id]
    assert not run.path.exists()
    with pytest.raises(InputError, match="is gone"):
        labels.change_labels(run.path, star=True)
    other = make_run(preset_recipe("uniform-4bit"), state="running", layers=3)
    with pytest.raises(InputError, match="at work is not deleted"):
        labels.delete(other.path)
    with pytest.raises(InputError, match="limit is 4,000"):
        labels.change_labels(other.path, note="x" * 5000)
    (other.path / "labels.json").write_text("[1")
    assert labels.read_labels(other.path) == Labels()


def test_an_axis_has_its_better_end_at_the_foot_and_a_length_of_its_own() -> None:
    axes = [Axis("Size, MB", [1.0, 4.0]), Axis("Speed", [30.0, 10.0], less=False), Axis("KL", [0.1, 0.01], log=True), Axis("Same", [2.0, 2.0], log=True)]
    sent = payload(["a", "b"], axes, "said")
    assert [(axis["foot"], axis["head"], axis["log"]) for axis in sent["axes"]] == [(1, 4, False), (30, 10, False), (0.01, 0.1, True), (1, 3, False)]
    assert sent["lines"] == [["a", 1.0, 30.0, 0.1, 2.0], ["b", 4.0, 10.0, 0.01, 2.0]]
    assert payload(["a", "b"], [Axis("KL", [0.0, 1.0], log=True)], "")["axes"][0]["log"] is False, "zero has no logarithm"


def test_the_difference_of_two_recipes_is_drawn_square_by_square(anatomy: Anatomy, preset_recipe: Callable[[str], Recipe]) -> None:
    cells, changed = view.difference_cells(anatomy, preset_recipe("uniform-4bit"), preset_recipe("uniform-8bit"))
    assert changed == len(anatomy.linears) == len(cells)
    assert {cell.text for cell in cells} == {"+4"}
    same, none = view.difference_cells(anatomy, preset_recipe("uniform-4bit"), preset_recipe("uniform-4bit"))
    assert none == 0
    assert {cell.value for cell in same} == {None}


# The page ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_page(app_root: Path, app_home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., AppTest]:
    monkeypatch.setattr(jobs, "pump", lambda home=None: None)

    def build(**link: str) -> AppTest:
        app = AppTest.from_file(str(app_root / "pages" / "compare.py"), default_timeout=60)
        for name, value in link.items():
            app.query_params[name] = value
        app.run()
        assert not app.exception, app.exception
        return app

    return build


def spread(run: Run, seed: int) -> None:
    """Give a run figures of its own."""
    rng = random.Random(seed)
    record = json.loads((run.path / "metrics.json").read_text())
    now = record["metrics"]["compressed"]
    now["bytes"], now["perplexity"], now["decode_tokens_per_s"] = rng.randint(10**6, 6 * 10**6), 5 + 10 * rng.random(), 200 + 300 * rng.random()
    (run.path / "metrics.json").write_text(json.dumps(record))


@pytest.fixture
def three(make_run: Callable[..., Run], preset_recipe: Callable[[str], Recipe]) -> list[Run]:
    runs = [make_run(preset_recipe(preset)) for preset in ("uniform-8bit", "uniform-4bit", "uniform-2bit")]
    for seed, run in enumerate(runs):
        spread(run, seed)
    return runs


def said(app: AppTest) -> str:
    return " ".join(element.value for kind in (app.markdown, app.caption, app.error, app.info, app.warning) for element in kind)


def test_with_no_run_the_page_says_what_to_do(open_page: Callable[..., AppTest]) -> None:
    assert "Nothing to compare yet" in said(open_page())


def test_runs_stand_beside_the_dense_model_or_a_pinned_one(open_page: Callable[..., AppTest], three: list[Run]) -> None:
    app = open_page()
    frame = app.dataframe[0].value
    assert frame["plan"].iloc[0].endswith("baseline")
    assert len(frame) == 4, "the dense model, pinned, and three runs"
    app = open_page(base=f"8 bits everywhere · {three[0].id[-4:]}")
    frame = app.dataframe[0].value
    assert len(frame) == 3
    assert frame["run"].iloc[0] == three[0].id
    assert "on the front" in said(app)


def test_a_run_is_labelled_deleted_and_brought_back(open_page: Callable[..., AppTest], three: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    app = open_page()
    app.session_state["compare-deleted"] = (three[0].id,)
    labels.delete(three[0].path)
    app.run()
    assert three[0].id not in list(app.dataframe[0].value["run"])
    app.button(key="undo-delete").click().run()
    assert not app.exception
    assert three[0].id in list(app.dataframe[0].value["run"])


def test_what_was_deleted_a_week_ago_is_gone_once_the_page_is_opened(open_page: Callable[..., AppTest], three: list[Run]) -> None:
    labels.change_labels(three[0].path, deleted=time.time() - labels.BIN_SECONDS - 1)
    labels.change_labels(three[1].path, deleted=time.time())
    app = open_page()
    assert [run.path.exists() for run in three] == [False, True, True]
    assert "1 run. " in said(app), "the one that is not deleted"


def test_the_knee_opens_its_recipe(open_page: Callable[..., AppTest], make_run: Callable[..., Run], preset_recipe: Callable[[str], Recipe]) -> None:
    for size, perplexity in ((1, 100), (2, 10), (5, 8)):
        run = make_run(preset_recipe("uniform-4bit"))
        record = json.loads((run.path / "metrics.json").read_text())
        record["metrics"]["compressed"] |= {"bytes": size * 10**6, "perplexity": perplexity}
        (run.path / "metrics.json").write_text(json.dumps(record))
    app = open_page()
    assert any(button.key == "open-knee" for button in app.button)
    app.selectbox(key="y").set_value("size").run()
    assert "two different quantities" in said(app)


def test_every_figure_has_a_panel_of_its_own(open_page: Callable[..., AppTest], three: list[Run]) -> None:
    app = open_page(views="Figure by figure")
    assert not app.exception
    assert "Dashed: the baseline" in said(app)
    entries = view.entries_of(Store().list(kind="compress"))
    chart = charts._multiples_figure(entries, ["perplexity", "speed"], view.dense_of("tiny-stories", entries))
    assert [title.text for title in chart.layout.annotations] == ["Perplexity", "Decode speed, tokens/s"]
    drawn = [trace for trace in chart.data if trace.xaxis == "x"]
    assert sum(len(trace.x) for trace in drawn) == 3
    assert len(chart.layout.shapes) == 2


@pytest.mark.bench
def test_five_hundred_runs_open_in_time(open_page: Callable[..., AppTest], make_run: Callable[..., Run], preset_recipe: Callable[[str], Recipe]) -> None:
    recipe = preset_recipe("uniform-4bit")
    for seed in range(500):
        spread(make_run(recipe, windows=1), seed)
    Store().list(kind="compress", limit=1000)
    began = time.process_time()
    app = open_page()
    assert time.process_time() - began < 1.5
    assert len(app.dataframe[0].value) == 501
