"""The sidebar of the main page under the model: text, amount of text, preset, methods. Knows entries and edits."""

import streamlit as st

from bitpress.app import readings, state
from bitpress.app.ui.controls import try_edit
from bitpress.app.ui.method_form import method_form
from bitpress.engine.measure.protocol import TIERS

AUTO = "auto"


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


def text_picker() -> None:
    """What the models are measured on, and how much of it."""
    measure = state.session().recipe.measure
    titles = {AUTO: "Automatic for this model"} | {text.id: text.title if text.ready else f"{text.title} · to fetch" for text in state.texts()}
    if measure.text not in titles:
        titles[measure.text] = measure.text
    st.session_state["text"], st.session_state["tier"] = measure.text, measure.tier
    st.selectbox("Text to measure on", list(titles), key="text", format_func=titles.get, on_change=_take_measure)
    st.segmented_control("Amount of text", list(TIERS), key="tier", format_func=str.capitalize, on_change=_take_measure, help=tier_help(), required=True)


def tier_help() -> str:
    """What each tier measures."""
    return (
        "; ".join(f"{name}: {f'{tier.windows} windows' if tier.windows else 'every window'} of {tier.window}" for name, tier in TIERS.items())
        + ". Windows are cut to the model's context."
    )


def _take_measure() -> None:
    recipe = state.session().recipe
    wanted = {"text": st.session_state["text"], "tier": st.session_state["tier"] or recipe.measure.tier}
    try_edit(lambda: recipe.model_copy(update={"measure": recipe.measure.model_copy(update=wanted)}))
