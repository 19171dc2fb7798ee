"""Where the zeros of one layer of a finished run are: weights before and after, zeros by patch, and the first corner weight by weight. Reads a file; no torch.

`engine/mask_stats.py` documents the record; the run writes it as it finishes the layer.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import streamlit as st

from bitpress.app.ui import charts
from bitpress.app.ui.theme import AMOUNT

HEIGHT = 220
PANELS = (("before", "|w| before"), ("after", "|w| after"), ("share", "Share of zeros"), ("corner", "First corner: dark stays"))


def read_mask(run_folder: Path, layer: str) -> dict[str, Any] | None:
    """The record of a layer, None where the run pruned no such layer or the file cannot be read."""
    try:
        record = json.loads((run_folder / "masks" / f"{layer}.json").read_text(encoding="utf8"))
    except (OSError, ValueError):
        return None
    return record if record.get("v") == 1 else None


def grids(record: Mapping[str, Any]) -> dict[str, list[list[float]]]:
    """The four pictures as rows of numbers."""
    corner = [[float(mark) for mark in row] for row in record["corner"]]
    return {name: corner if name == "corner" else record[name] for name, _ in PANELS}


def alt_text(record: Mapping[str, Any]) -> str:
    """What a screen reader says of the pictures."""
    rows, columns = record["shape"]
    return f"{record['zeros']:.1%} of the {rows} by {columns} weights of {record['layer']} are zero."


def mask_picture(record: Mapping[str, Any], key: str = "mask") -> None:
    """Draw the four pictures side by side, before and after on one scale."""
    st.markdown(f"**Zeros in this layer** · {alt_text(record)}")
    pictures = grids(record)
    top = max(max(row) for row in pictures["before"]) or 1.0
    with st.container(horizontal=True, gap="small"):
        for name, title in PANELS:
            with st.container(width="stretch"):
                st.caption(title)
                limit = top if name in ("before", "after") else 1.0
                charts.show(_heatmap(pictures[name], limit), f"{key}-{name}", f"{title}. {alt_text(record)}", {}, fold=False)
    with st.expander("As a table", key=f"{key}-twin"):
        share = pictures["share"]
        charts.twin({"patch row": list(range(len(share))), "share of zeros": [sum(row) / len(row) for row in share]}, key)


def _heatmap(rows: list[list[float]], top: float) -> go.Figure:
    chart = charts.figure(HEIGHT)
    scale = [[index / (len(AMOUNT) - 1), colour] for index, colour in enumerate(AMOUNT)]
    chart.add_heatmap(z=rows, zmin=0, zmax=top, colorscale=scale, showscale=False, hovertemplate="%{z:.3g}<extra></extra>")
    chart.update_xaxes(visible=False)
    chart.update_yaxes(visible=False, autorange="reversed")
    return chart
