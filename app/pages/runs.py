"""The queue and the history: what works, what waits, what came of the rest, and everything that can be done to a run. Wires pieces."""

import json
from functools import partial

import streamlit as st

from bitpress.app import state
from bitpress.app.ui.commands import show_commands
from bitpress.app.ui.live_panel import LOG_LINES, STATE_BADGES, progress_line, told
from bitpress.app.ui.notices import empty, error_markdown, guarded, plain, show_error, tell_notice
from bitpress.app.ui.numbers import TIMES
from bitpress.app.ui.rank_search_view import trials_chart
from bitpress.app.ui.run_list import KIND_WORDS, MAIN_KINDS, STATE_WORDS, Filter, Row, progress_of, row_of, rows_of, sentence, table, times_of
from bitpress.app.ui.run_names import plan_of_run, short_id
from bitpress.app.ui.run_view import RunView
from bitpress.app.ui.similarity_view import similarity_charts
from bitpress.app.ui.turn import turn_to
from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.runs import jobs
from bitpress.engine.runs.status import Status
from bitpress.engine.runs.store import Run, Store

POLL_SECONDS = 1.0
LISTED = 2000
HISTORY = "history"
HISTORY_HEIGHT = 430
CONFIG = {
    "size, MB": st.column_config.NumberColumn(format="%.3g"),
    "smaller": st.column_config.NumberColumn(format=f"%.3g{TIMES}"),
    "perplexity": st.column_config.NumberColumn(format="%.3g"),
    "change, %": st.column_config.NumberColumn(format="%+.3g", help="Of the perplexity, against dense on the same windows"),
    "tokens/s": st.column_config.NumberColumn(format="%.3g", help="Decode, batch 1, measured on packed weights"),
    "faster": st.column_config.NumberColumn(format=f"%.3g{TIMES}"),
    "took, s": st.column_config.NumberColumn(format="%.3g"),
}


def runs() -> None:
    """The page."""
    tell_notice()
    jobs.pump()
    queue()
    statuses = Store().list(limit=LISTED)
    if not statuses:
        empty("No run yet. Choose a model and a preset on the explore page and press Compress; the run appears here and stays.")
        return
    chosen = history(statuses)
    if chosen is not None:
        detail(chosen)
    show_commands(
        "bitpress runs --json",
        "from bitpress.engine.runs.store import Store\n\nfor status in Store().list():\n    print(status.id, status.state, status.title)",
    )


# --- the queue ----------------------------------------------------------------------------------------------------


def queue() -> None:
    """What works and waits, each with its Cancel. It redraws itself only while there is something in it."""
    active = jobs.active()
    draw = st.fragment(queue_body, run_every=POLL_SECONDS) if active else queue_body
    draw({status.id for status in active})


def queue_body(drawn: set[str]) -> None:
    """One line a run. When a run has ended or begun, the whole page is drawn again, so that the history is right."""
    if drawn:
        jobs.pump()
    active = jobs.active()
    if drawn and {status.id for status in active} != drawn:
        st.rerun()
    st.subheader(f"Now: {_counted(active)}", anchor=False)
    for status in active:
        queue_line(status)


def _counted(active: list[Status]) -> str:
    """How many work and how many wait."""
    waiting = sum(status.state == "queued" for status in active)
    parts = [f"{len(active) - waiting} at work" if len(active) > waiting else "", f"{waiting} waiting" if waiting else ""]
    return ", ".join(part for part in parts if part) or "nothing is running"


def queue_line(status: Status) -> None:
    """State, name, progress, Cancel."""
    with st.container(border=True, key=f"queue-{status.id}"):
        name, progress, action = st.columns([5, 5, 2], vertical_alignment="center")
        name.markdown(f"{STATE_BADGES[status.state]} **{plain(plan_of_run(status))}** · {plain(status.model or '')}  \n:small[{plain(progress_of(status))}]")
        share, words = progress_line(status, RunView())
        progress.progress(0.0 if status.state == "queued" else share, text="Waiting for the run before it" if status.state == "queued" else words)
        stopping = status.state == "cancelling"
        action.button(
            "Cancelling" if stopping else "Cancel",
            key=f"cancel-{status.id}",
            disabled=stopping,
            icon=":material/stop:",
            width="stretch",
            on_click=told(partial(jobs.cancel, status.id)),
        )


# --- the history --------------------------------------------------------------------------------------------------


def history(statuses: list[Status]) -> Row | None:
    """Filter and table; gives the run that is chosen, by a click or by the link."""
    st.subheader("History", anchor=False)
    wanted = filters()
    rows = rows_of(statuses, wanted)
    st.caption(f"{len(rows)} of {len(statuses)} runs. Select a row to open it, a heading to sort.")
    if not rows:
        empty("No run matches the filter.")
    else:
        shown = table(rows)
        st.dataframe(shown, key=HISTORY, hide_index=True, height=min(HISTORY_HEIGHT, 38 + 35 * len(rows)), column_config=CONFIG, selection_mode="single-row",
                     on_select=partial(_row_selected, shown["run"]), alt="Runs, the newest first", placeholder="")  # fmt: skip
    return _chosen()


def filters() -> Filter:
    """Kind, state and words; part of the link."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        kinds = st.pills(
            "Kind", list(KIND_WORDS), selection_mode="multi", default=list(MAIN_KINDS), key="kinds", format_func=KIND_WORDS.get, bind="query-params"
        )
        text = st.text_input("Words", key="words", placeholder="plan, model, machine or id", bind="query-params", width=260)
    states = st.pills("State", list(STATE_WORDS), selection_mode="multi", key="states", bind="query-params")
    return Filter(tuple(kinds or ()), tuple(states or ()), text or "")


def _row_selected(ids: list[str]) -> None:
    chosen = st.session_state[HISTORY]["selection"]["rows"]
    if chosen:
        st.query_params["run"] = ids[chosen[0]]
    else:
        st.query_params.pop("run", None)


def _chosen() -> Row | None:
    asked = st.query_params.get("run")
    if not asked:
        return None
    try:
        status = Store().get(asked).status()
    except InputError as error:
        show_error(error)
        return None
    return row_of(status, plan_of_run(status))


# --- one run ------------------------------------------------------------------------------------------------------


def detail(row: Row) -> None:
    """Everything about the chosen run, and what can be done to it."""
    status, run = row.status, Store().get(row.status.id)
    with st.container(border=True, key="run-detail"):
        st.markdown(f"**{plain(row.title)}** · {plain(status.model or '')} {STATE_BADGES[status.state]}")
        st.caption(plain(times_of(status)))
        if said := sentence(row):
            st.markdown(plain(said))
        trouble(status)
        actions(run, status)
        recipe, alike, machine, log = st.tabs(["Recipe", "Trials" if status.kind == "ranks" else "Tokens", "Machine", "Log"])
        with recipe:
            _recipe(run)
        with alike:
            trials_chart(run) if status.kind == "ranks" else similarity_charts(run)
        with machine:
            st.json(run.env() or {"machine": "The worker has not begun yet."}, expanded=1)
        with log:
            st.code(run.log_tail(LOG_LINES) or "Nothing was printed.", language=None, height=220)


def trouble(status: Status) -> None:
    """What went wrong, why, and what helps."""
    if status.state == "failed":
        error = status.error or {}
        show_error(BitpressError(error.get("what") or "The run failed.", error.get("why", ""), error.get("remedy") or "The log below has the details."))
    if status.state == "interrupted":
        st.warning(
            error_markdown("The worker stopped before the end.", "Its process is gone; finished layers are kept.", "Resume goes on from them."),
            icon=":material/power_off:",
        )
    if status.state == "cancelled":
        st.info("Cancelled. Finished layers are kept; Resume goes on from them.", icon=":material/cancel:")


def actions(run: Run, status: Status) -> None:
    """Buttons for what this run allows."""
    with st.container(horizontal=True):
        if status.kind == "compress":
            st.button("Open on explore", key="open", type="primary", icon=":material/open_in_new:", on_click=_turn_to, args=(run,))
        if status.resumable:
            st.button("Resume", key="resume", icon=":material/play_arrow:", on_click=told(partial(jobs.resume, run.id)))
        if status.active:
            stopping = status.state == "cancelling"
            st.button(
                "Cancelling" if stopping else "Cancel",
                key="cancel-chosen",
                icon=":material/stop:",
                disabled=stopping,
                on_click=told(partial(jobs.cancel, run.id)),
            )
        elif status.kind != "desk":
            st.button(
                "Run again",
                key="again",
                icon=":material/replay:",
                on_click=told(partial(again, run, status)),
                help="The same work as a new run; this one stays as it is.",
            )
        _downloads(run)
    if st.session_state.pop("turn-to-explore", False):
        turn_to("explore")


def _turn_to(run: Run) -> None:
    state.open_run(run)
    st.session_state["turn-to-explore"] = True


def again(run: Run, status: Status) -> None:
    """Put the same request in the queue once more, and choose the new run."""
    made = jobs.submit(status.kind, run.request().get("args", {}), run.recipe(), title=status.title)
    st.query_params["run"] = made.id


def _downloads(run: Run) -> None:
    """Recipe and metrics as files."""
    recipe, metrics = run.recipe(), run.metrics()
    if recipe is not None:
        st.download_button(
            "Recipe", recipe.to_yaml(), f"recipe-{short_id(run.id)}.yaml", "application/yaml", key="recipe-file", icon=":material/download:", on_click="ignore"
        )
    if metrics is not None:
        st.download_button(
            "Metrics",
            json.dumps(metrics, indent=1),
            f"metrics-{run.id}.json",
            "application/json",
            key="metrics-file",
            icon=":material/download:",
            on_click="ignore",
        )


def _recipe(run: Run) -> None:
    recipe = run.recipe()
    if recipe is None:
        st.json(run.request(), expanded=2)
    else:
        st.code(recipe.to_yaml(), language=None, height=220)


with guarded():
    runs()
