"""The recipe's lines as a table that can be edited: later lines win. Knows lines and their table form.

The editor's own value is never fed back to it: its deltas are applied to the recipe, and a new key draws it afresh.
What a line sets beyond the columns (a format, activations, the factors of a rank) stays with its row through every edit.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st

from bitpress.app import edits, state
from bitpress.app.ui.controls import WIDTHS, try_edit
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import PATTERNS, SchemeLine

COLUMNS = {"match": "object", "bits": "Int64", "group": "Int64", "symmetric": "boolean", "zeros": "Int64", "pattern": "object", "rank": "Int64"}
PATTERN_HELP = "Names, globs, role:v, role:mlp, blocks:first2, blocks:3-5; & for and, comma for or."
Row = dict[str, Any]


def row_of(line: SchemeLine) -> Row:
    """A line as a row; what it does not set is None. Group 0 stands for a whole row, bits 16 for dense. `line` holds the line itself."""
    row: Row = dict.fromkeys(COLUMNS)
    row["line"] = line.model_dump(exclude_none=True)
    row["match"] = line.match
    if line.weights == "dense":
        row["bits"] = edits.DENSE_BITS
    elif line.weights:
        row |= {"bits": line.weights.bits, "group": line.weights.group_size, "symmetric": line.weights.symmetric}
    if line.sparsity == "dense":
        row["zeros"] = 0
    elif line.sparsity:
        row |= {"zeros": round(100 * line.sparsity.ratio), "pattern": line.sparsity.pattern}
    if line.rank == "dense":
        row["rank"] = 100
    elif line.rank and line.rank.keep:
        row["rank"] = round(100 * line.rank.keep)
    return row


def line_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The line that a row stands for, as plain values; the recipe's schema checks them."""
    before = row.get("line") or {}
    line = _beyond(before, ("match", "weights", "sparsity", "rank")) | {"match": str(row.get("match") or "*").strip()}
    weights = {"bits": row.get("bits"), "group_size": row.get("group"), "symmetric": row.get("symmetric")}
    set_weights = {name: value if isinstance(value, bool) else int(value) for name, value in weights.items() if value is not None}
    if set_weights.get("bits") == edits.DENSE_BITS:
        line["weights"] = "dense"
    elif merged := _beyond(before.get("weights"), weights) | set_weights:
        line["weights"] = merged
    if row.get("zeros") is not None:
        pattern = row.get("pattern") or PATTERNS[0]
        line["sparsity"] = {"ratio": int(row["zeros"]) / 100 if pattern == PATTERNS[0] else 0.5, "pattern": pattern} if row["zeros"] else "dense"
    if row.get("rank") is not None:
        line["rank"] = _beyond(before.get("rank"), ("keep",)) | {"keep": int(row["rank"]) / 100} if row["rank"] < 100 else "dense"
    return line


def _beyond(part: Any, columns: Collection[str]) -> dict[str, Any]:
    """What a part of a line sets that no column shows."""
    return {name: value for name, value in part.items() if name not in columns} if isinstance(part, Mapping) else {}


def apply_deltas(rows: Sequence[Row], deltas: Mapping[str, Any]) -> list[Row]:
    """The rows after what the editor reports: `edited_rows` by position, `deleted_rows`, `added_rows`."""
    changed = [{**row, **deltas.get("edited_rows", {}).get(index, {})} for index, row in enumerate(rows)]
    gone = set(deltas.get("deleted_rows", ()))
    added = [{**dict.fromkeys(COLUMNS), **row} for row in deltas.get("added_rows", ()) if row.get("match") and len(row) > 1]
    return [row for index, row in enumerate(changed) if index not in gone] + added


def exceptions_table(anatomy: Anatomy) -> None:
    """Draw the table; an edit that the recipe refuses is told and leaves the recipe alone."""
    rows = [row_of(line) for line in state.session().recipe.schemes]
    key = f"lines-{state.session().edits}-{st.session_state.get('lines-refused', 0)}"

    def take() -> None:
        deltas = st.session_state[key]
        waits_for_more = deltas.get("added_rows") and not apply_deltas([], deltas) and not deltas.get("edited_rows") and not deltas.get("deleted_rows")
        if waits_for_more:
            return
        before = state.session().edits
        try_edit(lambda: edits.with_lines(state.session().recipe, [line_of(row) for row in apply_deltas(rows, deltas)], anatomy))
        if state.session().edits == before:
            st.session_state["lines-refused"] = st.session_state.get("lines-refused", 0) + 1

    frame = pd.DataFrame({name: pd.array([row[name] for row in rows], dtype=kind) for name, kind in COLUMNS.items()})
    st.data_editor(
        frame, key=key, num_rows="dynamic", on_change=take, hide_index=True, height="content",
        placeholder="", alt="Lines of the recipe; later lines win",
        column_config={
            "match": st.column_config.TextColumn("layers", required=True, help=PATTERN_HELP),
            "bits": st.column_config.SelectboxColumn("bits", options=list(WIDTHS), help="16 leaves the layers dense."),
            "group": st.column_config.NumberColumn("group", min_value=0, step=1, help="Weights that share a scale; 0 for a whole row."),
            "symmetric": st.column_config.CheckboxColumn("symmetric"),
            "zeros": st.column_config.NumberColumn("zeros, %", min_value=0, max_value=95, step=1),
            "pattern": st.column_config.SelectboxColumn("pattern", options=list(PATTERNS)),
            "rank": st.column_config.NumberColumn("rank, %", min_value=1, max_value=100, step=1, help="Share of break-even; 100 leaves the layers whole."),
        },
    )  # fmt: skip
