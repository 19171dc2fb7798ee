"""What a run made of one layer's weights: their histogram before and after, and one typical group with its levels. Reads a file; no torch.

`engine/after_stats.py` documents the record; the run writes it as it finishes the layer.
"""

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import streamlit as st

from bitpress.app.ui import charts
from bitpress.app.ui.numbers import amount, whole
from bitpress.app.ui.theme import COMPRESSED_COLOUR, DENSE_COLOUR

HEIGHT = 230
DRAWN_LEVELS = 64  # more lines than this would be a grey surface


def read_after(run_folder: Path, layer: str) -> dict[str, Any] | None:
    """The record of a layer, None where the run made no such layer or the file cannot be read."""
    try:
        record = json.loads((run_folder / "weights" / f"{layer}.json").read_text(encoding="utf8"))
    except (OSError, ValueError):
        return None
    return record if record.get("v") == 1 else None


def after_picture(record: Mapping[str, Any], key: str = "after") -> None:
    """Both charts side by side, each with its table."""
    st.markdown("**What the run made of these weights**")
    left, right = st.columns(2, gap="medium")
    with left:
        st.caption("All weights, before and after")
        charts.show(histogram_figure(record), f"{key}-all", histogram_alt(record), histogram_table(record))
    with right:
        st.caption(f"One typical group: row {whole(record['row'])}, inputs from {whole(record['first'])} on")
        charts.show(
            group_figure(record), f"{key}-group", group_alt(record), group_table(record), note="Circles: the weights before. Crosses: after, on the levels."
        )


def histogram_alt(record: Mapping[str, Any]) -> str:
    """What a screen reader says of the histogram."""
    filled = [sum(1 for count in record[side] if count) for side in ("before", "after")]
    return f"Histogram of all weights: {filled[0]} of {len(record['before'])} bins are filled before, {filled[1]} after."


def group_alt(record: Mapping[str, Any]) -> str:
    """What a screen reader says of the group."""
    levels = record["levels"]
    return f"{len(record['group_before'])} weights of one group on {len(levels)} levels from {amount(levels[0])} to {amount(levels[-1])}."


def histogram_table(record: Mapping[str, Any]) -> charts.Table:
    """A row a bin."""
    return {"from": record["edges"][:-1], "to": record["edges"][1:], "weights before": record["before"], "weights after": record["after"]}


def group_table(record: Mapping[str, Any]) -> charts.Table:
    """A row a weight."""
    first = record["first"]
    return {"input": [first + place for place in range(len(record["group_before"]))], "before": record["group_before"], "after": record["group_after"]}


def histogram_figure(record: Mapping[str, Any]) -> go.Figure:
    """Bars before, an outline after."""
    chart = charts.figure(HEIGHT, x="weight", y="count (log)", log_y=True, legend=True)
    middles = [(low + high) / 2 for low, high in pairwise(record["edges"])]
    charts.bars(chart, middles, record["before"], "before", DENSE_COLOUR)
    chart.add_scatter(x=middles, y=[count or None for count in record["after"]], name="after", mode="lines+markers", connectgaps=False,
                      line={"color": COMPRESSED_COLOUR, "width": 1.5, "shape": "hvh"}, marker={"size": 4})  # fmt: skip
    return chart


def group_figure(record: Mapping[str, Any]) -> go.Figure:
    """Each weight of the group before and after, over the lines of the levels."""
    chart = charts.figure(HEIGHT, x="input of the group", y="weight", legend=True)
    levels = record["levels"]
    for level in levels if len(levels) <= DRAWN_LEVELS else []:
        chart.add_hline(y=level, line={"color": DENSE_COLOUR, "width": 0.7}, opacity=0.6)
    places = list(range(len(record["group_before"])))
    for side, symbol, colour in (("before", "circle-open", DENSE_COLOUR), ("after", "x-thin-open", COMPRESSED_COLOUR)):
        chart.add_scatter(x=places, y=record[f"group_{side}"], name=side, mode="markers", marker={"symbol": symbol, "size": 7, "color": colour})
    return chart
