"""The frame of every page: page settings, navigation, shared style. Knows the pages' names and nothing of what they do."""

import os
from pathlib import Path

import streamlit as st

from bitpress.app.ui.model_picker import describe_methods, fetch_recommended, model_picker
from bitpress.app.ui.notices import guarded
from bitpress.app.ui.theme import style

PAGES = Path(__file__).parent / "pages"
ICON = Path(__file__).parent / "static" / "icon.svg"  # our own file: the name of an icon would have the browser ask a font service for it
SCREENS = {
    "explore": ":material/grid_view:",
    "sensitivity": ":material/thermostat:",
    "autotune": ":material/tune:",
    "compare": ":material/compare_arrows:",
    "generate": ":material/forum:",
    "runs": ":material/list_alt:",
}

st.set_page_config("Bitpress", page_icon=ICON, layout="wide")
page = st.navigation(
    [st.Page(PAGES / f"{name}.py", title=name.capitalize(), icon=icon, default=name == "explore") for name, icon in SCREENS.items()],
    position="top",
)
style()
with guarded(), st.sidebar:
    if os.environ.get("BITPRESS_FETCH", "1") != "0":
        describe_methods()
        fetch_recommended()
    model_picker()
page.run()
