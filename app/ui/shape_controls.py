"""What of the blocks goes: heads, neurons and whole blocks, per selection. Knows edits and widgets; which head or neuron goes is a stage's to choose."""

from functools import partial
from typing import get_args

import streamlit as st

from bitpress.app import edits, state
from bitpress.app.ui.controls import target, try_edit
from bitpress.engine.model.anatomy import ATTENTION_ROLES, MLP_ROLES, Anatomy
from bitpress.engine.recipe import Recipe
from bitpress.engine.structure import Place
from bitpress.engine.targets import matches

PLACES = get_args(Place)
STEP = 5  # percent
LEAST = 10
UNIT_HELP = {
    "heads": "Whole key-value groups go, the least important first; which those are is the method's to say. The KV cache shrinks with them.",
    "neurons": "Gate, up and down get narrower by the least important neurons; which those are is the method's to say.",
}


def shape_controls(anatomy: Anatomy) -> None:
    """Sliders for heads and neurons of the selection's blocks, and for the depth of the model."""
    left, middle, right = st.columns(3, gap="large")
    with left:
        _units(anatomy, "heads", separate_heads(anatomy), "This model's attention matrices are fused: no head can be taken out.")
    with middle:
        _units(anatomy, "neurons", bool({"down", "fc2"} & set(anatomy.roles)), "This model has no MLP whose neurons can be told apart.")
    with right:
        _depth(anatomy)


def separate_heads(anatomy: Anatomy) -> bool:
    """Whether heads can be taken out of this model."""
    return {"q", "k", "v", "o"} <= set(anatomy.roles) and anatomy.heads > 0


def blocks_of_selection(anatomy: Anatomy, kind: str) -> list[int]:
    """The blocks in which something of the attention (`heads`) or of the MLP (`neurons`) is selected; all when nothing is."""
    pattern, _ = target(anatomy)
    roles = ATTENTION_ROLES if kind == "heads" else MLP_ROLES
    found = {part.block for part in anatomy.linears if part.role in roles and matches(pattern, part, anatomy.blocks)}
    return sorted(block for block in found if block is not None)


def _units(anatomy: Anatomy, kind: str, possible: bool, why_not: str) -> None:
    blocks, structure = blocks_of_selection(anatomy, kind), state.session().recipe.structure
    shares = {structure.share_of(kind, anatomy, block) for block in blocks} or {1.0}
    key = f"keep-{kind}"
    st.session_state[key] = max(LEAST, STEP * round(100 * max(shares) / STEP))
    words = f"all {anatomy.blocks} blocks" if len(blocks) == anatomy.blocks else f"{len(blocks)} block{'s' if len(blocks) != 1 else ''}"
    mixed = " · now mixed" if len(shares) > 1 else ""

    def change() -> None:
        try_edit(lambda: edits.set_units(state.session().recipe, anatomy, kind, blocks, st.session_state[key] / 100))

    st.slider(
        f"{kind.capitalize()} kept in {words}, %{mixed}", LEAST, 100, step=STEP, key=key, on_change=change, disabled=not possible or not blocks,
        help=UNIT_HELP[kind] if possible else why_not,
    )  # fmt: skip


def _depth(anatomy: Anatomy) -> None:
    recipe = state.session().recipe
    gone = recipe.dropped_blocks(anatomy)
    st.session_state["chop-count"] = min(len(gone), max(0, anatomy.blocks - 2))
    st.session_state.setdefault("chop-place", PLACES[0])
    st.session_state["chop-place"] = place_of(recipe, anatomy) or st.session_state["chop-place"]

    def change() -> None:
        try_edit(partial(edits.chop, recipe, anatomy, st.session_state["chop-count"], st.session_state["chop-place"]))

    most = max(1, anatomy.blocks - 2)
    st.slider("Blocks removed", 0, most, key="chop-count", on_change=change, disabled=anatomy.blocks < 3, help="The first and the last block stay.")
    st.selectbox("Which blocks", PLACES, key="chop-place", on_change=change, help="max-gap leaves evenly spaced blocks; the others remove a run at one place.")


def place_of(recipe: Recipe, anatomy: Anatomy) -> str | None:
    """The place whose blocks the recipe drops, None when it drops none or others."""
    gone = recipe.dropped_blocks(anatomy)
    if not gone or len(gone) > anatomy.blocks - 2:
        return None
    return next((place for place in PLACES if edits.chopped(anatomy.blocks, len(gone), place) == gone), None)
