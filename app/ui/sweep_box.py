"""Try many recipes: the form of a grid or a search, and a sweep while it works, paused and done. Knows plans and runs; computes nothing."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import plotly.graph_objects as go
import streamlit as st

from bitpress.app import state
from bitpress.app.ui import charts, sweep_view
from bitpress.app.ui.live_panel import POLL_SECONDS, STATE_BADGES, progress_line, told
from bitpress.app.ui.notices import error_markdown, plain, show_error
from bitpress.app.ui.numbers import amount, counted
from bitpress.app.ui.run_view import RunView
from bitpress.app.ui.theme import ACCENT, DENSE_COLOUR
from bitpress.app.ui.turn import turn_to
from bitpress.engine.errors import BitpressError
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.runs import jobs
from bitpress.engine.runs.status import Status
from bitpress.engine.runs.store import Store
from bitpress.engine.runs.sweep_record import front_of, read_points, tag_of
from bitpress.engine.sweep import SweepPlan

HEIGHT, TABLE_HEIGHT = 300, 250
NUMBERS = ("size, MB", "bits a linear weight", "perplexity", "divergence, nat", "foretold, nat")
CONFIG = {name: st.column_config.NumberColumn(name, format="%.4g") for name in NUMBERS}
WAYS = {"search": "Search", "grid": "Grid"}


def sweep_box(anatomy: Anatomy) -> None:
    """The section of the page."""
    st.markdown("**Try many recipes**")
    st.caption("Each becomes a run of its own, measured in turn; they appear in the plot above and on the compare page.")
    status = sweep_view.newest_sweep(anatomy.model)
    if status is not None and status.active:
        st.fragment(_working, run_every=POLL_SECONDS)(status.id)
        return
    if status is not None:
        ended(status)
    form(anatomy)


# --- asking -------------------------------------------------------------------------------------------------------


def form(anatomy: Anatomy) -> None:
    """What to try, how many that makes, and the button."""
    with st.container(border=True, key="sweep-form"):
        way = st.segmented_control("Way", list(WAYS), default="search", format_func=WAYS.get, key="sweep-way", required=True, label_visibility="collapsed")
        try:
            plan = grid_form() if way == "grid" else search_form(anatomy)
        except BitpressError as error:
            show_error(error)
            return
        with st.container(horizontal=True, vertical_alignment="center"):
            st.button("Start", key="sweep-start", icon=":material/experiment:", disabled=plan is None, on_click=told(partial(_start, plan)) if plan else None)
            st.caption(sweep_view.time_words(anatomy.model, plan.size) if plan else "Choose values on at least one axis.", width="stretch")


def grid_form() -> SweepPlan | None:
    """Every combination of the values that are chosen, around the recipe of the explore page."""
    st.caption("Every combination of these, around the recipe on the explore page. An axis without values stays as it is there.")
    axes = {**sweep_view.GRID_AXES, "method": ("Rounding", tuple(sweep_view.methods_that_round()))}
    chosen: dict[str, list[Any]] = {}
    for column, (axis, (label, values)) in zip(st.columns(len(axes)), axes.items(), strict=True):
        chosen[axis] = column.multiselect(label, values, key=f"sweep-{axis}", placeholder="as it is", format_func=_said)
    return sweep_view.grid_plan(state.session().recipe, chosen)


def _said(value: Any) -> str:
    return f"{value:.0%}" if isinstance(value, float) else "none" if value in (0, 1) else str(value)


def search_form(anatomy: Anatomy) -> SweepPlan | None:
    """Between which bits, with which methods, how many."""
    st.caption(
        "Starts from the best recipes by the scores; then moves bits between kinds of layers, towards less divergence at less size, by what was measured."
    )
    left, middle, right = st.columns([3, 3, 2], gap="large")
    bits = left.slider("Bits a linear weight", 2.3, 8.0, (2.75, 6.0), 0.05, key="sweep-range")
    methods = middle.multiselect("Rounding", sweep_view.methods_that_round(), ["rtn"], key="sweep-methods")
    trials = right.number_input("Recipes", 4, 200, 12, key="sweep-trials")
    if not methods:
        return None
    base = state.session().recipe
    return sweep_view.search_plan(base, int(trials), bits, methods)


def _start(plan: SweepPlan) -> None:
    args = {"model": plan.base.model, "plan": plan.model_dump(mode="json", exclude_none=True)}
    jobs.submit_once("sweep", args, title=f"{'Search' if plan.search else 'Grid'} around {plan.base.model}")


# --- at work, paused, done ----------------------------------------------------------------------------------------


def _working(run_id: str) -> None:
    jobs.pump()
    run = Store().get(run_id)
    status = run.status()
    if not status.active:
        st.rerun()
    share, words = progress_line(status, RunView())
    with st.container(border=True, key="sweep-work"):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(f"{plain(status.title)} {STATE_BADGES[status.state]}", width="stretch")
            st.button("Pause", key="sweep-pause", icon=":material/pause:", disabled=status.state == "cancelling", on_click=told(partial(jobs.cancel, run_id)))
        st.progress(share, text=words)
        points(read_points(run))


def ended(status: Status) -> None:
    """A sweep that is paused, failed or done, with what it found."""
    records = read_points(Store().get(status.id))
    with st.container(border=True, key="sweep-ended"):
        with st.container(horizontal=True, vertical_alignment="center"):
            badge = ":orange-badge[:material/pause: paused]" if status.state == "cancelled" else STATE_BADGES[status.state]
            st.markdown(f"{plain(status.title)} {badge} {_counted(records, status)}", width="stretch")
            if status.resumable:
                st.button("Resume", key="sweep-resume", icon=":material/play_arrow:", on_click=told(partial(jobs.resume, status.id)))
            if sweep_view.measured(records):
                st.button("Open in compare", key="sweep-compare", icon=":material/compare_arrows:", on_click=_turn)
        if status.error:
            st.error(error_markdown(*(status.error.get(name, "") for name in ("what", "why", "remedy"))))
        points(records, at_work=False)
    if st.session_state.pop("sweep-turn", False):
        turn_to("compare", tags=tag_of(status.id))


def _turn() -> None:
    st.session_state["sweep-turn"] = True


def _counted(records: Sequence[Mapping[str, Any]], status: Status) -> str:
    done = sum(record["state"] != "open" for record in records)
    return f"{done} of {counted(max(status.total, len(records)), 'recipe')}"


def points(records: Sequence[Mapping[str, Any]], at_work: bool = True) -> None:
    """What was measured so far, as a plot of size against divergence and as a table."""
    if not records:
        return
    front = front_of(list(records))
    known = sweep_view.measured(records)
    left, right = st.columns([4, 5], gap="medium") if known else (None, st.container())
    if left is not None:
        with left:
            _plot(known, front)
    with right:
        table = sweep_view.rows(records, front, at_work)
        height = min(TABLE_HEIGHT, 38 + 35 * len(records))
        st.dataframe(table, hide_index=True, height=height, column_config=CONFIG, key="sweep-table", placeholder="", alt="Recipes of the sweep")


def _plot(known: Sequence[Mapping[str, Any]], front: Sequence[str]) -> None:
    values = [(record["run"], record["figures"]["bytes"], record["figures"]["kl_mean"], record.get("predicted")) for record in known]
    chart = charts.kept("sweep", (values, list(front)), lambda: _figure(known, front))
    least = min(known, key=lambda record: record["figures"]["kl_mean"])
    alt = f"Divergence against stored size of {counted(len(known), 'recipe')}, {len(front)} on the front"
    alt += f"; the least divergence is {amount(least['figures']['kl_mean'])} nat"
    charts.show(chart, "sweep-chart", alt, {}, fold=False)


def _figure(known: Sequence[Mapping[str, Any]], front: Sequence[str]) -> go.Figure:
    chart = charts.figure(HEIGHT, "stored size, MB", "divergence, nat a token", log_y=True, legend=True)
    chart.update_layout(hovermode="closest")
    foretold = [record for record in known if record.get("predicted")]
    if foretold:
        _marks(chart, foretold, "foretold", [record["predicted"] for record in foretold], {"symbol": "x-thin-open", "size": 8, "color": DENSE_COLOUR})
    rest = [record for record in known if record["run"] not in front]
    best = sorted((record for record in known if record["run"] in front), key=lambda record: record["figures"]["bytes"])
    for name, records, marker in (
        ("behind", rest, {"symbol": "circle-open", "size": 9, "color": DENSE_COLOUR}),
        ("front", best, {"symbol": "diamond", "size": 10, "color": ACCENT}),
    ):
        _marks(chart, records, name, [record["figures"]["kl_mean"] for record in records], marker, "lines+markers" if name == "front" else "markers")
    chart.update_yaxes(exponentformat="power", title_standoff=14)
    return chart


def _marks(chart: go.Figure, records: Sequence[Mapping[str, Any]], name: str, y: list[float], marker: dict[str, Any], mode: str = "markers") -> None:
    if records:
        chart.add_scatter(
            x=[record["figures"]["bytes"] / 1e6 for record in records], y=y, text=[record["name"] for record in records], name=name, mode=mode,
            marker=marker, line={"color": ACCENT, "width": 2}, hovertemplate="%{text}<br>%{x:.4g} MB, %{y:.3g} nat<extra></extra>",
        )  # fmt: skip
