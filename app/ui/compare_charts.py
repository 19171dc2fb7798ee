"""The charts of the compare page: Pareto plot, parallel coordinates, colours of the table. Knows entries; reads no file."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import streamlit as st
from plotly.subplots import make_subplots

from bitpress.app.ui import charts
from bitpress.app.ui.compare_view import PROTOCOL_BOUND, QUANTITIES, SHORT, Entry, front, heading, placed, title_of
from bitpress.app.ui.numbers import amount, counted
from bitpress.app.ui.parallel_lines import Axis, parallel_lines
from bitpress.app.ui.theme import ACCENT, DENSE_COLOUR

BETTER_WORSE = {"light": ("#1f68bc", "#b35000"), "dark": ("#7db0ec", "#f09a50")}  # each at least 4.5:1 on its ground
HEIGHT = 420
LOG = ("perplexity", "kl", "ttft")
MOST_STYLED = 1000
SIZES = ("size", "linear_bits", "model_bits")  # the same thing three times: no panels for each other
ACROSS, PANEL = 4, 210  # small panels: how many beside each other, and their height


def coloured(rows: Mapping[str, Sequence[Any]]) -> Any:
    """The table with better in blue and worse in orange; the sign and the triangle say the same."""
    frame = pd.DataFrame({name: list(values) for name, values in rows.items()})
    deltas = [name for name in frame.columns if name.startswith("Δ")]
    if len(frame) > MOST_STYLED or not deltas:
        return frame
    better, worse = BETTER_WORSE["dark" if st.context.theme.type == "dark" else "light"]
    colour = {"▲": f"color: {better}; font-weight: 600", "▽": f"color: {worse}; font-weight: 600"}
    return frame.style.map(lambda text: colour.get(str(text)[:1], ""), subset=deltas)


def pareto_figure(shown: Sequence[Entry], front: Sequence[Entry], best: Entry | None, curve: Sequence[Entry], x: str, y: str) -> go.Figure:
    """Runs as points, the front as a line, the knee as a star, uniform widths as a reference curve."""
    chart = charts.figure(HEIGHT, heading(x), heading(y), log_y=False, legend=True)
    chart.update_layout(hovermode="closest", dragmode=False, clickmode="event+select")
    on_front = {entry.id for entry in front}
    if len(curve) > 1:
        chart.add_scatter(x=[entry.figures[x] for entry in curve], y=[entry.figures[y] for entry in curve], name="uniform widths", mode="lines+markers",
                          line={"color": DENSE_COLOUR, "dash": "dot"}, marker={"symbol": "diamond-open", "size": 11}, hoverinfo="skip")  # fmt: skip
    behind = [entry for entry in shown if entry.id not in on_front]
    _points(chart, behind, x, y, "dominated", {"symbol": "circle-open", "size": 8, "color": DENSE_COLOUR, "line": {"width": 1.5}}, "markers")
    _points(chart, front, x, y, "front", {"symbol": "circle", "size": 10, "color": ACCENT}, "lines+markers")
    if best is not None:
        _points(chart, [best], x, y, "knee", {"symbol": "star", "size": 19, "color": "#e07a1f", "line": {"width": 1, "color": "#11151c"}}, "markers")
    return chart


def _points(chart: go.Figure, entries: Sequence[Entry], x: str, y: str, name: str, marker: dict[str, Any], mode: str) -> None:
    if entries:
        texts = [
            f"{title_of(entry)}<br>" + "<br>".join(f"{heading(key)}: {amount(value)}" for key, value in entry.figures.items() if key in SHORT)
            for entry in entries
        ]
        chart.add_scatter(
            x=[entry.figures[x] for entry in entries], y=[entry.figures[y] for entry in entries], name=name, mode=mode, marker=marker,
            line={"color": ACCENT, "width": 2}, customdata=[[entry.id] for entry in entries], text=texts, hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip


def pareto_alt(shown: Sequence[Entry], front: Sequence[Entry], best: Entry | None, x: str, y: str) -> str:
    """The plot in a sentence."""
    at = f"; the knee is {title_of(best)} at {amount(best.figures[x])} and {amount(best.figures[y])}" if best else ""
    return f"{heading(y)} against {heading(x)} of {counted(len(shown), 'run')}, {len(front)} of them on the Pareto front{at}"


def pareto_note(front: Sequence[Entry], best: Entry | None, x: str, y: str) -> str:
    """What to make of it."""
    better = [f"{'less' if QUANTITIES[name].less else 'more'} {QUANTITIES[name].title.lower()}" for name in (x, y)]
    knee = f" Knee (farthest from the line between the ends): **{title_of(best)}**." if best else " Too few points on the front for a knee."
    return f"{counted(len(front), 'run')} on the front; better is {' and '.join(better)}.{knee}"


def pareto_twin(placed: Sequence[Entry], front: Sequence[Entry], best: Entry | None, x: str, y: str) -> None:
    """The plot's numbers."""
    folded = st.expander("As a table", key="pareto-twin", on_change="rerun")
    if folded.open:
        on_front = {entry.id for entry in front}
        place = ["knee" if best and entry.id == best.id else "front" if entry.id in on_front else "dominated" for entry in placed]
        rows = {"run": [entry.id for entry in placed], "plan": [entry.title for entry in placed], "place": place}
        with folded:
            charts.twin({**rows, **{heading(name): [entry.figures[name] for entry in placed] for name in (x, y)}}, "pareto")


def parallel(entries: Sequence[Entry]) -> None:
    """Every quantity that all of these runs have as an axis, a line a run; drag along an axis to pick out lines."""
    names = [name for name in QUANTITIES if entries and all(entry.get(name) is not None for entry in entries)]
    if len(names) < 2 or len(entries) < 2:
        st.caption("Two runs with two figures in common are needed.")
        return
    axes = [Axis(heading(name), [entry.figures[name] for entry in entries], QUANTITIES[name].less, name in LOG) for name in names]
    alt = (
        f"Parallel coordinates of {len(entries)} runs over {', '.join(QUANTITIES[name].title.lower() for name in names)}; lower lines on every axis are better"
    )
    parallel_lines([title_of(entry) for entry in entries], axes, "parallel-lines", alt)
    st.caption("Lower is better on every axis: those where more is better are turned round. Drag along an axis to pick out runs; point at a line to read it.")
    rows = {"run": [entry.id for entry in entries], "plan": [entry.title for entry in entries]}
    charts.folded_twin({**rows, **{axis.label: axis.values for axis in axes}}, "parallel-chart")


def small_multiples(entries: Sequence[Entry], base: Entry | None) -> None:
    """Every other quantity against stored size, a small panel each on one scale of sizes; the front of each is joined, the baseline dashed."""
    names = [name for name in QUANTITIES if name not in SIZES and sum(entry.get(name) is not None for entry in entries) > 1]
    sized = [entry for entry in entries if entry.get("size") is not None]
    if not names or len(sized) < 2:
        st.caption("Two runs with a size and one more figure are needed.")
        return
    values = ([entry.id for entry in sized], names, base.id if base else "")
    chart = charts.kept("multiples", values, lambda: _multiples_figure(sized, names, base))
    titles = ", ".join(QUANTITIES[name].title.lower() for name in names)
    alt = f"{counted(len(names), 'small panel')} over stored size, for {counted(len(sized), 'run')}: {titles}"
    rows = {"run": [entry.id for entry in sized], "plan": [entry.title for entry in sized]}
    figures = {heading(name): [entry.get(name) for entry in sized] for name in ("size", *names)}
    note = "Stored size across, in MB. Joined: no run is at least as small and better. Dashed: the baseline. Quality is of the commonest text only."
    charts.show(chart, "multiples-chart", alt, {**rows, **figures}, note=note)


def _multiples_figure(entries: Sequence[Entry], names: Sequence[str], base: Entry | None) -> go.Figure:
    lines = -(-len(names) // ACROSS)
    chart = make_subplots(lines, ACROSS, shared_xaxes=True, subplot_titles=[heading(name) for name in names], vertical_spacing=0.16 / lines,
                          horizontal_spacing=0.07)  # fmt: skip
    for place, name in enumerate(names):
        row, column = place // ACROSS + 1, place % ACROSS + 1
        there = placed(entries, "size", name)
        joined = front(there, "size", name)
        on_front = {entry.id for entry in joined}
        behind = [entry for entry in there if entry.id not in on_front]
        for group, mode, colour, symbol in ((behind, "markers", DENSE_COLOUR, "circle-open"), (joined, "lines+markers", ACCENT, "circle")):
            chart.add_scatter(
                x=[entry.figures["size"] for entry in group], y=[entry.figures[name] for entry in group], text=[title_of(entry) for entry in group],
                mode=mode, marker={"size": 7, "color": colour, "symbol": symbol}, line={"color": colour, "width": 1.5}, row=row, col=column,
                hovertemplate="%{text}<br>%{x:.4g} MB: %{y:.4g}<extra></extra>",
            )  # fmt: skip
        if base is not None and base.get(name) is not None and (name not in PROTOCOL_BOUND or base.protocol == there[0].protocol):
            chart.add_hline(y=base.figures[name], line={"color": DENSE_COLOUR, "dash": "dash", "width": 1}, row=row, col=column)
        if name in LOG:
            chart.update_yaxes(type="log", exponentformat="power", row=row, col=column)
    chart.update_layout(height=PANEL * lines, showlegend=False, margin={"l": 8, "r": 8, "t": 30, "b": 8}, hovermode="closest")
    chart.update_annotations(font_size=13)
    return chart
