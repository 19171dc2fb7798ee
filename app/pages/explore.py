"""The main job on one page: see the model as a map, set its layers, compress it, watch what it loses. Wires pieces; computes nothing."""

import time
from collections.abc import Callable, Mapping

import streamlit as st

from bitpress.app import readings, state
from bitpress.app.ui import controls, live_panel, live_session, model_picker
from bitpress.app.ui.after_picture import after_picture, read_after
from bitpress.app.ui.answers import answers
from bitpress.app.ui.block_diagram import block_diagram, changed
from bitpress.app.ui.cache_controls import cache_controls
from bitpress.app.ui.equivalent import equivalent
from bitpress.app.ui.exceptions_table import exceptions_table
from bitpress.app.ui.layer_detail import layer_detail
from bitpress.app.ui.layer_map import layer_map, selected
from bitpress.app.ui.live_panel import POLL_SECONDS, told
from bitpress.app.ui.mask_picture import mask_picture, read_mask
from bitpress.app.ui.metric_cards import CARD_HEIGHT, cards
from bitpress.app.ui.notices import error_markdown, guarded, tell_notice
from bitpress.app.ui.overlays import OVERLAYS, Picture, cells_of, legend_of, missing_reason, scale_of, selection_parts
from bitpress.app.ui.rank_search_view import rank_search
from bitpress.app.ui.recipe_menu import recipe_menu
from bitpress.app.ui.run_view import RunView
from bitpress.app.ui.shape_controls import shape_controls
from bitpress.app.ui.side_by_side import side_by_side
from bitpress.app.ui.sidebar import sidebar
from bitpress.app.ui.why_speed import why_speed
from bitpress.engine.errors import BitpressError
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Scheme
from bitpress.engine.runs import jobs
from bitpress.engine.runs.status import Status
from bitpress.engine.runs.store import Run

PUMP_SECONDS = 2.0
KEYS = "Arrow keys move, space selects, shift and arrows extend, Escape clears."


def explore() -> None:
    """The page."""
    tell_notice()
    with st.sidebar:
        sidebar()
    anatomy = model_picker.ready_anatomy()
    state.write_link()
    if anatomy is None:
        return
    pump_sometimes()
    run = current_run(anatomy)
    status = run.status() if run else None
    working = status is not None and status.active
    st.session_state["drawn-selection"] = selected(state.MAP)
    asking = live_session.follow(anatomy)
    every = POLL_SECONDS if working else None
    part(head, live_session.POLL_SECONDS if asking else every)(anatomy, run, working, asking)
    live_session.toggle(anatomy)
    settings(anatomy, run)
    st.fragment(outcome, run_every=every)(run, working)  # always a fragment: its panes would be built anew, and jump, if it became one
    equivalent(state.session().recipe)


def part(draw: Callable[..., None], every: float | None) -> Callable[..., None]:
    """A part of the page that redraws itself while a job works, and is plain otherwise."""
    return st.fragment(draw, run_every=every) if every else draw


def pump_sometimes() -> None:
    """Let the queue move on, a few times a minute rather than at every redraw."""
    if time.monotonic() - st.session_state.get("pumped", 0.0) > PUMP_SECONDS:
        st.session_state["pumped"] = time.monotonic()
        jobs.pump()


def current_run(anatomy: Anatomy) -> Run | None:
    """The run to show: the one that is followed, else the newest at work on this model, else the one that measured this recipe."""
    run = state.followed_run()
    if run is None:
        job = readings.open_job(state.session().model)
        run = readings.run_of(job) if job else None
        state.follow(run.id if run else None)
    return run or readings.measured_run(state.session().recipe, anatomy) or readings.recorded_run(state.session().recipe, state.session().preset)


def head(anatomy: Anatomy, run: Run | None, was_working: bool, was_asking: bool) -> None:
    """Cards, engine and map: what a job or a live session changes above the settings."""
    if was_asking and not live_session.follow(anatomy):
        st.rerun()
    status, view = look(run, was_working)
    recipe = state.session().recipe
    prediction = readings.predict(recipe, anatomy)
    problems = readings.problems_of(recipe, anatomy, prediction)
    left, right = st.columns([3, 1])
    with left:
        cards(answers(recipe, anatomy, prediction, status, run, view), "answers", state.session().edits)
    with right, st.container(border=True, height=CARD_HEIGHT, gap="small"):
        engine(anatomy, status, run, view, [str(problem) for problem in problems])
    if prediction.size is not None:
        draw_map(anatomy, status, run, view)
    else:
        st.error(error_markdown("This recipe does not fit the model.", "; ".join(map(str, problems[:3])), "Undo, or correct its lines below."))
    if was_working and selected(state.MAP) != st.session_state["drawn-selection"]:
        st.rerun()


def look(run: Run | None, was_working: bool) -> tuple[Status | None, RunView]:
    """The run's record and view as of now. When it has ended or begun again since the page was drawn, the whole page is drawn again."""
    if run is None:
        return None, RunView()
    pump_sometimes()
    status, view = readings.status_of(run), live_panel.view_of(run)
    if was_working != status.active:
        st.rerun()
    return status, view


def engine(anatomy: Anatomy, status: Status | None, run: Run | None, view: RunView, problems: list[str]) -> None:
    """What the engine does, and the one button that matters: Compress, or Cancel in its place."""
    if status is not None and status.active and run is not None:
        live_panel.engine_state(status, view)
        stopping = status.state == "cancelling"
        st.button(
            "Cancelling" if stopping else "Cancel",
            key="cancel",
            on_click=told(lambda: jobs.cancel(run.id)),
            disabled=stopping,
            width="stretch",
            icon=":material/stop:",
        )
        return
    live_panel.engine_state(None, None)
    st.button(
        "Compress",
        key="compress",
        type="primary",
        on_click=compress,
        args=(anatomy,),
        disabled=bool(problems),
        width="stretch",
        shortcut="Ctrl+Enter",
        icon=":material/compress:",
        help="\n\n".join(problems[:4]) or None,
    )
    if problems:
        st.caption(f":orange[{problems[0]}]")
    elif run is None:
        st.caption("Press Compress: every layer is packed and measured against the dense model.")
    elif readings.is_recording(run):
        st.caption("These figures were recorded. Press Compress to pack every layer and measure it on this machine.")
    elif status is not None and status.resumable:
        st.caption("The run below stopped before its end. Resume goes on from its finished layers; Compress starts afresh.")
    elif status is not None and readings.same_work(run, state.session().recipe):
        st.button("Run again", key="again", type="tertiary", on_click=told(submit), help="This recipe was measured already; its figures stand in the cards.")
    else:
        st.caption("The recipe has changed since the run below.")


def compress(anatomy: Anatomy) -> None:
    """Start the run, or turn to the one that has done just this before."""
    try:
        done = readings.measured_run(state.session().recipe, anatomy)
        if done is not None:
            state.follow(done.id)
            st.toast("Same recipe, model and text: here is the stored run.", icon=":material/inventory_2:")
        else:
            submit()
        state.session().notice = None
    except BitpressError as error:
        state.session().notice = error


def submit() -> None:
    """Put the recipe in the queue and follow it."""
    recipe = state.session().recipe
    state.follow(jobs.submit_once("compress", {"model": recipe.model}, recipe).id)


def draw_map(anatomy: Anatomy, status: Status | None, run: Run | None, view: RunView) -> None:
    """The overlay picker and the map."""
    recipe, overlay = state.session().recipe, overlay_picker()
    mine = run is not None and readings.same_work(run, recipe)
    packing = mine and status is not None and status.active and not view.windows
    scores, score_name = readings.sensitivity_of(anatomy) if overlay == "sensitivity" else ({}, "")
    known = readings.predict(recipe, anatomy)
    picture = Picture(
        anatomy, recipe, known.schemes, known.size, view.errors() if mine else {}, scores, score_name,
        done=frozenset(view.layers) if packing else None, fresh=frozenset(view.fresh) if packing else frozenset(),
    )  # fmt: skip
    label = f"Layer map of {anatomy.model}: {anatomy.blocks} blocks by {len(anatomy.roles)} roles, coloured by {overlay}. {KEYS}"
    layer_map(cells_of(picture, overlay), state.MAP, label=label, legend=legend_of(picture, overlay), scale=scale_of(overlay))
    if reason := missing_reason(picture, overlay):
        st.caption(reason)
    decided = run.decided_recipe() if run is not None and mine else None
    if changed(decided or recipe):
        block_diagram(decided or recipe, anatomy)


def overlay_picker() -> str:
    """What colours the map; kept while the person goes to other pages."""
    chosen = st.session_state.setdefault("overlay", OVERLAYS[0])
    st.session_state["overlay"] = chosen
    st.segmented_control("Colour the map by", OVERLAYS, required=True, key="overlay", format_func=str.capitalize, label_visibility="collapsed")
    return st.session_state["overlay"] or OVERLAYS[0]


def settings(anatomy: Anatomy, run: Run | None) -> None:
    """The controls of the selection, the recipe's own row, and the layer or the lines beside them."""
    with st.container(border=True, key="settings"):
        recipe_menu(anatomy)
        controls.scope_picker(anatomy)
        schemes = readings.predict(state.session().recipe, anatomy).schemes
        left, right = st.columns(2, gap="large")
        with left:
            controls.weight_controls(anatomy, schemes)
            controls.sparsity_controls(anatomy, schemes)
            controls.rank_controls(anatomy, schemes)
        with right:
            controls.end_controls(anatomy)
            controls.protect_controls(anatomy)
            controls.drop_controls(anatomy)
        shape = st.expander("Heads, neurons and depth", key="shape", on_change="rerun")
        if shape.open:
            with shape:
                shape_controls(anatomy)
        cache = st.expander("KV cache", key="cache", on_change="rerun")
        if cache.open:
            with cache:
                cache_controls(anatomy)
        search = st.expander("Search for ranks", key="search-box", on_change="rerun")
        if search.open:
            with search:
                rank_search(anatomy.model)
        # Drawn when it is opened, as the table is the slowest widget of the page.
        lines = st.expander("Lines of the recipe", key="lines", on_change="rerun")
        if lines.open:
            with lines:
                st.caption("Later lines win. Edit a cell, add a line below, or select lines to delete them.")
                exceptions_table(anatomy)
    from_near(anatomy, schemes, run)


def from_near(anatomy: Anatomy, schemes: Mapping[str, Scheme], run: Run | None) -> None:
    """The one layer that is selected, under the settings so that they stay where they are."""
    names = selection_parts(selected(state.MAP), anatomy)["linears"]
    if len(names) == 1:
        with st.container(border=True, key="detail-box"):
            layer_detail(anatomy.model, anatomy.by_name[names[0]], schemes.get(names[0]), key="detail")
            after = read_after(run.path, names[0]) if run is not None else None
            if after is not None:
                after_picture(after, key="after")
            record = read_mask(run.path, names[0]) if run is not None else None
            if record is not None:
                mask_picture(record, key="mask")
    else:
        st.caption("Select one layer on the map to see its weights, its error against bits and its spectrum.")


def outcome(run: Run | None, was_working: bool) -> None:
    """The live panel, where a token's time goes, and the generations of the run."""
    status, view = look(run, was_working)
    if run is None or status is None:
        return
    live_panel.live_panel(run, status, view)
    why_speed(run, view.metrics, readings.is_recording(run))
    side_by_side(run, status, view)


with guarded():
    explore()
