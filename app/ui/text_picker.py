"""The text that models are measured on: the list, how much of it, and the way to bring one's own. Knows entries, files and edits."""

import hashlib
import re
from pathlib import Path

import streamlit as st

from bitpress.app import state
from bitpress.app.ui.controls import try_edit
from bitpress.app.ui.notices import refusing
from bitpress.engine.data.texts import load_text
from bitpress.engine.data.user_text import SUFFIXES, is_path
from bitpress.engine.errors import InputError
from bitpress.engine.home import home
from bitpress.engine.measure.protocol import TIERS

AUTO = "auto"
UPLOAD_MB = 32


def text_picker() -> None:
    """What the models are measured on, and how much of it."""
    measure = state.session().recipe.measure
    titles = {AUTO: "Automatic for this model"} | {text.id: text.title if text.ready else f"{text.title} · to fetch" for text in state.texts()}
    if measure.text not in titles:
        titles[measure.text] = Path(measure.text).name if is_path(measure.text) else measure.text
    st.session_state["text"], st.session_state["tier"] = measure.text, measure.tier
    st.selectbox("Text to measure on", list(titles), key="text", format_func=titles.get, on_change=_take_measure)
    own = st.popover("Your own text", icon=":material/description:", width="stretch", key="own-text-box", on_change="rerun")
    if own.open:
        with own:
            own_text_form()
    st.segmented_control("Amount of text", list(TIERS), key="tier", format_func=str.capitalize, on_change=_take_measure, help=tier_help(), required=True)


def tier_help() -> str:
    """What each tier measures."""
    return (
        "; ".join(f"{name}: {f'{tier.windows} windows' if tier.windows else 'every window'} of {tier.window}" for name, tier in TIERS.items())
        + ". Windows are cut to the model's context."
    )


def own_text_form() -> None:
    """A file of this machine, or an uploaded one; refusals are told in place."""
    path = st.text_input("File on the machine that serves this page", key="own-text-path", placeholder="/texts/my-text.txt")
    st.button("Measure on this file", key="own-text", on_click=refusing("own-text-refused", _take_path), disabled=not path.strip())
    turn = st.session_state.get("text-uploads", 0)
    st.file_uploader(f"Or upload one (up to {UPLOAD_MB} MB)", [suffix[1:] for suffix in SUFFIXES], key=f"text-upload-{turn}",
                     on_change=refusing("own-text-refused", _take_upload), max_upload_size=UPLOAD_MB)  # fmt: skip
    st.caption("A .txt of passages, or rows with a `text` field. Calibration and evaluation take different passages of it.")
    if wrong := st.session_state.get("own-text-refused"):
        st.error(wrong)


def _take_path() -> None:
    path = st.session_state["own-text-path"].strip()
    if not is_path(path):
        raise InputError(f"{path} is not a text that can be read.", "", f"Give a file of type {', '.join(SUFFIXES)}.")
    load_text(path)
    _measure_on(path)


def _take_upload() -> None:
    turn = st.session_state.get("text-uploads", 0)
    file = st.session_state.get(f"text-upload-{turn}")
    if file is not None:
        st.session_state["text-uploads"] = turn + 1
        _measure_on(str(keep_text(file.name, file.getvalue())))


def keep_text(name: str, data: bytes) -> Path:
    """Keep an uploaded text under a name that its content decides, and give its path. Raises InputError, keeping nothing, when it cannot be measured on."""
    given = Path(name)
    stem = re.sub(r"[^\w-]+", "-", given.stem)[:40].strip("-") or "text"
    path = home() / "uploads" / f"{stem}-{hashlib.sha256(data).hexdigest()[:8]}{given.suffix.lower()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    try:
        load_text(str(path))
    except InputError:
        path.unlink()
        raise
    return path


def _measure_on(text: str) -> None:
    recipe = state.session().recipe
    try_edit(lambda: recipe.model_copy(update={"measure": recipe.measure.model_copy(update={"text": text})}))


def _take_measure() -> None:
    recipe = state.session().recipe
    wanted = {"text": st.session_state["text"], "tier": st.session_state["tier"] or recipe.measure.tier}
    try_edit(lambda: recipe.model_copy(update={"measure": recipe.measure.model_copy(update=wanted)}))
