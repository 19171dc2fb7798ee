"""Choosing a model and getting it ready: the list, its card, fetching, adding one's own, inspecting. Knows the library and jobs.

Nothing is downloaded or read here; a worker does both, and this shows how far it is.
"""

import streamlit as st

from bitpress.app import state
from bitpress.app.readings import catalogue
from bitpress.app.ui.live_panel import POLL_SECONDS, told
from bitpress.app.ui.notices import error_markdown, refusing
from bitpress.app.ui.numbers import amount, duration, file_size, short_count, whole
from bitpress.engine.model import library
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.model.library import ModelEntry
from bitpress.engine.runs import jobs
from bitpress.engine.runs.status import Status
from bitpress.engine.runs.store import Store


def newest(kind: str, model: str) -> Status | None:
    """The newest run of a kind for a model, whatever its state."""
    return next((status for status in Store().list(kind=kind) if status.model == model), None)


def model_picker() -> None:
    """The list of models, the chosen one's card, and the way to add another."""
    entries = {entry.id: entry for entry in state.models()}
    now = state.session().model
    st.session_state["model"] = now
    st.selectbox(
        "Model",
        list(entries) if now in entries else [*entries, now],
        key="model",
        format_func=lambda name: _label(entries.get(name), name),
        on_change=_take_model,
    )
    entry = entries.get(now)
    if entry:
        model_card(entry)
    box = st.popover("Add a model", icon=":material/add:", width="stretch", key="add-box", on_change="rerun")
    if box.open:
        with box:
            add_forms()
    for other in entries.values():
        if other.recommended and not other.ready and other.id != now:
            fetching(other)


def _label(entry: ModelEntry | None, name: str) -> str:
    if entry is None:
        return name
    return entry.title if entry.ready else f"{entry.title} · to fetch"


def _take_model() -> None:
    state.open_model(st.session_state["model"])


def model_card(entry: ModelEntry) -> None:
    """What the model is, in a few short lines."""
    facts = [f"{short_count(entry.params)} parameters" if entry.params else "", f"{entry.blocks} blocks" if entry.blocks else "",
             file_size(entry.bytes) if entry.bytes else "", f"context {whole(entry.context)}" if entry.context else ""]  # fmt: skip
    st.caption(" · ".join(fact for fact in facts if fact) + f"  \n{entry.source.label} · {entry.licence}")
    if entry.notes:
        st.caption(entry.notes)


def add_forms() -> None:
    """A local folder or GGUF file, or a Hub id; refusals are told in place."""
    path = st.text_input("Folder, safetensors or GGUF file", key="add-path", placeholder="/models/my-model")
    st.button("Add from this machine", key="add-local", on_click=refusing("add-refused", _add_local), disabled=not path)
    hub = st.text_input("Hub model", key="add-hub", placeholder="owner/name")
    st.button("Fetch from the Hub", key="add-from-hub", on_click=refusing("add-refused", _add_hub), disabled=not hub)
    if wrong := st.session_state.get("add-refused"):
        st.error(wrong)


def _add_local() -> None:
    entry = library.add_local(st.session_state["add-path"].strip())
    state.forget_models()
    state.open_model(entry.id)


def _add_hub() -> None:
    entry = library.find(st.session_state["add-hub"].strip())
    if not entry.ready:
        jobs.submit_once("install", {"model": entry.source.package}, title=f"Fetch {entry.title}")
        st.session_state["hub-model"] = entry.source.package
    state.open_model(entry.source.package)


def fetch_recommended() -> None:
    """Start fetching the recommended model on the first visit to this home; a fetch that was ever started is left to the person."""
    for entry in state.models():
        if entry.recommended and not entry.ready and newest("install", entry.id) is None:
            jobs.submit_once("install", {"model": entry.id}, title=f"Fetch {entry.title}")


def describe_methods() -> None:
    """Have a worker write the method catalogue where none of these sources is kept, once a visit: inspecting the smallest model does it."""
    if catalogue() is None and not st.session_state.get("methods-asked"):
        st.session_state["methods-asked"] = True
        run = newest("inspect", state.FIRST_MODEL)
        if run is None or not run.active:
            jobs.submit_once("inspect", {"model": state.FIRST_MODEL}, title="Describe the methods")


def fetching(entry: ModelEntry) -> None:
    """How far the fetch of a model is, with cancel; or the button that starts it."""
    run = newest("install", entry.id if entry.id in {known.id for known in state.models()} else entry.source.package)
    active = run is not None and run.active
    st.fragment(_fetch_body, run_every=2 * POLL_SECONDS if active else None)(entry, run.id if run else None, active)


def _fetch_body(entry: ModelEntry, run_id: str | None, was_active: bool) -> None:
    status = Store().get(run_id).status() if run_id else None
    if was_active and status is not None and not status.active:
        state.forget_models()
        st.rerun()
    if status is not None and status.active:
        st.progress(min(1.0, status.done / status.total) if status.total else 0.0, text=fetch_words(entry.title, status))
        st.button(
            "Cancel fetch",
            key=f"cancel-{status.id}",
            disabled=status.state == "cancelling",
            on_click=told(lambda: jobs.cancel(status.id)),
            type="tertiary",
            icon=":material/close:",
        )
        return
    if status is not None and status.state in ("failed", "interrupted"):
        error = status.error or {"what": "The fetch was interrupted.", "why": "", "remedy": "Start it again."}
        st.warning(error_markdown(error["what"], error.get("why", ""), error.get("remedy", "")))
    size = f" ({file_size(entry.download_bytes)})" if entry.download_bytes else ""
    again = lambda: jobs.submit_once("install", {"model": entry.source.package if entry.source.kind == "hub" else entry.id}, title=f"Fetch {entry.title}")  # noqa: E731
    st.button(f"Fetch {entry.title}{size}", key=f"fetch-{entry.id}", on_click=told(again), icon=":material/download:", width="stretch")


def fetch_words(title: str, status: Status) -> str:
    """Bytes so far, of how many, and how fast."""
    if status.state == "queued":
        return f"{title}: waiting"
    if status.state == "cancelling":
        return f"{title}: cancelling"
    if status.phase == "inspecting":
        return f"{title}: reading the weights, layer {status.done} of {status.total}"
    of = f" of {file_size(status.total)}" if status.total else ""
    rate = f" · {amount(status.done / status.seconds / 1e6)}\u2009MB/s" if status.done and status.seconds else ""
    left = f" · {duration(status.eta_s)} left" if status.eta_s and status.eta_s >= 1 else ""
    return f"{title}: {file_size(status.done)}{of}{rate}{left}" if status.done else f"{title}: starting"


def ready_anatomy() -> Anatomy | None:
    """The anatomy of the chosen model. While it is fetched or inspected this draws how far that is, and gives None."""
    model = state.session().model
    entry = next((entry for entry in state.models() if entry.id == model), None) or library.find(model)
    if not entry.ready:
        st.info(f"**{entry.title}** is not on this machine yet. The tiny model is ready meanwhile.", icon=":material/download:")
        fetching(entry)
        return None
    anatomy = state.anatomy_of(entry.id)
    if anatomy is None:
        inspecting(entry)
    return anatomy


def inspecting(entry: ModelEntry) -> None:
    """Have a worker look at the model once, and show a skeleton of the page meanwhile."""
    run = newest("inspect", entry.id)
    if run is None:
        run = jobs.submit_once("inspect", {"model": entry.id}, title=f"Inspect {entry.title}").status()
    if run.active:
        st.fragment(_inspect_body, run_every=POLL_SECONDS)(entry, run.id)
        return
    error = run.error or {"what": f"Looking at {entry.title} was stopped.", "why": "", "remedy": ""}
    st.error(error_markdown(error["what"], error.get("why", ""), error.get("remedy", "")), icon=":material/error:")
    again = told(lambda: jobs.submit_once("inspect", {"model": entry.id}, title=f"Inspect {entry.title}"))
    st.button("Inspect again", on_click=again, icon=":material/refresh:")
    with st.expander("Log"):
        st.code(Store().get(run.id).log_tail() or "Nothing was printed.", language=None)


def _inspect_body(entry: ModelEntry, run_id: str) -> None:
    status = Store().get(run_id).status()
    jobs.pump()
    if not status.active:
        st.rerun()
    layers = f": layer {status.done} of {status.total}" if status.total else ""
    st.markdown(f"Reading the weights of **{entry.title}** once{layers}. The layer map appears here.")
    st.skeleton(height=200)
    st.skeleton(height=320)
