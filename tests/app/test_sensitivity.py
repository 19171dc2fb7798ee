"""The sensitivity page: scale, order, edits as pure functions; every state of the page; and a click that opens a layer."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some
from streamlit.testing.v1 import AppTest

from bitpress.app import state
from bitpress.app.ui import sensitivity_view as view
from bitpress.app.ui.layer_detail import drawn_levels, quantile, read_stats
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Recipe, WeightScheme
from bitpress.engine.runs import jobs
from bitpress.engine.runs.status import change_status
from bitpress.engine.runs.store import Store
from bitpress.engine.sensitivity_file import KINDS, OPTIONS, Score, SensitivityReport

FOUR_BITS = Recipe.from_dict({"model": "tiny-stories", "schemes": [{"match": "*", "weights": {"bits": 4, "group_size": 64}}], "stages": [{"method": "rtn"}]})
WORST = "model.layers.5.mlp.down_proj"


def harm_of(anatomy: Anatomy) -> dict[str, float]:
    """Rising along the model, so that the last layer is the worst."""
    return {part.name: 0.001 * 1.1**index for index, part in enumerate(anatomy.linears)}


@pytest.fixture
def measured(app_home: Path, anatomy: Anatomy) -> SensitivityReport:
    """A kept measurement of the story model."""
    scores = [
        Score(layer=name, option=option.id, kind=kind, score=harm * 3**place)
        for kind in KINDS
        for place, option in enumerate(OPTIONS)
        for name, harm in harm_of(anatomy).items()
    ]
    report = SensitivityReport(
        digest="d" * 16, model=anatomy.model, fingerprint=anatomy.fingerprint, kinds=KINDS, text="stories", tokens_sha256="0",
        protocol="stories/calibration, 8 sequences of 256", options=OPTIONS, seconds_of={"activation": 12.0}, scores=scores,
    )  # fmt: skip
    report.save()
    return report


def open_page(app_root: Path, **link: str) -> AppTest:
    app = AppTest.from_file(str(app_root / "pages" / "sensitivity.py"), default_timeout=60)
    for name, value in link.items():
        app.query_params[name] = value
    app.run()
    assert not app.exception
    return app


def button(app: AppTest, key: str) -> Any:
    return next(found for found in app.button if found.key == key)


def said(app: AppTest) -> str:
    return " ".join(element.value for kind in (app.markdown, app.caption, app.error, app.info, app.warning) for element in kind)


def widths(app: AppTest, anatomy: Anatomy) -> dict[str, int]:
    """Bits of every layer in the recipe that the tab is editing."""
    recipe = app.session_state[state._KEY].recipe
    return {name: scheme.weights.bits for name, scheme in recipe.resolve(anatomy).items() if scheme.weights and name in {part.name for part in anatomy.linears}}


# --- scale, order, edits ------------------------------------------------------------------------------------------


@given(some.lists(some.floats(1e-12, 1e6), min_size=2, max_size=30))
def test_places_on_the_scale_keep_the_order_and_end_at_its_ends(scores: list[float]) -> None:
    bounds = view.bounds_of(scores)
    assert bounds is not None
    places = [bounds.place(score) for score in sorted(scores)]
    assert places == sorted(places)
    assert all(0.0 <= place <= 1.0 for place in places)
    if bounds.high > bounds.low * (1 + 1e-9):
        assert (places[0], places[-1]) == (0.0, pytest.approx(1.0))


def test_the_scale_is_logarithmic_and_its_legend_says_the_numbers() -> None:
    bounds = view.bounds_of([0.01, 1.0, 0.0])
    assert bounds == view.Bounds(0.01, 1.0)
    assert bounds.place(0.1) == pytest.approx(0.5)
    assert bounds.place(0.0) == 0.0
    assert [label for label, _ in view.legend(bounds, "Harm").steps] == ["0.010", "0.032", "0.10", "0.32", "1.0"]


def test_nothing_measured_gives_grey_squares_that_say_so(anatomy: Anatomy) -> None:
    cells = view.cells(anatomy, {}, None, "4-bit")
    assert len(cells) == len(anatomy.linears)
    assert {cell.value for cell in cells} == {None}
    assert all(view.UNMEASURED in cell.title for cell in cells)


def test_order_is_by_harm_and_then_by_name() -> None:
    assert view.ranked({"b": 1.0, "a": 1.0, "c": 2.0}) == ["c", "a", "b"]


def test_rows_show_every_option_and_the_width_in_the_recipe(anatomy: Anatomy) -> None:
    table = {"8-bit": harm_of(anatomy), "4-bit": {name: 2 * harm for name, harm in harm_of(anatomy).items()}}
    rows = view.rows(anatomy, table, "4-bit", FOUR_BITS)
    assert rows["layer"][0] == WORST
    assert rows["4-bit"] == sorted(rows["4-bit"], reverse=True)
    assert rows["8-bit"][0] == pytest.approx(rows["4-bit"][0] / 2)
    assert set(rows["in the recipe"]) == {"4 bit, group 64, asymmetric"}


def test_the_embedding_has_its_own_width_in_the_rows(anatomy: Anatomy) -> None:
    table = {"8-bit": harm_of(anatomy) | {anatomy.embedding.name: 0.0}}
    for embedding, said in (({"bits": 4}, "4 bit"), (None, "dense")):
        recipe = Recipe.from_dict(FOUR_BITS.to_dict() | {"embedding": embedding})
        assert view.rows(anatomy, table, "8-bit", recipe)["in the recipe"][-1] == said


def test_an_edit_reaches_exactly_its_layers_and_says_what_changed(anatomy: Anatomy) -> None:
    layers = view.ranked(harm_of(anatomy))[:3]
    after = view.set_bits(FOUR_BITS, anatomy, layers, 8)
    schemes = after.resolve(anatomy)
    assert {name for name, scheme in schemes.items() if scheme.weights and scheme.weights.bits == 8 and name in harm_of(anatomy)} == set(layers)
    assert view.what_changed(FOUR_BITS, after, anatomy, layers).startswith("3 layers changed (3 from 4 bit")
    assert "Nothing changed" in view.what_changed(after, after, anatomy, layers)


@pytest.mark.parametrize(("layers", "count"), [(1, 1), (42, 8), (210, 20), (1000, 20)])
def test_usual_count_is_a_fifth_of_the_layers_at_most_twenty(layers: int, count: int) -> None:
    assert view.usual_count(layers) == count


def test_time_follows_earlier_measurements_where_there_are_some() -> None:
    assert view.estimate_seconds(2000, [(1000, 3.0), (1000, 5.0), (1000, 100.0)], 0, 0) == pytest.approx(10.0)
    guess = view.estimate_seconds(106_000_000, [], 135_000_000, 4096)
    assert 5 < guess < 120


# --- a layer close up ---------------------------------------------------------------------------------------------


def test_levels_are_those_of_the_width_and_hold_zero(app_home: Path, anatomy: Anatomy) -> None:
    stats = read_stats("tiny-stories", WORST)
    assert stats is not None
    for bits in (2, 3, 4, 6):
        for symmetric in (True, False):
            levels = drawn_levels(stats["histogram"], WeightScheme(bits=bits, group_size=64, symmetric=symmetric))
            assert len(levels) == 2**bits
            assert min(abs(level) for level in levels) < 1e-12
            assert levels == sorted(levels)
            assert stats["min"] <= levels[1] and levels[-2] <= stats["max"]
    assert drawn_levels(stats["histogram"], WeightScheme(bits=8)) == []
    assert drawn_levels(stats["histogram"], None) == []


def test_typical_range_of_a_group_is_the_median_of_its_largest() -> None:
    """For weights spread evenly over -1..1 the median of the largest of g is 2 * 0.5**(1/g) - 1."""
    even = {"edges": [-1 + index / 50 for index in range(101)], "counts": [10] * 100}
    assert quantile(even, 0.5 ** (1 / 64)) == pytest.approx(2 * 0.5 ** (1 / 64) - 1)
    assert quantile(even, 0.5) == pytest.approx(0.0, abs=1e-9)
    assert math.isclose(quantile(even, 1.0), 1.0)


# --- the page -----------------------------------------------------------------------------------------------------


def test_before_measuring_the_page_says_what_to_press_and_how_long_it_takes(app_root: Path, app_home: Path) -> None:
    app = open_page(app_root)
    assert "Press Measure" in said(app)
    assert "42 matrices × 6 options × 4 scores, about" in said(app)
    assert button(app, "measure").label == "Measure"


def test_measure_puts_a_run_in_the_queue(app_root: Path, app_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(jobs, "submit_once", lambda kind, args, title: asked.append((kind, args)))
    button(open_page(app_root), "measure").click().run()
    assert asked == [("sensitivity", {"model": "tiny-stories", "force": False})]


def test_while_it_works_progress_and_cancel_are_shown(app_root: Path, app_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Store().create("sensitivity", {"model": "tiny-stories"})
    change_status(run.path, lambda _: {"state": "running", "host": "elsewhere", "heartbeat": 9e12, "done": 12, "total": 42, "eta_s": 30.0})
    cancelled: list[str] = []
    monkeypatch.setattr(jobs, "cancel", cancelled.append)
    app = open_page(app_root)
    assert "12 of 42" in app.get("progress")[0].proto.text
    button(app, "cancel-measure").click().run()
    assert cancelled == [run.id]


def test_a_failed_measurement_says_why_and_can_be_repeated(app_root: Path, app_home: Path) -> None:
    run = Store().create("sensitivity", {"model": "tiny-stories"})
    change_status(run.path, lambda _: {"state": "failed", "error": {"what": "The text is missing.", "why": "", "remedy": "Fetch it."}})
    app = open_page(app_root)
    assert "The text is missing." in said(app)
    assert button(app, "measure").label == "Measure"


def test_table_is_sorted_by_the_chosen_option(app_root: Path, measured: SensitivityReport) -> None:
    app = open_page(app_root)
    table = app.dataframe[0].value
    assert table["layer"].iloc[0] == WORST
    assert list(table["4-bit"]) == sorted(table["4-bit"], reverse=True)
    assert "stories/calibration" in said(app)


def test_one_click_edits_change_the_recipe_of_the_tab_and_can_be_undone(app_root: Path, measured: SensitivityReport, anatomy: Anatomy) -> None:
    app = open_page(app_root)
    button(app, "most-apply").click().run()
    assert not app.exception
    order = view.ranked(harm_of(anatomy))
    assert {name for name, bits in widths(app, anatomy).items() if bits == 8} == set(order[:8])
    assert "8 layers changed (8 from 4 bit" in said(app)
    button(app, "least-apply").click().run()
    assert {name for name, bits in widths(app, anatomy).items() if bits == 3} == set(order[-8:])
    button(app, "undo-edit").click().run()
    assert 3 not in widths(app, anatomy).values()


def test_a_number_changed_in_the_same_breath_as_the_press_counts(app_root: Path, measured: SensitivityReport, anatomy: Anatomy) -> None:
    app = open_page(app_root)
    next(field for field in app.number_input if field.key == "most-count").set_value(2)
    button(app, "most-apply").click()
    app.run()
    assert sum(bits == 8 for bits in widths(app, anatomy).values()) == 2


def test_link_opens_a_layer_with_its_charts_and_tables(app_root: Path, measured: SensitivityReport) -> None:
    app = open_page(app_root, layer=WORST)
    assert "Block 5, down" in said(app)
    assert len(app.get("plotly_chart")) == 3
    captions = [caption.value for caption in app.caption]
    assert {"Weights and levels", "Error against bits", "Spectrum"} <= set(captions)


def test_a_layer_of_the_link_that_does_not_exist_is_passed_over(app_root: Path, measured: SensitivityReport) -> None:
    assert "Click a square" in said(open_page(app_root, layer="no.such.layer"))


def test_a_damaged_file_counts_as_not_measured(app_root: Path, measured: SensitivityReport) -> None:
    measured.path.write_text("{")
    assert "Press Measure" in said(open_page(app_root))


def test_measurement_of_other_weights_is_not_shown(app_root: Path, measured: SensitivityReport) -> None:
    measured.model_copy(update={"fingerprint": "0" * 64}).save()
    assert "Press Measure" in said(open_page(app_root))
