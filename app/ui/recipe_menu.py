"""What can be done with the recipe as a whole: undo, redo, back to the preset, difference, download, upload, link. Knows state and edits."""

import streamlit as st

from bitpress.app import edits, state
from bitpress.app.ui.notices import plain
from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import MAX_YAML_BYTES, Recipe


def recipe_menu(anatomy: Anatomy) -> None:
    """One row of buttons."""
    history = state.session().history
    with st.container(horizontal=True, gap="small", vertical_alignment="center"):
        st.button("Undo", key="undo", on_click=state.undo, disabled=not history.past, icon=":material/undo:", shortcut="Ctrl+Z")
        st.button("Redo", key="redo", on_click=state.redo, disabled=not history.future, icon=":material/redo:", shortcut="Ctrl+Shift+Z")
        changed = state.session().recipe != state.session().base
        st.button("Reset to preset", key="reset", on_click=state.reset, disabled=not changed, icon=":material/restart_alt:")
        # What is folded away is drawn when it is opened: a redraw after each edit stays short.
        difference = st.popover("Difference to preset", icon=":material/difference:", disabled=not changed, key="difference", on_change="rerun")
        if difference.open:
            with difference:
                difference_table(anatomy)
        file = st.popover("Recipe file", icon=":material/description:", key="file", on_change="rerun")
        if file.open:
            with file:
                file_forms()


def difference_table(anatomy: Anatomy) -> None:
    """What the recipe does otherwise than its preset."""
    rows = edits.difference(state.session().base, state.session().recipe, anatomy)
    if not rows:
        st.caption("Only what is measured differs; the weights come out the same.")
        return
    lines = ["| layers | preset | now |", "| --- | --- | --- |", *(f"| {plain(where)} | {plain(old)} | {plain(new)} |" for where, old, new in rows)]
    st.markdown("\n".join(lines))


def file_forms() -> None:
    """Download the recipe, or put another in its place."""
    recipe = state.session().recipe
    st.download_button(
        "Download recipe",
        recipe.to_yaml(),
        f"{recipe.model.replace('/', '--')}-{recipe.digest()}.yaml",
        "text/yaml",
        key="download",
        on_click="ignore",
        icon=":material/download:",
    )
    turn = st.session_state.get("uploads", 0)
    st.file_uploader("Upload a recipe (YAML, up to 1 MB)", type=["yaml", "yml"], key=f"upload-{turn}", on_change=_take_upload, args=(turn,), max_upload_size=1)
    st.caption("The address of this page restores it: model, recipe and run.")


def _take_upload(turn: int) -> None:
    """Read an uploaded recipe into the page; a wrong one is told and leaves the page as it is."""
    file = st.session_state.get(f"upload-{turn}")
    if file is None:
        return
    st.session_state["uploads"] = turn + 1
    try:
        recipe = read_upload(file.getvalue())
        here = state.session().model
        state.edit(recipe.model_copy(update={"model": here}))
        state.session().notice = None
    except BitpressError as error:
        state.session().notice = error


def read_upload(data: bytes) -> Recipe:
    """A recipe from the bytes of a file. Raises InputError for what is too large, no text or no recipe."""
    if len(data) > MAX_YAML_BYTES:
        raise InputError("The file is too large.", f"It has {len(data):,} bytes; the limit is {MAX_YAML_BYTES:,}.", "A recipe is a page of YAML.")
    try:
        text = data.decode("utf8")
    except UnicodeDecodeError:
        raise InputError("The file is no text.", "It is not UTF-8.", "Upload the YAML file of a recipe.") from None
    return Recipe.from_text(text)
