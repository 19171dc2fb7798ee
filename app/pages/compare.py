"""Any number of runs beside each other: a pinned baseline, the Pareto front, what differs, and what a person says of each. Wires pieces."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import streamlit as st

from bitpress.app import state
from bitpress.app.ui import compare_charts as charts
from bitpress.app.ui import compare_view as view
from bitpress.app.ui import model_picker
from bitpress.app.ui.commands import show_commands
from bitpress.app.ui.compare_labels import empty_old_bin, label_box, undo_deletion
from bitpress.app.ui.layer_map import layer_map
from bitpress.app.ui.notices import empty, guarded, plain, tell_notice
from bitpress.app.ui.numbers import counted
from bitpress.app.ui.theme import CHANGE
from bitpress.app.ui.turn import turn_to
from bitpress.engine.errors import BitpressError
from bitpress.engine.runs.store import Store

TABLE = "compare-table"
PARETO = "pareto"
DENSE = "dense"
MAP = "compare-map"
TABLE_HEIGHT = 400
MOST_TEXTS = 4


def compare() -> None:
    """The page."""
    tell_notice()
    state.write_link()
    st.subheader("Compare", anchor=False)
    model = state.session().model
    statuses = [status for status in Store().list(kind="compress", state="finished", limit=view.MOST_RUNS) if status.model == model]
    empty_old_bin()
    everything = view.entries_of(statuses)
    undo_deletion()
    entries = filtered(everything)
    if not everything:
        empty("Nothing to compare yet: no finished run of this model. Press Compress on the explore page, or Verify on the autotune page.")
        return
    base = baseline(everything, model)
    chosen = run_table(entries, base)
    front_box(entries, everything)
    differences(chosen if len(chosen) > 1 else entries, base, everything)
    show_commands(
        "bitpress runs --kind compress --json",
        'from bitpress.engine.runs.store import Store\n\nfor status in Store().list(kind="compress"):\n    print(status.id, Store().get(status.id).metrics())',
    )


# --- which runs ---------------------------------------------------------------------------------------------------


def filtered(entries: Sequence[view.Entry]) -> list[view.Entry]:
    """Words, tags, stars, and what is out of sight; all part of the link."""
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        words = st.text_input("Words", key="words", placeholder="plan, tag, note or id", bind="query-params", width=240) or ""
        tags = sorted({tag for entry in entries for tag in entry.labels.tags})
        wanted = st.pills("Tags", tags, selection_mode="multi", key="tags", bind="query-params") if tags else []
        starred = st.toggle("Starred only", key="starred", bind="query-params")
        archived = st.toggle("Archived too", key="archived", bind="query-params")
    return view.sieved(entries, words, tuple(wanted or ()), bool(starred), bool(archived))


def baseline(entries: Sequence[view.Entry], model: str) -> view.Entry | None:
    """What differences are taken to: the dense model unless a run is pinned."""
    dense = view.dense_of(model, entries)
    known = {entry.id: entry for entry in [*([dense] if dense else []), *entries]}
    name = st.selectbox("Baseline", list(known), format_func=lambda name: "Dense model" if name == DENSE else view.title_of(known[name]), key="base",
                        bind="query-params", help="Pinned as the first row; every difference is to it.")  # fmt: skip
    return known.get(name)


def run_table(entries: Sequence[view.Entry], base: view.Entry | None) -> list[view.Entry]:
    """The runs with signed differences; gives those that are selected."""
    rows = view.table(entries, base, view.SHORT)
    others = st.column_config.NumberColumn(format="%.4g")
    config: dict[str, Any] = {view.heading(name): others for name in view.SHORT}
    config["star"] = st.column_config.TextColumn("★", width=36)
    config["run"] = st.column_config.TextColumn("run", width=150)
    st.caption(
        f"{counted(len(entries), 'run')}. ▲ better, ▽ worse than the baseline; quality is compared on the same text only. Select rows to go on with them."
    )
    st.dataframe(charts.coloured(rows), key=TABLE, hide_index=True, height=min(TABLE_HEIGHT, 56 + 35 * len(rows["run"])), column_config=config,
                 selection_mode="multi-row", on_select="rerun", placeholder="", alt="Runs with their figures and differences to the baseline")  # fmt: skip
    picked = st.session_state[TABLE]["selection"]["rows"] if TABLE in st.session_state else []
    ids = [rows["run"][row] for row in picked if row < len(rows["run"])]
    chosen = [entry for entry in entries if entry.id in ids]
    if chosen:
        label_box(chosen)
    return chosen


# --- the Pareto front ---------------------------------------------------------------------------------------------


def front_box(entries: Sequence[view.Entry], everything: Sequence[view.Entry]) -> None:
    """Axes, constraints, the plot; a click on a point offers its recipe."""
    st.markdown("**Pareto front**", help="A run is on the front when no other is at least as good in both and better in one.")
    names = [name for name in view.QUANTITIES if any(entry.get(name) is not None for entry in entries)]
    if len(names) < 2:
        st.caption("These runs measured too little for a plot.")
        return
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        title = lambda name: view.QUANTITIES[name].title  # noqa: E731
        x = st.selectbox("Across", names, index=_index(names, "size"), format_func=title, key="x", bind="query-params", width=210)
        y = st.selectbox("Up", names, index=_index(names, "perplexity"), format_func=title, key="y", bind="query-params", width=210)
        dominated = st.toggle("Dominated too", value=True, key="dominated", bind="query-params")
        with st.popover("Constraints", icon=":material/filter_alt:"):
            limits = constraints(entries, names)
    x, y = (name if name in names else names[0] for name in (x, y))  # a link may say anything
    if x == y:
        st.info("Choose two different quantities.")
        return
    placed = view.placed(view.allowed(entries, limits), x, y)
    if not placed:
        st.info("No run is within these constraints. Loosen one.", icon=":material/filter_alt:")
        return
    front = view.front(placed, x, y)
    best = view.knee(front, x, y)
    curve = view.uniform_curve(view.placed(everything, x, y, placed[0].protocol), x, y)
    shown = placed if dominated else front
    event = st.plotly_chart(charts.pareto_figure(shown, front, best, curve, x, y), key=PARETO, on_select="rerun", selection_mode="points",
                            alt=charts.pareto_alt(shown, front, best, x, y), config={"displayModeBar": False})  # fmt: skip
    left_out = len(view.allowed(entries, limits)) - len(placed)
    st.caption(charts.pareto_note(front, best, x, y) + (f" {counted(left_out, 'run')} left out, for want of a figure or for another text." if left_out else ""))
    picked(event, placed, best)
    charts.pareto_twin(placed, front, best, x, y)


def _index(names: Sequence[str], wanted: str) -> int:
    return names.index(wanted) if wanted in names else 0


def constraints(entries: Sequence[view.Entry], names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """A slider for every quantity that differs; those that were not moved do not count."""
    found = {}
    for name in names:
        ends = view.span(entries, name)
        if ends is None:
            continue
        low, high = st.slider(view.heading(name), *ends, ends, key=f"within-{name}")
        if (low, high) != ends:
            found[name] = (low, high)
    if not found:
        st.caption("Move an end to leave runs out.")
    return found


def picked(event: Any, placed: Sequence[view.Entry], best: view.Entry | None) -> None:
    """The run that was clicked, or the knee: open its recipe."""
    ids = [str(point["customdata"][0]) for point in event["selection"]["points"] if point.get("customdata")] if event else []
    entry = next((entry for entry in placed if entry.id in ids), None)
    with st.container(horizontal=True, vertical_alignment="center"):
        for label, key, found in (("Open its recipe", "open-picked", entry), ("Open the knee", "open-knee", best)):
            if found is not None and found.id != DENSE:
                st.button(label, key=key, icon=":material/open_in_new:", on_click=partial(_open, found.id))
        if entry is not None:
            st.markdown(f"{plain(view.title_of(entry))}: " + plain(view.line_of(entry)), width="content")
        else:
            st.caption("Click a point to see its run and to load its recipe.", width="content")
    if st.session_state.pop("compare-turn", False):
        turn_to("explore")


def _open(run_id: str) -> None:
    try:
        state.open_run(Store().get(run_id))
        st.session_state["compare-turn"] = True
    except BitpressError as error:
        state.session().notice = error


# --- what differs -------------------------------------------------------------------------------------------------


def differences(entries: Sequence[view.Entry], base: view.Entry | None, everything: Sequence[view.Entry]) -> None:
    """Parallel coordinates, small panels, the layers of two runs, and the same prompt by several."""
    draws = {
        "All figures at once": lambda: charts.parallel(entries),
        "Figure by figure": lambda: charts.small_multiples(entries, base),
        "Layers of two runs": lambda: layer_difference(everything),
        "Same prompt": lambda: same_prompt(entries),
    }
    for tab, draw in zip(st.tabs(list(draws), key="views", on_change="rerun", bind="query-params"), draws.values(), strict=True):
        if tab.open:  # what is not looked at is not drawn: each costs a page of many runs its quickness
            with tab:
                draw()


def layer_difference(entries: Sequence[view.Entry]) -> None:
    """Bits of the second run less those of the first, layer by layer."""
    anatomy = model_picker.ready_anatomy()
    known = {entry.id: view.title_of(entry) for entry in entries}
    if anatomy is None or len(known) < 2:
        st.caption("Two finished runs of this model are needed.")
        return
    with st.container(horizontal=True):
        first = st.selectbox("From", list(known), index=1, format_func=known.get, key="from", bind="query-params")
        second = st.selectbox("To", list(known), index=0, format_func=known.get, key="to", bind="query-params")
    first, second = (name if name in known else next(iter(known)) for name in (first, second))
    before, after = Store().get(first).recipe(), Store().get(second).recipe()
    if before is None or after is None:
        st.caption("One of them has no recipe.")
        return
    cells, changed = view.difference_cells(anatomy, before, after)
    label = f"Difference of two runs as a map: {changed} of {len(anatomy.linears)} matrices differ"
    layer_map(cells, MAP, label=label, legend=view.difference_legend(), scale=CHANGE)
    st.caption(f"{changed} of {len(anatomy.linears)} matrices differ. Numbers are bits a weight, second less first; blue is fewer, orange is more.")


def same_prompt(entries: Sequence[view.Entry]) -> None:
    """What several runs wrote on one prompt."""
    written = {entry.id: view.texts_of(entry.id) for entry in entries[: 4 * MOST_TEXTS]}
    prompts = list(dict.fromkeys(prompt for texts in written.values() for prompt in texts))
    if not prompts:
        st.caption("None of these runs wrote samples. The generate page asks any run anything.")
        return
    prompt = st.selectbox("Prompt", prompts, key="prompt")
    having = [entry for entry in entries if prompt in written.get(entry.id, {})][:MOST_TEXTS]
    for column, entry in zip(st.columns(len(having)), having, strict=True):
        with column, st.container(border=True):
            st.markdown(f"**{plain(view.title_of(entry))}**")
            st.markdown(plain(written[entry.id][prompt]))
    if len(entries) > len(having):
        st.caption(f"The first {len(having)} of {len(entries)} runs; select rows above to choose others.")


with guarded():
    compare()
