"""Events folded into what a live panel shows."""

import math
from collections.abc import Callable

from bitpress.app.ui.live_panel import progress_line
from bitpress.app.ui.run_view import RunView, fold, running_perplexity
from bitpress.app.ui.side_by_side import pairs_of, streaming_pairs
from bitpress.app.ui.training_chart import so_far, training_figure, training_table
from bitpress.engine.runs.events import Event
from bitpress.engine.runs.status import Status
from bitpress.engine.runs.store import Run


def events(*lines: tuple[str, dict]) -> list[Event]:
    return [Event(number, 0.0, kind, data) for number, (kind, data) in enumerate(lines, start=1)]


def test_a_run_is_folded_once_whatever_the_pieces() -> None:
    lines = events(
        ("started", {}), ("stage_started", {"stage": "compressing", "total": 2}), ("layer_done", {"layer": "a", "error": 0.1}), ("progress",
        {"done": 1, "total": 2, "eta_s": 4.0}),
        ("layer_done", {"layer": "b", "error": 0.2}), ("a_kind_of_tomorrow", {"x": 1}), ("window", {"index": 0, "nll_dense": 1.0, "nll": 1.2,
        "ratio": 1.2, "low": 1.1, "high": 1.3}),
    )  # fmt: skip
    whole = fold(RunView(), lines)
    pieces = RunView()
    for line in lines:
        fold(pieces, [line])
        fold(pieces, [line])
    assert pieces.layers == whole.layers == {"a": {"layer": "a", "error": 0.1}, "b": {"layer": "b", "error": 0.2}}
    assert whole.fresh == {"a", "b"}
    assert whole.cursor == pieces.cursor == 7
    assert whole.errors() == {"a": 0.1, "b": 0.2}
    assert [math.log(value[-1]) for value in whole.perplexities()] == [1.0, 1.2] or whole.perplexities()[1][0] > whole.perplexities()[0][0]


def test_running_perplexity_is_the_exponential_of_the_mean_of_means() -> None:
    assert running_perplexity([1.0, 3.0]) == [math.e, math.exp(2.0)]
    assert running_perplexity([1000.0]) == [math.inf]


def test_what_a_resumed_run_tells_again_replaces_what_it_told_before() -> None:
    def windows(*means: float) -> list[tuple[str, dict]]:
        return [("window", {"index": index, "nll_dense": 1.0, "nll": mean}) for index, mean in enumerate(means)]

    def words(*texts: str) -> list[tuple[str, dict]]:
        return [("sample", {"prompt": "p", "side": "dense", "index": index, "text": text}) for index, text in enumerate(texts)]

    first = [("started", {}), ("layer_done", {"layer": "a", "error": 0.1}), *windows(1.0, 2.0, 3.0), *words("x", "y", "z"), ("started", {})]
    resumed = fold(RunView(), events(*first, *windows(4.0, 5.0), *words("u")))
    assert [(window.index, window.nll) for window in resumed.windows] == [(0, 4.0), (1, 5.0)]
    assert [token["text"] for token in resumed.samples["p", "dense"]] == ["u"]
    kept = fold(RunView(), events(*first))  # measured before it stopped: nothing of it is told again
    assert [window.nll for window in kept.windows] == [1.0, 2.0, 3.0]
    assert list(kept.layers) == list(resumed.layers) == ["a"]


def test_progress_is_told_in_layers_and_time_left() -> None:
    view = RunView(phase="compressing", done=33, total=210, eta_s=12.2)
    assert progress_line(Status("x", "compress"), view) == (33 / 210, "Compressing · layer 33 of 210 · about 12\u2009s left")
    assert progress_line(Status("x", "compress", phase="loading"), RunView()) == (0.0, "Loading")


def losses(block: int, *held_out: float) -> list[tuple[str, dict]]:
    steps = 10 * (len(held_out) - 1)
    common = {"block": block, "matrices": 2, "steps": steps}
    return [("block_loss", {**common, "step": 10 * place, "held_out": error}) for place, error in enumerate(held_out)]


def test_a_training_is_shown_while_it_runs_and_counts_in_the_bar() -> None:
    begun = [("stage_started", {"stage": "compressing", "total": 4}), *losses(0, 0.5, 0.25, 0.4)]
    done = [("layer_done", {"layer": name, "error": 0.1}) for name in ("a", "b")] + [("progress", {"done": 2, "total": 4, "eta_s": 3.0})]
    view = fold(RunView(), events(*begun, *done, *losses(1, 0.8, 0.6, 0.7)[:2]))
    assert progress_line(Status("x", "compress"), view) == (0.75, "Compressing · layer 2 of 4 · training block 1, step 10 of 20 · about 3.0\u2009s left")
    assert training_table(view)["least error"] == [0.25, 0.6] and training_table(view)["at step"] == [10, 10]
    assert so_far(view.trainings[0]) == "Held-out error 0.500 → 0.250, \u221250.0\u2009% at step 10; step 20 of 20"
    drawn = training_figure(view.trainings[0]).data
    assert [line.name for line in drawn] == ["start", "held out"] and list(drawn[1].y) == [0.5, 0.25, 0.4]


def test_a_finished_training_leaves_the_line_and_one_begun_again_replaces_itself() -> None:
    view = fold(RunView(), events(*losses(0, 0.5, 0.2), ("layer_done", {"layer": "a", "error": 0.1})))
    assert "training" not in progress_line(Status("x", "compress", phase="compressing"), view)[1]
    again = [(kind, {**data, "n": 0}) for kind, data in losses(0, 0.7, 0.6, 0.5)]
    view = fold(RunView(), events(*losses(0, 0.5, 0.2), *again))
    assert view.trainings[0].held_out == [(0, 0.7), (10, 0.6), (20, 0.5)] and view.trainings[0].steps == 20


def test_a_training_of_the_whole_model_goes_on_from_its_checkpoint() -> None:
    told = [("train_loss", {"step": step, "steps": 9, "divergence": 1.0 / step, "held_out": 1.0 / step}) for step in (1, 2, 3, 2, 4)]
    view = fold(RunView(), events(("stage_started", {"stage": "training", "total": 9}), *told))
    assert [step for step, _ in view.trainings[-1].held_out] == [1, 2, 4]


def test_samples_are_paired_by_prompt() -> None:
    found = pairs_of(
        [{"prompt": "p", "side": "dense", "tokens": [1]}, {"prompt": "q", "side": "dense", "tokens": []}, {"prompt": "p", "side": "compressed", "tokens": [2]}]
    )
    assert list(found) == ["p", "q"]
    assert found["p"]["compressed"]["tokens"] == [2]
    view = fold(
        RunView(),
        events(("sample", {"prompt": "p", "side": "dense", "token": 4, "text": " a"}), ("sample", {"prompt": "p", "side": "dense", "token": 5, "text": " b"})),
    )
    assert [token["text"] for token in streaming_pairs(view)["p"]["dense"]["tokens"]] == [" a", " b"]


def test_a_folder_written_by_hand_reads_back(make_run: Callable[..., Run], preset_recipe: Callable) -> None:
    run = make_run(preset_recipe("uniform-4bit"))
    view = fold(RunView(), run.events())
    assert len(view.layers) == 42
    assert len(view.windows) == 8
