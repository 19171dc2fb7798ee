"""Which layers suffer most from which option: measure once, look, click, edit the recipe. Wires pieces; computes nothing."""

from functools import partial

import streamlit as st

from bitpress.app import state
from bitpress.app.ui import model_picker
from bitpress.app.ui import sensitivity_view as view
from bitpress.app.ui.commands import show_commands
from bitpress.app.ui.layer_detail import layer_detail
from bitpress.app.ui.layer_map import layer_map, select, selected
from bitpress.app.ui.live_panel import POLL_SECONDS, STATE_BADGES, told
from bitpress.app.ui.notices import guarded, tell_notice
from bitpress.app.ui.numbers import amount, duration, whole
from bitpress.app.ui.sensitivity_read import Measured, measured_of, past_rates
from bitpress.app.ui.theme import HARM
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import BITS
from bitpress.engine.runs import jobs
from bitpress.engine.runs.status import Status
from bitpress.engine.runs.store import Store
from bitpress.engine.sensitivity_file import OPTIONS, QUICK_KINDS

MAP = "sensitivity-map"
TABLE = "sensitivity-table"
KINDS = {
    "data_free": "Weights only", "activation": "Weighted by activations", "fisher": "Divergence, estimated",
    "loss": "What budgets spend by", "kl": "Divergence, measured", "kl_without": "Left dense, measured",
}  # fmt: skip
KIND_HELP = (
    "Weights only: squared error of the weights themselves over their squared size; no text needed. Weighted by activations: the same with each input "
    "weighted by its mean square on calibration text. Divergence: KL divergence of the model's predictions from the dense model's, in nats a token, with this "
    "layer alone changed: estimated to second order from one backward, or measured layer by layer. What budgets spend by: the estimate, but the few layers "
    "that it cannot tell are measured among changed ones. Left dense: how much divergence is saved by leaving "
    "this layer dense when all others are changed. None of them knows how the harms of several layers add up."
)
HARMS = {
    "data_free": "Relative squared error of the weights", "activation": "Relative squared error of the output",
    "fisher": "KL divergence, nat a token (estimated)",
    "loss": "Harm that a budget counts, nat a token", "kl": "KL divergence, nat a token", "kl_without": "KL divergence saved, nat a token",
}  # fmt: skip
PREFERRED_KINDS = ("kl", "fisher", "activation")
CALIBRATION_TOKENS = 8 * 256
SPANS = {"this": "This option", "all": "All options"}
MORE_BITS, FEWER_BITS = (8, 6, 5), (3, 2, 4)
TABLE_HEIGHT = 330


def sensitivity() -> None:
    """The page."""
    tell_notice()
    anatomy = model_picker.ready_anatomy()
    state.write_link()
    if anatomy is None:
        return
    measured = measured_of(anatomy)
    job = model_picker.newest("sensitivity", anatomy.model)
    active = job is not None and job.active
    intro, engine = st.columns([9, 4], gap="large")
    with intro:
        introduction(anatomy, measured)
    with engine, st.container(border=True, height=164, gap="small"):
        # A button inside a fragment would redraw the fragment alone, so there is one only while it has to redraw itself.
        draw = st.fragment(engine_box, run_every=POLL_SECONDS) if active else engine_box
        draw(anatomy, measured, job.id if job else None, active)
    heat(anatomy, measured)
    command = f"bitpress sensitivity {anatomy.model} --json"
    show_commands(command, f'from bitpress.engine.runs import jobs\n\nrun = jobs.submit("sensitivity", {{"model": "{anatomy.model}"}})\nprint(run.id)')


def introduction(anatomy: Anatomy, measured: Measured | None) -> None:
    """What the page answers, and on what its numbers stand."""
    st.subheader("Sensitivity", anchor=False)
    st.markdown(
        "Each square is one weight matrix, coloured by the harm that one option does to it alone. "
        "Spend bits where the colour is strong, save them where it is pale."
    )
    if measured is not None:
        st.caption(
            f"{anatomy.model} · {len(anatomy.linears)} matrices · {measured.protocol} · measured in {duration(measured.seconds)}, kept for this model and text"
        )


# --- the job ------------------------------------------------------------------------------------------------------


def engine_box(anatomy: Anatomy, measured: Measured | None, run_id: str | None, was_active: bool) -> None:
    """Measure, or how far the measuring is, or why it failed."""
    status = Store().get(run_id).status() if run_id else None
    if was_active:
        jobs.pump()
        if status is None or not status.active:
            st.rerun()
    if status is not None and status.active:
        working(status)
        return
    if status is not None and status.state in ("failed", "interrupted", "cancelled") and measured is None:
        stopped(status)
    else:
        st.markdown("**Engine** :gray-badge[:material/pause: idle]")
    again = measured is not None
    seconds = view.estimate_seconds(anatomy.linear_params, past_rates(), anatomy.params, CALIBRATION_TOKENS)
    st.button(
        "Measure again" if again else "Measure", key="measure", type="secondary" if again else "primary", shortcut="Ctrl+Enter",
        icon=":material/thermostat:", width="stretch", on_click=told(partial(submit, anatomy.model, again)),
    )  # fmt: skip
    st.caption(f"{len(anatomy.linears)} matrices × {len(OPTIONS)} options × {len(QUICK_KINDS)} scores, about {duration(max(1.0, seconds))}")


def submit(model: str, again: bool) -> None:
    """Put the measurement in the queue; what was measured before is kept until the new one is there."""
    jobs.submit_once("sensitivity", {"model": model, "force": again}, title=f"Sensitivity of {model}")


def working(status: Status) -> None:
    """How far it is, and Cancel in plain sight."""
    st.markdown(f"**Engine** {STATE_BADGES[status.state]}")
    share = min(1.0, status.done / status.total) if status.total else 0.0
    counted = f"{whole(status.done)} of {whole(status.total)}" if status.total else status.phase.replace("_", " ") or "starting"
    left = f" · about {duration(status.eta_s)} left" if status.eta_s and status.eta_s >= 1 else ""
    st.progress(share, text="Waiting for the run before it" if status.state == "queued" else f"{counted}{left}")
    stopping = status.state == "cancelling"
    st.button(
        "Cancelling" if stopping else "Cancel",
        key="cancel-measure",
        disabled=stopping,
        icon=":material/stop:",
        width="stretch",
        on_click=told(partial(jobs.cancel, status.id)),
    )


def stopped(status: Status) -> None:
    """A run that ended early, in one line with the reason on hover; the runs page has all of it."""
    error = status.error or {"what": "Stopped before the end.", "why": "", "remedy": "Measure again."}
    said = " ".join(error.get(part, "") for part in ("what", "why", "remedy")).strip()
    st.markdown(f"**Engine** {STATE_BADGES[status.state]}", help=said)
    st.caption(error["what"])


# --- the heatmap and what is below it -----------------------------------------------------------------------------


def heat(anatomy: Anatomy, measured: Measured | None) -> None:
    """Selectors, heatmap, layer, edits and table."""
    if measured is None:
        layer_map(view.cells(anatomy, {}, None, ""), MAP, label=f"Map of {anatomy.model}: nothing measured yet", legend=view.legend(None, "Harm"), scale=HARM)
        st.info("Nothing is measured for this model yet. Press Measure: it runs once and is kept.", icon=":material/thermostat:")
        selected_layer(anatomy)
        return
    kind, option, span = choosers(measured)
    table = measured.tables[kind]
    scores = table[option]
    bounds = view.bounds_of(scores.values() if span == "this" else (score for other in table.values() for score in other.values()))
    worst = view.ranked(scores)[0]
    size = f"{anatomy.blocks} blocks by {len(anatomy.roles)} roles"
    label = f"Heatmap of {anatomy.model}, {size}: harm of {option_name(option)} on each matrix. Largest {amount(scores[worst])} in {worst}."
    layer_map(
        view.cells(anatomy, scores, bounds, option_name(option)),
        MAP,
        label=label,
        legend=view.legend(bounds, f"{HARMS.get(kind, 'Harm')} at {option_name(option)}"),
        scale=HARM,
    )
    with st.container(border=True):
        edit_box(anatomy, scores, option)
    selected_layer(anatomy)
    harm_table(anatomy, measured, kind, option)


def choosers(measured: Measured) -> tuple[str, str, str]:
    """Score kind, option, and what the colours span; all three are part of the link."""
    kinds = list(measured.tables)
    with st.container(horizontal=True, gap="medium"):
        usual = next((kind for kind in PREFERRED_KINDS if kind in kinds), kinds[0])
        kind = st.segmented_control(
            "Harm by", kinds, default=usual, format_func=lambda name: KINDS.get(name, name), key="score", required=True, bind="query-params", help=KIND_HELP
        )
        options = list(measured.tables[kind])
        preferred = next((name for name in options if name.startswith("4")), options[0])
        option = st.segmented_control("Option", options, default=preferred, key="option", format_func=option_name, required=True, bind="query-params")
        help_text = "This option: the strongest colour is its worst layer. All options: colours can be compared between options."
        span = st.segmented_control(
            "Colours span", list(SPANS), default="this", format_func=SPANS.get, key="span", required=True, bind="query-params", help=help_text
        )
    return kind, option, span


def option_name(option: str) -> str:
    """An option's id in words: 4-bit, 50% zeros."""
    return f"{option} zeros" if option.endswith("%") else option


def selected_layer(anatomy: Anatomy) -> None:
    """The layer that is selected, close up. The link names it."""
    _selection_from_link(anatomy)
    names = selected(MAP)
    if not names:
        st.query_params.pop("layer", None)
        st.caption("Click a square to see its weights, its error against bits and its spectrum.")
        return
    if st.query_params.get("layer") != names[-1]:
        st.query_params["layer"] = names[-1]
    scheme = state.session().recipe.resolve(anatomy).get(names[-1])
    layer_detail(anatomy.model, anatomy.by_name[names[-1]], scheme, "sensitivity-detail")


def _selection_from_link(anatomy: Anatomy) -> None:
    """On the first look at the page: select the layer that the link names."""
    if "sensitivity-seen" not in st.session_state:
        st.session_state["sensitivity-seen"] = True
        wanted = st.query_params.get("layer")
        if wanted in anatomy.by_name and not selected(MAP):
            select(MAP, (wanted,))
            st.rerun()


# --- edits --------------------------------------------------------------------------------------------------------


def edit_box(anatomy: Anatomy, scores: view.Scores, option: str) -> None:
    """One-click edits of the recipe, and what the last one changed."""
    order, count = view.ranked(scores), view.usual_count(len(scores))
    st.markdown(
        "**Edit the recipe**",
        help=f"Ranked by the harm of {option_name(option)}. The edit goes into the recipe of the explore page and can be undone there or here.",
    )
    left, right = st.columns(2, gap="medium")
    with left, st.container(horizontal=True, gap="small", vertical_alignment="bottom"):
        _edit_group(anatomy, "most", order, MORE_BITS, count)
    with right, st.container(horizontal=True, gap="small", vertical_alignment="bottom"):
        _edit_group(anatomy, "least", order[::-1], FEWER_BITS, count)
    names = selected(MAP)
    if len(names) > 1:
        with st.container(horizontal=True, gap="small", vertical_alignment="bottom"):
            bits = st.selectbox("Selection to", BITS[::-1], key="selection-bits", format_func=_width, width=112)
            st.button(f"Set the {len(names)} selected to {bits} bit", key="selection-apply", on_click=told(partial(_apply_selected, anatomy)))
    if said := st.session_state.get("sensitivity-said"):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(f":material/edit_note: {said}", width="content")
            st.button("Undo", key="undo-edit", icon=":material/undo:", type="tertiary", on_click=_undo, disabled=not state.session().history.past)


def _edit_group(anatomy: Anatomy, which: str, order: list[str], widths: tuple[int, ...], count: int) -> None:
    """How many, to which width, and the button that says so."""
    n = st.number_input(f"{which.capitalize()} sensitive", 1, len(order), count, key=f"{which}-count", width=112)
    st.selectbox("Width", widths, key=f"{which}-bits", format_func=_width, width=92)
    st.button(f"Set the {n} {which} sensitive", key=f"{which}-apply", on_click=told(partial(_apply_ranked, anatomy, which, order)))


def _width(bits: int) -> str:
    return f"{bits} bit"


def _apply_ranked(anatomy: Anatomy, which: str, order: list[str]) -> None:
    """Number and width as they stand now: a callback runs before the page is drawn anew."""
    _apply(anatomy, order[: int(st.session_state[f"{which}-count"])], int(st.session_state[f"{which}-bits"]))


def _apply_selected(anatomy: Anatomy) -> None:
    _apply(anatomy, list(selected(MAP)), int(st.session_state["selection-bits"]))


def _apply(anatomy: Anatomy, layers: list[str], bits: int) -> None:
    before = state.session().recipe
    after = view.set_bits(before, anatomy, layers, bits)
    state.edit(after)
    st.session_state["sensitivity-said"] = view.what_changed(before, after, anatomy, layers)


def _undo() -> None:
    state.undo()
    st.session_state["sensitivity-said"] = "The last edit was taken back."


# --- the table ----------------------------------------------------------------------------------------------------


def harm_table(anatomy: Anatomy, measured: Measured, kind: str, option: str) -> None:
    """Every layer, the most harmed first; a row selects its square."""
    words = "The same numbers as the heatmap; empty where a layer has no such option. Select a row to see the layer above."
    st.markdown(f"**Layers by harm at {option_name(option)}**", help=words)
    rows = view.rows(anatomy, measured.tables[kind], option, state.session().recipe)
    numbers = {name: st.column_config.NumberColumn(name, format="%.3g", help=HARMS.get(kind)) for name in measured.tables[kind]}
    largest = max(measured.tables[kind][option].values(), default=1.0) or 1.0
    numbers[option] = st.column_config.ProgressColumn(option, format="%.3g", min_value=0.0, max_value=largest, help=HARMS.get(kind))
    st.dataframe(
        rows, key=TABLE, hide_index=True, height=TABLE_HEIGHT, placeholder="", column_config=numbers, selection_mode="single-row",
        on_select=partial(_row_selected, rows["layer"]), alt=f"Layers of {anatomy.model} sorted by harm at {option_name(option)}",
    )  # fmt: skip


def _row_selected(layers: list[str]) -> None:
    chosen = st.session_state[TABLE]["selection"]["rows"]
    if chosen:
        select(MAP, (layers[chosen[0]],))


with guarded():
    sensitivity()
