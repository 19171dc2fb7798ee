"""A grid of squares that a person can select in: columns are blocks, rows are roles. Knows cells and selections, and of a model only where its matrices stand.

Drawn by our own component (`layer_map.js`): a Plotly chart loses its selection when it is recoloured and cannot take clicks
and boxes at once. The selection lives in the session under the component's key, so it survives recolouring and page changes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import streamlit as st

from bitpress.app.ui.component import own_component
from bitpress.app.ui.theme import AMOUNT, STEPS, palette
from bitpress.engine.model.anatomy import Anatomy, Part

_component = own_component("layer_map")


@dataclass(frozen=True)
class Cell:
    """One square. `column` None puts it in the band under the grid, where it is wide and carries its own label.

    value: place on the colour scale in 0..1, None for the neutral grey. text: drawn in the square where it fits. size: side of the
    square, 1 is full. level: length of the thin bar in the square, a second signal beside colour. state: "" or one of
    removed (outline), pending (faint), fresh (marked for a moment), locked, missing (a dot, cannot be selected).
    """

    id: str
    row: str
    column: int | None = None
    value: float | None = None
    text: str = ""
    title: str = ""
    size: float = 1.0
    level: float | None = None
    state: str = ""


@dataclass(frozen=True)
class Legend:
    """What the colours mean: a title, (label, place on the scale in 0..1 or None for grey) steps, and notes on the other marks."""

    title: str = ""
    steps: tuple[tuple[str, float | None], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Selection:
    """The ids that are selected now, in the order of the cells."""

    ids: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.ids)


def grid(anatomy: Anatomy, draw: Callable[[Part], Cell]) -> list[Cell]:
    """A square for every role and block, drawn of the matrix that stands there; a dot where a block has none of the role."""
    found = {(part.role, part.block): part for part in anatomy.linears}
    return [
        draw(found[role, block]) if (role, block) in found else Cell(f"{role}-{block}", role, block, title=f"Block {block} has no {role}", state="missing")
        for role in anatomy.roles
        for block in range(anatomy.blocks)
    ]


def selected(key: str) -> tuple[str, ...]:
    """The ids that are selected in the map of this key, before or after it is drawn."""
    return _kept(key)[1]


def select(key: str, ids: Iterable[str]) -> None:
    """Set the selection from Python; the map takes it over the next time it is drawn."""
    st.session_state[f"{key}-selection"] = (_kept(key)[0] + 1, tuple(ids))


def layer_map(
    cells: Sequence[Cell],
    key: str,
    *,
    label: str,
    legend: Legend | None = None,
    scale: Sequence[str] = AMOUNT,
    columns: Sequence[str] | None = None,
    column_title: str = "block",
) -> Selection:
    """Draw the map and give back what is selected in it.

    `columns` names the columns where they are not plain block numbers. `label` is what a screen reader says of the whole map.
    """
    known = {cell.id for cell in cells if cell.state != "missing"}
    count, ids = _kept(key)
    kept = tuple(name for name in ids if name in known)
    payload = {**_grid(cells, columns), "palette": palette(scale), "legend": _legend(legend), "label": label, "columnTitle": column_title}
    _component(key=key, data={**payload, "selected": kept, "n": count}, on_selection_change=lambda: _take(key))
    return Selection(kept)


def _kept(key: str) -> tuple[int, tuple[str, ...]]:
    return st.session_state.get(f"{key}-selection", (0, ()))


def _take(key: str) -> None:
    """Keep what the browser sent. It numbers its messages, so that an answer to an older one never undoes a newer click."""
    sent = st.session_state[key].get("selection") or {}
    st.session_state[f"{key}-selection"] = (int(sent.get("n", 0)), tuple(str(name) for name in sent.get("ids", ())))


def _place(value: float | None) -> int:
    return -1 if value is None else round(min(max(value, 0.0), 1.0) * (STEPS - 1))


def _grid(cells: Sequence[Cell], columns: Sequence[str] | None) -> dict[str, Any]:
    """The cells as short lists, which keeps a message of 80 blocks small."""
    rows = list(dict.fromkeys(cell.row for cell in cells if cell.column is not None))
    last = max((cell.column for cell in cells if cell.column is not None), default=-1)
    names = list(columns) if columns is not None else [str(index) for index in range(last + 1)]
    squares = [[c.id, rows.index(c.row), c.column, _place(c.value), c.text, round(c.size, 3), c.level, c.state, c.title] for c in cells if c.column is not None]
    band = [[c.id, c.row, 0, _place(c.value), c.text, round(c.size, 3), c.level, c.state, c.title] for c in cells if c.column is None]
    return {"rows": rows, "columns": names, "cells": squares, "band": band}


def _legend(legend: Legend | None) -> dict[str, Any] | None:
    if legend is None:
        return None
    return {"title": legend.title, "steps": [[text, _place(value)] for text, value in legend.steps], "notes": list(legend.notes)}
