"""A run while it works and how it ended: phase, time left, running perplexity, error per layer, memory, log. Knows a run's view and record.

Heights are fixed, so that nothing on the page moves while figures come in. Starting and following a run is the page's business.
"""

from collections.abc import Callable
from pathlib import PurePath

import plotly.graph_objects as go
import streamlit as st

from bitpress.app import state
from bitpress.app.ui import charts
from bitpress.app.ui.notices import show_error
from bitpress.app.ui.numbers import amount, duration, memory, signed_percent
from bitpress.app.ui.run_view import RunView, Training, Window, fold
from bitpress.app.ui.theme import COMPRESSED_COLOUR, DENSE_COLOUR
from bitpress.app.ui.training_chart import training_chart
from bitpress.engine.errors import BitpressError
from bitpress.engine.runs import jobs
from bitpress.engine.runs.status import Status
from bitpress.engine.runs.store import Run

POLL_SECONDS = 0.5
LOG_LINES = 60
UNITS = {"compressing": "layer", "inspecting": "layer", "measuring quality": "window", "perplexity": "window", "writing samples": "sample",
         "trying recipes": "recipe"}  # fmt: skip
CHART_HEIGHT = 230
STATE_BADGES = {
    "queued": ":gray-badge[:material/schedule: queued]", "running": ":blue-badge[:material/play_arrow: running]",
    "cancelling": ":orange-badge[:material/stop_circle: cancelling]", "cancelled": ":orange-badge[:material/cancel: cancelled]",
    "failed": ":red-badge[:material/error: failed]", "interrupted": ":orange-badge[:material/power_off: interrupted]",
    "finished": ":green-badge[:material/check_circle: finished]",
}  # fmt: skip


def view_of(run: Run) -> RunView:
    """The folded view of a run, kept in the tab and brought up to date with the events that came since."""
    kept: dict[str, RunView] = st.session_state.setdefault("run-views", {})
    if run.id not in kept:
        kept.clear()
        kept[run.id] = RunView()
    view = kept[run.id]
    return fold(view, run.events(view.cursor))


def progress_line(status: Status, view: RunView) -> tuple[float, str]:
    """How far the phase is, 0..1, and the sentence beside it: what, layer i of N, time left."""
    phase = view.phase or status.phase
    total, done = (view.total, view.done) if view.phase else (status.total, status.done)
    words = phase.replace("_", " ").capitalize() or "Starting"
    unit = UNITS.get(phase, "step")
    parts = [words] + ([f"{unit} {min(done, total)} of {total}"] if total else [])
    under_way = view.trainings.get(view.training) if view.training is not None else None
    if under_way is not None and under_way.block is not None:  # a training of the whole model is a phase of its own
        parts.append(f"training block {under_way.block}, step {under_way.last} of {under_way.steps}")
    left = view.eta_s if view.phase else status.eta_s
    parts += [f"about {duration(left)} left"] if left is not None and left >= 1 else []
    trained = trained_matrices(under_way, total - done) if under_way and under_way.block is not None else 0.0
    return (min(1.0, (done + trained) / total) if total else 0.0), " · ".join(parts)


def trained_matrices(training: Training, left: int) -> float:
    """How many matrices a training has as good as made: its share of those of its block."""
    count = int(training.points[training.last].get("matrices", 0)) if training.points else 0
    return min(count, left) * training.last / max(1, training.steps)


def engine_state(status: Status | None, view: RunView | None) -> None:
    """One line on what the engine is doing, and the bar under it."""
    if status is None or not status.active:
        st.markdown("**Engine**  \n:gray-badge[:material/pause: idle]")
        return
    share, words = progress_line(status, view or RunView())
    if status.state == "queued":
        share, words = 0.0, "Waiting for the run before it"
    st.markdown(f"**Engine**  \n{STATE_BADGES[status.state]}")
    st.progress(share, text=words)


def live_panel(run: Run, status: Status, view: RunView) -> None:
    """The panel of one run, in whatever state it is."""
    with st.container(border=True, key="live-panel"):
        st.markdown(f"**Run {run.id}** {STATE_BADGES[status.state]}")
        _ending(run, status)
        left, middle, right = st.columns([5, 5, 3])
        with left:
            if view.trainings and not view.windows:
                training_chart(view, f"training-{run.id}")
            else:
                perplexity_chart(view.windows, f"perplexity-{run.id}")
        with middle:
            error_chart(view, f"errors-{run.id}")
        with right:
            resources(view)
        if view.trainings and view.windows:
            with st.expander("Training"):
                training_chart(view, f"training-{run.id}")
        with st.expander("Log and notes"):
            for level, text in view.notes[-8:]:
                st.caption(f"{level}: {text}")
            st.code(run.log_tail(LOG_LINES) or "Nothing was printed.", language=None, height=180)


def _ending(run: Run, status: Status) -> None:
    """What to say and offer when a run stopped before its end."""
    if status.state == "failed":
        error = status.error or {}
        show_error(BitpressError(error.get("what", "The run failed."), error.get("why", ""), error.get("remedy", "The log below has the details.")))
    if status.state == "interrupted":
        st.warning("**The worker stopped before the end.** Finished layers are kept; resume goes on from them.", icon=":material/power_off:")
    if status.state == "cancelled":
        st.info("Cancelled. Finished layers are kept; resume goes on from them.", icon=":material/cancel:")
    if status.resumable:
        st.button("Resume", key=f"resume-{run.id}", on_click=told(lambda: jobs.resume(run.id)), icon=":material/play_arrow:")


def told(action: Callable[[], object]) -> Callable[[], None]:
    """A callback whose refusal is told at the top of the page instead of raised."""

    def act() -> None:
        try:
            action()
        except BitpressError as error:
            state.session().notice = error

    return act


def perplexity_chart(windows: list[Window], key: str) -> None:
    """Running perplexity of dense and compressed over windows, with the interval that the paired ratio leaves."""
    st.markdown("**Perplexity so far**")
    if not windows:
        st.skeleton(height=CHART_HEIGHT)
        st.caption("Windows are scored once every layer is done.")
        return
    dense, now = RunView(windows=windows).perplexities()
    x = [float(window.index + 1) for window in windows]
    last = windows[-1]
    ratio = last.ratio if last.ratio is not None else (now[-1] / dense[-1] if dense else None)
    words = f"{amount(now[-1])} against {amount(dense[-1])} dense" if dense else amount(now[-1])
    table = {"window": [int(value) for value in x], "nll dense": [w.nll_dense for w in windows], "nll compressed": [w.nll for w in windows],
             "perplexity dense": dense if len(dense) == len(x) else [None] * len(x), "perplexity compressed": now}  # fmt: skip
    chart = charts.kept(key, list(windows), lambda: _perplexity_figure(windows, x, dense, now))
    charts.show(chart, key, f"Running perplexity over {len(windows)} windows: {words}", table, note=f"{words}{_ratio_words(ratio, last)}")


def _perplexity_figure(windows: list[Window], x: list[float], dense: list[float], now: list[float]) -> go.Figure:
    chart = charts.figure(CHART_HEIGHT, "windows scored", "perplexity", log_y=bool(dense) and max(now) > 20 * dense[-1], legend=True)
    bounds = [(i, window) for i, window in enumerate(windows) if window.low is not None and window.high is not None and i < len(dense)]
    if bounds:
        lows, highs = [dense[i] * (w.low or 0) for i, w in bounds], [dense[i] * (w.high or 0) for i, w in bounds]
        charts.band(chart, [x[i] for i, _ in bounds], lows, highs, "95 % of the ratio", COMPRESSED_COLOUR)
    if dense:
        charts.line(chart, x[: len(dense)], dense, "dense", DENSE_COLOUR, dash="dash", marks="square")
    charts.line(chart, x, now, "compressed", COMPRESSED_COLOUR, marks="circle")
    return chart


def _ratio_words(ratio: float | None, last: Window) -> str:
    if ratio is None:
        return ""
    inside = f", 95 % interval {signed_percent(last.low - 1)} to {signed_percent(last.high - 1)}" if last.low is not None and last.high is not None else ""
    return f": {signed_percent(ratio - 1)}{inside}"


def error_chart(view: RunView, key: str) -> None:
    """Relative error of each finished layer, in the order in which they came."""
    st.markdown("**Error of each layer**")
    rows = [(name, data["error"]) for name, data in view.layers.items() if isinstance(data.get("error"), int | float)]
    if not rows:
        st.skeleton(height=CHART_HEIGHT)
        st.caption("A bar lands here as each layer is finished.")
        return
    worst = max(rows, key=lambda row: row[1])
    told = {column: [view.layers[name].get(column) for name, _ in rows] for column in ("method", "bytes", "seconds")}
    table = {"layer": [name for name, _ in rows], "relative error": [error for _, error in rows], **told}
    note = f"Largest {amount(worst[1])} in {'.'.join(PurePath(worst[0]).name.split('.')[-4:])}"
    chart = charts.kept(key, rows, lambda: _error_figure(rows))
    charts.show(chart, key, f"Relative error of {len(rows)} layers; the largest is {amount(worst[1])} in {worst[0]}", table, note=note)


def _error_figure(rows: list[tuple[str, float]]) -> go.Figure:
    chart = charts.figure(CHART_HEIGHT, "layer, in order", "relative error")
    charts.bars(chart, list(range(1, len(rows) + 1)), [error for _, error in rows], "relative error", COMPRESSED_COLOUR)
    chart.data[0].customdata = [name for name, _ in rows]
    chart.data[0].hovertemplate = "%{customdata}<br>relative error %{y:.3g}<extra></extra>"
    chart.update_layout(hovermode="closest")
    return chart


def resources(view: RunView) -> None:
    """Memory and processor of the worker, and the latencies as they arrive."""
    st.markdown("**Worker**")
    if view.resources:
        last = view.resources[-1]
        st.metric(
            "Memory",
            memory(last.get("rss", 0)),
            chart_data=[item.get("rss", 0) / (1 << 20) for item in view.resources],
            help="Resident memory of the worker process.",
        )
        st.caption(f"{amount(last.get('cpu', 0))}\u2009% of one core" + (f" · GPU {memory(last['gpu'])}" if last.get("gpu") else ""))
    else:
        st.skeleton(height=70)
    for side in ("dense", "compressed"):
        speed = view.metrics.get(side, {}).get("decode_tokens_per_s")
        st.metric(f"Decode, {side}", f"{amount(speed)} tokens/s" if speed else "…")
