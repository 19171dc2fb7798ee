"""Charts in one manner: a thin figure over plain values, alternative text, and the same numbers as a table. Knows no run and no model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import streamlit as st

Table = Mapping[str, Sequence[Any]]  # column name -> values, all of one length
HEIGHT = 240


def figure(height: int = HEIGHT, x: str = "", y: str = "", log_y: bool = False, legend: bool = False) -> go.Figure:
    """An empty figure with the house's margins and axis titles; colours come from Streamlit's theme."""
    chart = go.Figure()
    chart.update_layout(
        height=height, margin={"l": 8, "r": 8, "t": 24 if legend else 8, "b": 8}, uirevision="kept", showlegend=legend, hovermode="x unified",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, modebar={"remove": ["zoom", "pan", "lasso", "select", "autoscale"]},
    )  # fmt: skip
    chart.update_xaxes(title_text=x, title_standoff=4)
    chart.update_yaxes(title_text=y, title_standoff=14, type="log" if log_y else "linear")
    if log_y:
        chart.update_yaxes(dtick=1 if log_y else None)
    return chart


def kept(key: str, values: Any, build: Callable[[], go.Figure]) -> go.Figure:
    """The figure that `build` makes of `values`, kept in the tab and built again only when they differ: building takes Plotly longer than drawing."""
    before = st.session_state.get(f"{key}-figure")
    if before is None or before[0] != values:
        before = st.session_state[f"{key}-figure"] = (values, build())
    return before[1]


def show(chart: go.Figure, key: str, alt: str, table: Table, table_label: str = "As a table", fold: bool = True, note: str = "") -> None:
    """Draw a figure with its alternative text, a note under it, and its table twin below, folded away; none with `fold` off."""
    st.plotly_chart(chart, key=key, alt=alt, theme="streamlit", config={"displayModeBar": False})
    if note:
        st.caption(note)
    if fold:
        folded_twin(table, key, table_label)


def folded_twin(table: Table, key: str, label: str = "As a table") -> None:
    """The numbers of a chart, folded away; they are sent once it is opened."""
    folded = st.expander(label, key=f"{key}-twin", on_change="rerun")
    if folded.open:
        with folded:
            twin(table, key)


def twin(table: Table, key: str) -> None:
    """The numbers of a chart as a table that can be sorted and copied."""
    st.dataframe({name: list(values) for name, values in table.items()}, hide_index=True, height=200, key=f"{key}-table")


def line(chart: go.Figure, x: Sequence[float], y: Sequence[float], name: str, colour: str, dash: str = "solid", marks: str | None = None) -> None:
    """Add a line; give `marks` a symbol so that colour is not all that tells it from the next one."""
    mode = "lines+markers" if marks else "lines"
    chart.add_scatter(
        x=list(x), y=list(y), name=name, mode=mode, line={"color": colour, "dash": dash, "width": 2}, marker={"symbol": marks or "circle", "size": 6}
    )


def band(chart: go.Figure, x: Sequence[float], low: Sequence[float], high: Sequence[float], name: str, colour: str) -> None:
    """Add a shaded interval between two curves."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    chart.add_scatter(
        x=[*x, *reversed(x)], y=[*high, *reversed(low)], name=name, fill="toself", mode="lines",
        fillcolor=f"rgba({red},{green},{blue},0.18)", line={"width": 0}, hoverinfo="skip",
    )  # fmt: skip


def bars(chart: go.Figure, x: Sequence[Any], y: Sequence[float], name: str, colour: str) -> None:
    """Add bars that touch, as a histogram has them."""
    chart.add_bar(x=list(x), y=list(y), name=name, marker={"color": colour, "line": {"width": 0}})
    chart.update_layout(bargap=0.05)
