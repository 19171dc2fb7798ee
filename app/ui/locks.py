"""Layers that a person has fixed before a budget is spent: kept in the tab and in the link. Knows layers and option ids."""

from collections.abc import Sequence

import streamlit as st

from bitpress.app import edits, state
from bitpress.engine.errors import BitpressError
from bitpress.engine.model.anatomy import Anatomy

LOCKS = "autotune-locks"


def locks_of(anatomy: Anatomy) -> dict[str, str]:
    """Layer -> option; on the first look at the page from the link, kept for each model."""
    kept = st.session_state.get(LOCKS)
    if kept is None or kept[0] != anatomy.model:
        asked = st.query_params.get("locks", "") if kept is None else ""
        kept = st.session_state[LOCKS] = (anatomy.model, _parsed(asked, anatomy))
    locks: dict[str, str] = kept[1]
    if locks:
        st.query_params["locks"] = written(locks, anatomy)
    else:
        st.query_params.pop("locks", None)
    return locks


def _parsed(asked: str, anatomy: Anatomy) -> dict[str, str]:
    """`pattern=option; pattern=option`; what is not understood is left out."""
    found: dict[str, str] = {}
    for piece in asked.split(";"):
        pattern, equals, option = piece.strip().rpartition("=")
        if equals:
            try:
                found |= dict.fromkeys(edits.covered(pattern, anatomy), option)
            except BitpressError:
                continue
    return found


def written(locks: dict[str, str], anatomy: Anatomy) -> str:
    """Locks as the link holds them: `pattern=option; pattern=option`."""
    options = sorted(set(locks.values()))
    return "; ".join(f"{edits.pattern_of([layer for layer, wanted in locks.items() if wanted == option], anatomy)}={option}" for option in options)


def set_locks(locks: dict[str, str]) -> None:
    """Fix just these."""
    st.session_state[LOCKS] = (state.session().model, locks)


def lock(names: Sequence[str], option: str) -> None:
    """Fix these layers at one option."""
    set_locks(st.session_state[LOCKS][1] | dict.fromkeys(names, option))


def unlock(layers: Sequence[str]) -> None:
    """Give these layers back to the budget."""
    reached = set(layers)
    set_locks({layer: option for layer, option in st.session_state[LOCKS][1].items() if layer not in reached})
