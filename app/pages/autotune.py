"""Drag a budget, see the best recipe and what it will cost; verify it with one press. Wires pieces; computes nothing."""

from collections.abc import Sequence
from functools import partial

import streamlit as st

from bitpress.app import edits, readings, state
from bitpress.app.ui import autotune_view as view
from bitpress.app.ui import model_picker
from bitpress.app.ui.autotune_charts import check_chart, frontier_chart
from bitpress.app.ui.commands import show_commands
from bitpress.app.ui.layer_map import layer_map, selected
from bitpress.app.ui.live_panel import POLL_SECONDS, STATE_BADGES, progress_line, told
from bitpress.app.ui.locks import lock, locks_of, set_locks, unlock, written
from bitpress.app.ui.metric_cards import Card, cards, ideal_speed_card, size_card
from bitpress.app.ui.notices import error_markdown, guarded, plain, show_error, tell_notice
from bitpress.app.ui.numbers import amount, duration, signed_percent
from bitpress.app.ui.run_names import finished_runs
from bitpress.app.ui.run_view import RunView
from bitpress.app.ui.sensitivity_read import report_of
from bitpress.app.ui.sweep_box import sweep_box
from bitpress.app.ui.theme import AMOUNT
from bitpress.app.ui.turn import turn_to
from bitpress.engine.allocate import Allocation, Curve, allocate, price_of_a_byte, reasons
from bitpress.engine.choices import Choices
from bitpress.engine.errors import BitpressError
from bitpress.engine.latency_table import LatencyTable, kept_table
from bitpress.engine.methods.catalogue import kinds
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs import jobs
from bitpress.engine.runs.store import Store
from bitpress.engine.sensitivity_file import FISHER, SensitivityReport

MAP = "autotune-map"
NONE = "none"
TIE_WORDS = {"qkv": "q, k, v", "gate_up": "gate, up"}
ENDS = {"8": 8, "4": 4, "16": 16, "free": None}
END_WORDS = {"8": "8", "4": "4", "16": "16", "free": "By the budget"}
KIND_WORDS = {"loss": "Estimated", "fisher": "Estimated", "kl": "Measured"}


def autotune() -> None:
    """The page."""
    tell_notice()
    anatomy = model_picker.ready_anatomy()
    state.write_link()
    if anatomy is None:
        return
    st.subheader("Autotune", anchor=False)
    st.markdown("Name a budget. Every layer gets the option that spends it best, by what each layer was measured to lose.")
    report = report_of(anatomy, FISHER)
    if report is None:
        measure_first(anatomy)
    else:
        tune(anatomy, report)
    sweep_box(anatomy)


def measure_first(anatomy: Anatomy) -> None:
    """The one thing to do before there are scores, and how far it is."""
    status = model_picker.newest("sensitivity", anatomy.model)
    active = status is not None and status.active
    st.info("Nothing is known of this model's layers yet. It is measured once and kept.", icon=":material/thermostat:")
    if active and status is not None:
        st.fragment(_measuring, run_every=POLL_SECONDS)(status.id)
        return
    if status is not None and status.error:
        st.error(error_markdown(status.error.get("what", ""), status.error.get("why", ""), status.error.get("remedy", "")))
    submit = partial(jobs.submit, "sensitivity", {"model": anatomy.model}, title=f"Sensitivity of {anatomy.model}")
    st.button("Measure the layers", key="measure", type="primary", icon=":material/thermostat:", shortcut="Ctrl+Enter", on_click=told(submit))


def _measuring(run_id: str) -> None:
    jobs.pump()
    status = Store().get(run_id).status()
    if not status.active:
        st.rerun()
    share, words = progress_line(status, RunView())
    st.markdown(STATE_BADGES[status.state])
    st.progress(0.0 if status.state == "queued" else share, text="Waiting for the run before it" if status.state == "queued" else words)
    st.button("Cancel", key="cancel-measure", icon=":material/stop:", disabled=status.state == "cancelling", on_click=told(partial(jobs.cancel, status.id)))


def tune(anatomy: Anatomy, report: SensitivityReport) -> None:
    """Settings and cards, frontier beside the budgets, the map, and the reasons."""
    latency = kept_table()
    kind, ties, ends = settings(view.kinds_of(report))
    locks = locks_of(anatomy)
    try:
        choices, curve = view.table_of(report, anatomy, kind, ties, locks, ends)
    except BitpressError as error:
        show_error(error)
        st.button("Release all locks", key="release-refused", on_click=set_locks, args=({},))
        return
    left, right = st.columns([4, 9], gap="large")
    with left, st.container(border=True, key="budgets"):
        budgets = budget_sliders(curve, latency, choices)
    found = _solved(choices, budgets, latency)
    runs = view.measured_runs(anatomy, report, kind, finished_runs(anatomy.model, view.MOST_RUNS))
    with right:
        frontier_chart(anatomy, curve, found, runs, view.axis_of(next(iter(budgets))))
    if found is None:
        return
    recipe = edits.fit_stages(found.recipe, anatomy, kinds())
    answers(anatomy, recipe, found, runs)
    act(anatomy, recipe, found)
    chosen_map(anatomy, choices, found, locks)
    check_chart(runs)
    show_commands(_command(anatomy, budgets, kind, ties, locks, ends), _python(anatomy, budgets, kind, ties, locks, ends))


def settings(kinds: Sequence[str]) -> tuple[str, tuple[str, ...], int | None]:
    """Which scores, which ties, and what becomes of the embedding; all part of the link."""
    with st.container(horizontal=True, gap="large"):
        kind = kinds[0]
        if len(kinds) > 1:
            kind = st.segmented_control("Scores", kinds, default=kinds[0], format_func=KIND_WORDS.get, key="scores", required=True, bind="query-params",
                                        help="Measured: each layer's divergence, layer by layer. Estimated: to second order, from one backward; "
                                     "the few layers that it cannot tell are measured among changed ones.")  # fmt: skip
        help_text = "Layers that share their input and are often run as one: tied, they get the same option."
        ties = st.pills("Tie", list(TIE_WORDS), selection_mode="multi", format_func=TIE_WORDS.get, key="ties", bind="query-params", help=help_text)
        ends = st.segmented_control("Embedding bits", list(ENDS), default="8", format_func=END_WORDS.get, key="ends", required=True, bind="query-params",
                                    help="The embedding, and the head that is tied to it. By the budget: it competes with the layers.")  # fmt: skip
    return kind, tuple(ties or ()), ENDS[ends or "8"]


def budget_sliders(curve: Curve, latency: LatencyTable | None, choices: Choices) -> dict[str, float]:
    """One budget, or two."""
    dense = latency.dense_seconds(choices.anatomy) if latency else None
    least = float(latency.seconds(choices).min(axis=1).sum() + latency.head_seconds(choices)) if latency else 0.0
    known = view.slides(curve, dense, least)
    first = st.selectbox("Budget", list(known), format_func=lambda kind: known[kind].label, key="budget", bind="query-params")
    first = first if first in known else next(iter(known))  # a link may say anything
    budgets = {first: _slider(first, known[first])}
    others = [NONE, *(kind for kind in known if kind != first)]
    second = st.selectbox("And", others, format_func=lambda kind: "Nothing else" if kind == NONE else known[kind].label, key="second", bind="query-params")
    if second in known:
        budgets[second] = _slider(second, known[second])
    if latency is None:
        st.caption("Run `bitpress bench kernels` once to budget time as well.")
    return budgets


def _slider(kind: str, slide: view.Slide) -> float:
    low, high = min(slide.low, slide.high - slide.step), slide.high
    value = st.slider(f"{slide.label}, {slide.unit}", low, high, min(max(slide.start, low), high), slide.step, key=f"limit-{kind}", bind="query-params")
    return slide.budget(value, kind)


def _solved(choices: Choices, budgets: dict[str, float], latency: LatencyTable | None) -> Allocation | None:
    now = state.session().recipe
    base = Recipe(model=now.model, seed=now.seed, calibration=now.calibration, measure=now.measure, stages=now.stages)
    try:
        return allocate(choices, budgets, base, latency)
    except BitpressError as error:
        show_error(error)
        return None


# --- the chosen recipe --------------------------------------------------------------------------------------------


def answers(anatomy: Anatomy, recipe: Recipe, found: Allocation, runs: Sequence[view.Measured]) -> None:
    """The three cards of the chosen recipe: all predicted, until a run has measured it."""
    prediction = readings.predict(recipe, anatomy)
    size = prediction.size
    if size is None:
        return
    rise, kl = found.predicted["perplexity_ratio"] - 1, found.predicted["kl"]
    help_text = "The layers' divergences add up to this if they do not disturb each other; they do, so a run has the last word."
    quality = Card(
        "How good", "predicted", f"{signed_percent(rise)}", "perplexity over dense", (f"{amount(kl)} nat a token", view.error_so_far(runs)), help_text
    )
    speed = ideal_speed_card(prediction.speedup, "Bytes of weights that one decode step reads, dense over compressed.")
    if "latency_s" in found.predicted:
        lines = (
            f"{duration(found.predicted['latency_s'])} a token in products, by this machine's kernels",
            f"at most {amount(prediction.speedup)}× by bytes read",
        )
        speed = Card("How fast", "predicted", duration(found.predicted["latency_s"]), "", lines, "Attention, norms and Python are not in it.")
    exact = size_card(size.dense_bytes, size.bytes, size.bits_per_weight_linears, size.bits_per_weight_model, "predicted (exact)", "From the shapes alone.")
    cards([exact, quality, speed], "autotune", 0)


def act(anatomy: Anatomy, recipe: Recipe, found: Allocation) -> None:
    """Verify it, or take it to the explore page; and what a run of it has measured."""
    run = readings.measured_run(recipe, anatomy)
    job = next(
        (status for status in jobs.active() if status.kind == "compress" and (r := Store().get(status.id).recipe()) and r.digest() == recipe.digest()), None
    )
    problems = readings.problems_of(recipe, anatomy, readings.predict(recipe, anatomy))
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button("Verify", key="verify", type="primary", icon=":material/verified:", shortcut="Ctrl+Enter", disabled=bool(job or run or problems),
                  on_click=told(partial(_verify, recipe)), help="; ".join(map(str, problems)) or "Compress with this recipe and measure it.")  # fmt: skip
        st.button("Use on explore", key="use", icon=":material/open_in_new:", on_click=_use, args=(recipe,))
        shape = view.shape_line(found)
        told_so_far = "" if run or job else " Nothing has measured this recipe yet."
        st.caption((f"{shape[0].upper()}{shape[1:]}. " if shape else "") + f"Solved in {duration(found.seconds)}.{told_so_far}", width="content")
    if job is not None:
        st.fragment(_verifying, run_every=POLL_SECONDS)(job.id)
    if run is not None:
        st.markdown(_verified(run.id, found))
    if st.session_state.pop("autotune-turn", False):
        turn_to("explore")


def _verify(recipe: Recipe) -> None:
    state.follow(jobs.submit("compress", {"model": recipe.model, "samples": 0}, recipe, title="Autotune check").id)


def _use(recipe: Recipe) -> None:
    state.edit(recipe)
    state.follow(None)
    st.session_state["autotune-turn"] = True


def _verifying(run_id: str) -> None:
    jobs.pump()
    status = Store().get(run_id).status()
    if not status.active:
        st.rerun()
    share, words = progress_line(status, RunView())
    st.progress(0.0 if status.state == "queued" else share, text="Waiting for the run before it" if status.state == "queued" else f"Verifying: {words}")


def _verified(run_id: str, found: Allocation) -> str:
    """Predicted and measured in one line."""
    sides = (Store().get(run_id).metrics() or {}).get("metrics", {})
    now, dense = sides.get("compressed", {}), sides.get("dense", {})
    parts = []
    if "perplexity" in now and dense.get("perplexity"):
        predicted = signed_percent(found.predicted["perplexity_ratio"] - 1)
        parts.append(f"perplexity {signed_percent(now['perplexity'] / dense['perplexity'] - 1)} measured, {predicted} predicted")
    if "kl_mean" in now:
        parts.append(f"divergence {amount(now['kl_mean'])} nat measured, {amount(found.predicted['kl'])} predicted")
    return f":material/verified: **Verified** by run {run_id[-4:]}: {'; '.join(parts) or 'it measured no quality'}."


def chosen_map(anatomy: Anatomy, choices: Choices, found: Allocation, locks: dict[str, str]) -> None:
    """The chosen recipe as a map, locks on what is selected, and the reasons of one layer."""
    locked = view.locked_layers(anatomy, choices, locks)
    counts = {option.id: sum(value == option.id for value in found.options.values()) for option in choices.options}
    told_counts = ", ".join(f"{count} at {option}" for option, count in counts.items() if count)
    label = f"The chosen recipe of {anatomy.model} as a map of {anatomy.blocks} blocks by {len(anatomy.roles)} roles: {told_counts}."
    layer_map(view.cells(anatomy, choices, found, locked), MAP, label=label, legend=view.legend(), scale=AMOUNT)
    names = [name for name in selected(MAP) if name in found.options]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        option = st.selectbox("Lock the selection to", [option.id for option in choices.options], key="lock-option", width=170)
        st.button(
            "Lock",
            key="lock",
            icon=":material/lock:",
            disabled=not names,
            on_click=lock,
            args=(names, option),
            help=None if names else "Select squares first.",
        )
        st.button(
            "Unlock",
            key="unlock",
            icon=":material/lock_open:",
            disabled=not (locked.keys() & set(names)),
            on_click=unlock,
            args=([layer for name in names for layer in choices.items[choices.item_of(name)]],),
        )
        st.button("Release all", key="release", type="tertiary", disabled=not locks, on_click=set_locks, args=({},))
        st.caption(f"{len(locked)} of {len(anatomy.linears)} matrices locked. {told_counts}.", width="stretch")
    if names:
        reason_box(choices, found, names[-1], names[-1] in locked)
    else:
        st.caption("Select a square to see why it got its bits.")


def reason_box(choices: Choices, found: Allocation, layer: str, locked: bool) -> None:
    """Why this layer?"""
    with st.container(border=True, key="why"):
        st.markdown(f"**Why this layer?** {plain(layer)}")
        rows = reasons(choices, found, layer)
        tied = choices.items[choices.item_of(layer)]
        st.markdown(view.why(rows, layer, found, tied, locked))
        price = price_of_a_byte(choices, found)
        st.caption(
            f"At this budget another MB saves {amount(price * 1e6)} nat where it helps most; the option with the least harm plus price of its bytes wins."
        )
        st.dataframe(view.reason_rows(rows, price), hide_index=True, key="why-table",
                     column_config={name: st.column_config.NumberColumn(name, format="%.4g") for name in view.HARM_COLUMNS})  # fmt: skip


def _command(anatomy: Anatomy, budgets: dict[str, float], kind: str, ties: Sequence[str], locks: dict[str, str], ends: int | None) -> str:
    asked = " ".join(f"--{budget.replace('_', '-')} {value:g}" for budget, value in budgets.items())
    tied = "".join(f" --tie {tie}" for tie in ties)
    held = "".join(f' --lock "{piece.strip()}"' for piece in written(locks, anatomy).split(";") if piece.strip())
    return f"bitpress allocate {anatomy.model} {asked} --kind {kind}{tied}{held}{'' if ends == 8 else f' --embedding-bits {ends or 0}'} --json"


def _python(anatomy: Anatomy, budgets: dict[str, float], kind: str, ties: Sequence[str], locks: dict[str, str], ends: int | None) -> str:
    held = dict(piece.strip().rsplit("=", 1) for piece in written(locks, anatomy).split(";") if piece.strip())
    given = f"kind={kind!r}, ties={tuple(ties)!r}, locks={held!r}, embedding_bits={ends!r}"
    call = f'allocate_model("{anatomy.model}", {budgets!r}, {given})'
    return f"from bitpress.engine.allocate_model import allocate_model\n\nfound = {call}\nprint(found.recipe.to_yaml(), found.predicted)"


with guarded():
    autotune()
