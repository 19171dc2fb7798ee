"""What a person says of the selected runs: star, tags, note, archive, delete with undo. Knows labels; draws no figure."""

from collections.abc import Callable, Sequence
from functools import partial

import streamlit as st

from bitpress.app import state
from bitpress.app.ui.compare_view import Entry, title_of
from bitpress.app.ui.numbers import counted
from bitpress.engine.errors import BitpressError
from bitpress.engine.runs import labels
from bitpress.engine.runs.store import Store

DELETED = "compare-deleted"
EMPTIED = "compare-emptied"


def label_box(entries: Sequence[Entry]) -> None:
    """The selected runs' labels; a note belongs to one run."""
    ids = [entry.id for entry in entries]
    starred, archived = all(entry.labels.star for entry in entries), all(entry.labels.archived for entry in entries)
    with st.container(border=True, key="labels"):
        st.markdown(f"**{title_of(entries[0])}**" if len(entries) == 1 else f"**{len(entries)} runs selected**")
        with st.container(horizontal=True, vertical_alignment="bottom"):
            _button("Unstar" if starred else "Star", "star", ":material/star:", ids, lambda folder: labels.change_labels(folder, star=not starred))
            _button("Unarchive" if archived else "Archive", "archive", ":material/archive:", ids,
                    lambda folder: labels.change_labels(folder, archived=not archived))  # fmt: skip
            st.button("Delete", key="label-delete", icon=":material/delete:", on_click=_delete, args=(ids,), help="Can be undone.")
            common = sorted(set.intersection(*(set(entry.labels.tags) for entry in entries)))
            key = f"label-tags-{'-'.join(run[-4:] for run in ids[:8])}"
            st.multiselect(
                "Tags", common, common, key=key, accept_new_options=True, on_change=partial(_tags, ids, common, key), placeholder="Add a tag", width=320
            )
        if len(entries) == 1:
            note_key = f"label-note-{ids[0]}"
            st.session_state.setdefault(note_key, entries[0].labels.note)
            st.text_area("Note", key=note_key, height=80, max_chars=labels.MOST_NOTE, on_change=partial(_note, ids[0], note_key))


def _button(label: str, key: str, icon: str, ids: Sequence[str], change: Callable[..., object]) -> None:
    st.button(label, key=f"label-{key}", icon=icon, on_click=_each, args=(ids, change))


def _each(ids: Sequence[str], change: Callable[..., object]) -> None:
    try:
        for run in ids:
            change(Store().get(run).path)
    except BitpressError as error:
        state.session().notice = error


def _note(run: str, key: str) -> None:
    _each([run], lambda folder: labels.change_labels(folder, note=st.session_state[key]))


def _tags(ids: Sequence[str], before: Sequence[str], key: str) -> None:
    """What was added goes to every selected run, what was taken away leaves every one; other tags of theirs stay."""
    now = st.session_state[key]

    def change(folder: object) -> None:
        kept = [tag for tag in labels.read_labels(folder).tags if tag not in set(before) - set(now)]  # type: ignore[arg-type]
        labels.change_labels(folder, tags=[*kept, *now])  # type: ignore[arg-type]

    _each(ids, change)


def _delete(ids: Sequence[str]) -> None:
    _each(ids, labels.delete)
    st.session_state[DELETED] = tuple(ids)
    st.session_state.pop("compare-table", None)


def empty_old_bin() -> None:
    """Once a visit: what was deleted a week ago goes for good, as the offer to undo says."""
    if not st.session_state.get(EMPTIED):
        st.session_state[EMPTIED] = True
        labels.empty_bin()


def undo_deletion() -> None:
    """The offer to take the last deletion back."""
    if ids := st.session_state.get(DELETED):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(f":material/delete: {counted(len(ids), 'run')} deleted; gone for good after a week.", width="content")
            st.button("Undo", key="undo-delete", icon=":material/undo:", type="tertiary", on_click=_undo, args=(ids,))


def _undo(ids: Sequence[str]) -> None:
    _each(ids, labels.restore)
    st.session_state.pop(DELETED, None)
