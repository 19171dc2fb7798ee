"""A component of our own: a `.js` and a `.css` file beside this one, under one name. Knows where they lie; nothing of what they draw."""

from pathlib import Path
from typing import Any

import streamlit as st

_HERE = Path(__file__).parent


def own_component(name: str) -> Any:
    """What draws `name`.js into an element of the class `name` with hyphens. To be called once, as a module is read."""
    css, js = ((_HERE / f"{name}.{kind}").read_text(encoding="utf8") for kind in ("css", "js"))
    return st.components.v2.component(f"bitpress_{name}", html=f'<div class="{name.replace("_", "-")}"></div>', css=css, js=js)
