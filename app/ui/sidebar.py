"""The sidebar of the main page under the model: text, amount of text, preset, methods. Knows entries and edits."""

import streamlit as st

from bitpress.app import readings, state
from bitpress.app.ui.method_form import method_form
from bitpress.app.ui.text_picker import text_picker


def sidebar() -> None:
    """Text, tier, preset and methods, in this order."""
    preset_picker()
    text_picker()
    st.divider()
    method_form(readings.catalogue())


def preset_picker() -> None:
    """Where the recipe starts from."""
    known = state.presets()
    st.session_state["preset"] = state.session().preset
    st.selectbox(
        "Preset", list(known), key="preset", format_func=lambda name: known[name].title, on_change=lambda: state.choose_preset(st.session_state["preset"])
    )
    st.caption(known[state.session().preset].description)
