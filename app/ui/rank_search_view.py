"""A search for ranks: what to ask for, and every allocation tried as a point that lands while the worker goes on. Knows runs; searches nothing."""

from functools import partial
from typing import Any

import plotly.graph_objects as go
import streamlit as st

from bitpress.app import state
from bitpress.app.ui import charts
from bitpress.app.ui.live_panel import STATE_BADGES, told
from bitpress.app.ui.numbers import amount
from bitpress.app.ui.theme import ACCENT, DENSE_COLOUR
from bitpress.engine.errors import InputError
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs import jobs
from bitpress.engine.runs.store import Run, Store

POLL_SECONDS = 1.0
FOLLOWED = "rank-search-run"
KINDS = {"5x1": "One share a role", "5x4": "One a role and quarter"}
Trials = list[dict[str, Any]]


def rank_search(model: str) -> None:
    """The form, and the search that was started last in this tab."""
    left, middle, right = st.columns(3, vertical_alignment="bottom", gap="medium")
    left.slider("Parameters taken away, %", 5, 60, 20, step=5, key="search-removed", help="Of the block linears; values stay whole (Bolaco).")
    middle.segmented_control("Shares", list(KINDS), default="5x1", required=True, key="search-kind", format_func=KINDS.get)
    right.number_input("Allocations to try", 2, 400, 50, key="search-count", help="The first two are the start of the paper and an even share.")
    st.button("Search for ranks", key="search", icon=":material/travel_explore:", on_click=told(partial(_start, model)))
    run = followed()
    if run is not None:
        active = run.status().active
        (st.fragment(_search, run_every=POLL_SECONDS) if active else _search)(run.id, active)


def _start(model: str) -> None:
    asked = {"model": model, "removed": st.session_state["search-removed"] / 100, "search": st.session_state["search-kind"]}
    run = jobs.submit_once("ranks", {**asked, "evaluations": int(st.session_state["search-count"]), "text": "auto", "seed": 0})
    st.session_state[FOLLOWED] = run.id


def followed() -> Run | None:
    """The search that this tab follows."""
    try:
        return Store().get(st.session_state[FOLLOWED]) if FOLLOWED in st.session_state else None
    except InputError:  # it was deleted meanwhile
        return None


def _search(run_id: str, was_active: bool) -> None:
    run = Store().get(run_id)
    if was_active:
        jobs.pump()
    status = run.status()
    if was_active and not status.active:
        st.rerun()
    st.markdown(f"**Run {run.id}** {STATE_BADGES[status.state]}")
    trials_chart(run)
    result = run.result()
    if result:
        st.button("Use the best ranks", key="search-use", type="primary", on_click=told(partial(_use, result["recipe"])))
    elif status.active:
        st.button("Cancel", key="search-cancel", icon=":material/stop:", disabled=status.state == "cancelling", on_click=told(partial(jobs.cancel, run.id)))


def _use(recipe: dict[str, Any]) -> None:
    state.edit(Recipe.from_dict(recipe))


# --- the trials ---------------------------------------------------------------------------------------------------


def trials_chart(run: Run) -> None:
    """Every allocation tried so far: its objective by number, and the best so far."""
    trials = trials_of(run)
    if not trials:
        st.skeleton(height=charts.HEIGHT)
        st.caption("A point lands here for each allocation tried; the statistics of the layers are taken first.")
        return
    best = min(range(len(trials)), key=lambda index: trials[index]["objective"])
    ratios = trials[best]["ratios"]
    shares = ", ".join(f"{name.removesuffix('-0')} {ratio:.0%}" for name, ratio in ratios.items()) if all(name.endswith("-0") for name in ratios) else ""
    words = f"Best of {len(trials)}: {amount(trials[best]['objective'])} nats a token, number {best + 1}"
    chart = charts.kept(f"trials-{run.id}", trials, lambda: trials_figure(trials))
    charts.show(chart, f"trials-{run.id}", f"Objective of {len(trials)} allocations of ranks. {words}", trials_table(trials), note=f"{words}. {shares}")


def trials_of(run: Run) -> Trials:
    """What a search has told of its trials; sweeps tell other things under the same name."""
    return [dict(event.data) for event in run.events() if event.kind == "trial" and "objective" in event.data]


def best_so_far(trials: Trials) -> list[float]:
    """The least objective up to each trial."""
    found: list[float] = []
    for trial in trials:
        found.append(min([trial["objective"], *found[-1:]]))
    return found


def trials_figure(trials: Trials) -> go.Figure:
    """Points, hollow where the text was not read to its end, and a line of the best."""
    chart = charts.figure(x="allocation, in order", y="objective, nats a token", legend=True)
    numbers = list(range(1, len(trials) + 1))
    for name, symbol, whole in (("read to the end", "circle", True), ("given up half way", "circle-open", False)):
        chosen = [number for number in numbers if (trials[number - 1]["read"] >= 1) == whole]
        if chosen:
            points = [trials[number - 1] for number in chosen]
            hover = ["<br>".join(f"{role} {ratio:.0%}" for role, ratio in point["ratios"].items()) for point in points]
            chart.add_scatter(x=chosen, y=[point["objective"] for point in points], name=name, mode="markers", customdata=hover,
                              marker={"symbol": symbol, "size": 9, "color": ACCENT}, hovertemplate="%{y:.3f}<br>%{customdata}<extra></extra>")  # fmt: skip
    charts.line(chart, numbers, best_so_far(trials), "best so far", DENSE_COLOUR, dash="dash")
    chart.update_layout(hovermode="closest")
    return chart


def trials_table(trials: Trials) -> charts.Table:
    """A row a trial."""
    roles = list(trials[0]["ratios"])
    columns = {"objective": [trial["objective"] for trial in trials], "perplexity": [trial["perplexity"] for trial in trials]}
    return {"number": list(range(1, len(trials) + 1)), **columns, **{role: [trial["ratios"].get(role) for trial in trials] for role in roles}}
