"""One prompt, several models: dense and compressed runs write side by side, token by token. Wires the desk to the panes; computes nothing."""

import shlex
import time
import uuid
from functools import partial

import streamlit as st

from bitpress.app import chat, state
from bitpress.app.ui import model_picker
from bitpress.app.ui.commands import show_commands
from bitpress.app.ui.desk_state import BADGES, engine_of, newest_desk
from bitpress.app.ui.live_panel import told
from bitpress.app.ui.notices import guarded, show_error, tell_notice
from bitpress.app.ui.run_names import DENSE, finished_runs
from bitpress.app.ui.stream_panel import Stream, fold, panes, words
from bitpress.app.ui.token_diff import token_panes
from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.model import library
from bitpress.engine.runs import jobs
from bitpress.engine.runs.desk import Desk, open_desk
from bitpress.engine.runs.events import last_number
from bitpress.engine.runs.orders import Inbox
from bitpress.engine.runs.store import Store

POLL_SECONDS = 0.25
PUMP_SECONDS = 2.0
MAX_SIDES = 4
LINK_PROMPT = 400  # characters of a prompt that a link carries
STREAM = "generate-stream"
GREEDY, SAMPLED = "Greedy", "Sampled"
CHAT, COMPLETION = "Chat", "Completion"
LOST = {"what": "The engine stopped while it was writing.", "why": "Its worker process has ended.", "remedy": "Press Generate: it starts anew."}


def generate() -> None:
    """The page."""
    tell_notice()
    model = state.session().model
    state.write_link()
    entry = library.find(model)
    if not entry.ready:
        model_picker.ready_anatomy()
        return
    runs = finished_runs(model)
    stream = look(model)
    asking, settings = st.columns([9, 4], gap="large")
    with settings, st.container(border=True):
        sampling_box()
    with asking:
        side_picker(runs)
        prompt_box(model, entry.prompts)
        buttons(model, stream)
    titles = {DENSE: "Dense"} | runs
    working = stream is not None and stream.open
    every = POLL_SECONDS if working else None
    st.fragment(answers, run_every=every)(model, titles, working)  # always a fragment: the columns would be built anew, and jump, if it became one
    equivalent(model)


# --- what is asked ------------------------------------------------------------------------------------------------


def side_picker(runs: dict[str, str]) -> None:
    """Which models write: dense and finished runs, the first one being what the others are compared with. Part of the link."""
    options = [DENSE, *runs]
    if "sides" not in st.session_state:
        asked = [side for side in st.query_params.get("sides", "").split(",") if side in options]
        st.session_state["sides"] = asked[:MAX_SIDES] or options[:2]
    st.session_state["sides"] = [side for side in st.session_state["sides"] if side in options]
    chosen = st.multiselect(
        "Columns", options, key="sides", format_func=lambda side: "Dense" if side == DENSE else runs[side], max_selections=MAX_SIDES,
        placeholder="Choose at least one model",
        help="The first is the reference. Finished runs of this model can be chosen; make one on the explore page.",
    )  # fmt: skip
    _link("sides", ",".join(chosen))
    if not runs:
        st.caption("No run of this model has finished yet, so there is nothing to compare with dense. Compress it on the explore page.")


def prompt_box(model: str, starters: list[str]) -> None:
    """Mode and text of the prompt. Both are part of the link, a long text excepted."""
    if st.session_state.get("prompt-model") != model:
        first = "prompt-model" not in st.session_state
        st.session_state["prompt"] = (st.query_params.get("prompt") if first else None) or starters[0]
        st.session_state["prompt-model"] = model
    with st.container(horizontal=True, gap="small", vertical_alignment="bottom"):
        if chat.template_of(model):
            st.segmented_control("Prompt as", [CHAT, COMPLETION], default=CHAT, key="mode", required=True, label_visibility="collapsed", bind="query-params")
        for number, starter in enumerate(starters[:3]):
            st.button(
                starter if len(starter) <= 34 else f"{starter[:32]}…",
                key=f"starter-{number}",
                help=starter,
                type="tertiary",
                icon=":material/lightbulb:",
                on_click=partial(_take, starter),
            )
    prompt = st.text_area("Prompt", key="prompt", height=110, max_chars=3000, label_visibility="collapsed", placeholder="Write a beginning, or pick one above")
    _link("prompt", prompt if len(prompt) <= LINK_PROMPT else "")


def _take(starter: str) -> None:
    st.session_state["prompt"] = starter


def _link(name: str, value: str) -> None:
    """Keep one part of the link up to date."""
    if value and st.query_params.get(name) != value:
        st.query_params[name] = value
    elif not value:
        st.query_params.pop(name, None)


def sampling_box() -> None:
    """Sampling settings. Every column gets the same, the seed included."""
    help_text = "Greedy always takes the most likely token. Sampled draws by probability, with the same random numbers in every column."
    way = st.segmented_control("Sampling", [GREEDY, SAMPLED], default=GREEDY, key="sampling", required=True, bind="query-params", help=help_text)
    off = way != SAMPLED
    left, right = st.columns(2)
    left.slider(
        "Temperature", 0.1, 2.0, 0.8, 0.1, key="temperature", disabled=off, bind="query-params", help="Below 1 sharpens the distribution, above 1 flattens it."
    )
    right.slider(
        "Top p", 0.05, 1.0, 0.95, 0.05, key="top_p", disabled=off, bind="query-params", help="Only the most likely tokens that together have this probability."
    )
    left.number_input("Seed", 0, 2**31 - 1, 0, key="seed", disabled=off, bind="query-params")
    right.number_input("New tokens", 1, 512, 64, 16, key="max_new", bind="query-params", help="At most; the model may end sooner.")


def chosen_sampling() -> dict[str, float | int]:
    """The settings on screen in the desk's words. Read where they are used: a button's callback runs before the page is drawn anew."""
    now = st.session_state
    chosen: dict[str, float | int] = {"max_new": int(now["max_new"]), "temperature": 0.0}
    if now["sampling"] == SAMPLED:
        chosen |= {"temperature": float(now["temperature"]), "top_p": float(now["top_p"]), "seed": int(now["seed"])}
    return chosen


def chosen_text(model: str) -> str:
    """The prompt as the model gets it: as it stands, or inside its chat template."""
    prompt = st.session_state["prompt"]
    return chat.render(model, [{"role": "user", "content": prompt}]) if st.session_state.get("mode") == CHAT else prompt


def buttons(model: str, stream: Stream | None) -> None:
    """Generate, or Stop in its place."""
    with st.container(horizontal=True, vertical_alignment="center"):
        if stream is not None and stream.open:
            st.button("Stop", key="stop", icon=":material/stop:", on_click=told(stop))
            return
        missing = (
            "Choose at least one column." if not st.session_state["sides"] else "Write a prompt first." if not st.session_state["prompt"].strip() else None
        )
        st.button(
            "Generate",
            key="generate",
            type="primary",
            icon=":material/play_arrow:",
            shortcut="Ctrl+Enter",
            disabled=missing is not None,
            help=missing,
            on_click=told(partial(ask, model)),
        )


# --- the desk -----------------------------------------------------------------------------------------------------


def ask(model: str) -> None:
    """Give the order, and keep what is needed to find its answer again in the link."""
    sides, text = list(st.session_state["sides"]), chosen_text(model)
    desk = open_desk(model, next((side for side in sides if side != DENSE), None), _session())
    seen = last_number(desk.path / "events.jsonl")
    order = desk.order("generate", {"sides": sides, "prompt": text, "sampling": chosen_sampling()})
    st.session_state[STREAM] = (desk.id, model, Stream(order, tuple(sides), text, cursor=seen))
    st.query_params["desk"], st.query_params["order"] = desk.id, order
    state.session().notice = None


def stop() -> None:
    """Ask the desk to stop after the token at work."""
    _desk_of_stream().order("stop")


def restart() -> None:
    """End a worker that does not answer; the next question starts a fresh one."""
    desk, _, stream = st.session_state[STREAM]
    Desk(Store().get(desk), _session()).close()
    if stream.open:
        stream.state, stream.error = "failed", {"what": "The engine was restarted.", "why": "", "remedy": "Press Generate again."}


def _desk_of_stream() -> Desk:
    return Desk(Store().get(st.session_state[STREAM][0]), _session())


def _session() -> str:
    """This tab's name for its orders: a newer question of the tab replaces its older one, and no other tab's."""
    return st.session_state.setdefault("desk-session", uuid.uuid4().hex[:12])


def current_stream(model: str) -> Stream | None:
    """The answer on screen: of this tab, else the one that the link names, read again from the desk's folder."""
    if STREAM not in st.session_state:
        st.session_state[STREAM] = _from_link(model)
    kept = st.session_state[STREAM]
    return kept[2] if kept and kept[1] == model else None


def _from_link(model: str) -> tuple[str, str, Stream] | None:
    asked, order_id = st.query_params.get("desk", ""), st.query_params.get("order", "")
    if not asked or not order_id:
        return None
    try:
        run = Store().get(asked)
    except InputError:
        return None
    order = next((order for order in Inbox(run.path).take() if order.id == order_id), None)
    if order is None or run.status().model != model:
        return None
    st.session_state["desk-session"] = order.session
    return run.id, model, Stream(order.id, tuple(map(str, order.args.get("sides", []))), str(order.args.get("prompt", "")))


# --- the answers --------------------------------------------------------------------------------------------------


def answers(model: str, titles: dict[str, str], was_working: bool) -> None:
    """State of the engine, the columns, and why there is nothing in them."""
    stream = look(model)
    engine = engine_of(newest_desk(model))
    with st.container(horizontal=True, vertical_alignment="center", height=44, border=False):
        st.markdown(f"**Engine** {BADGES[engine.state]} {words(stream) if stream else ''}", help=engine.note, width="content")
        if engine.broken and stream is not None:
            st.button("Restart the engine", key="restart", icon=":material/restart_alt:", on_click=told(restart))
    if stream is not None and stream.error:
        show_error(BitpressError(stream.error["what"], stream.error.get("why", ""), stream.error.get("remedy", "")))
    token_panes(panes(stream, st.session_state["sides"], titles), "generate-panes", height=320)
    if was_working and stream is not None and not stream.open:
        st.rerun()


def look(model: str) -> Stream | None:
    """The stream with what came since the last look; the queue is looked after meanwhile, so that a dead worker is noticed."""
    stream = current_stream(model)
    if stream is None or not stream.open:
        return stream
    if time.monotonic() - st.session_state.get("pumped", 0.0) > PUMP_SECONDS:
        st.session_state["pumped"] = time.monotonic()
        jobs.pump()
    desk = _desk_of_stream()
    alive = desk.status().active
    fold(stream, desk.events(stream.cursor))
    if stream.open and not alive:
        stream.state, stream.error = "failed", dict(LOST)
    return stream


def equivalent(model: str) -> None:
    """The same question from a terminal, one command for each column, and from Python."""
    sides, sampling, shown = list(st.session_state["sides"]), chosen_sampling(), chosen_text(model)
    options = [f"--max-new {sampling['max_new']}", f"--temperature {sampling['temperature']}"]
    options += [f"--top-p {sampling['top_p']}", f"--seed {sampling['seed']}"] if "seed" in sampling else []
    lines = [f"bitpress generate {model if side == DENSE else side} --prompt {shlex.quote(shown)} {' '.join(options)} --json" for side in sides]
    python = (
        "from bitpress.engine.runs.desk import open_desk\n\n"
        f"desk = open_desk({model!r})\norder = desk.order('generate', {{\n    'sides': {sides!r},\n    'prompt': {shown!r},\n    'sampling': {sampling!r},\n}})"
    )
    show_commands("\n".join(lines), python)


with guarded():
    generate()
