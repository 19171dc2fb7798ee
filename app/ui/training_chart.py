"""A training while it runs and what it came to: error on held-out text over the steps, and before and after for each block. Knows a run's view."""

import plotly.graph_objects as go
import streamlit as st

from bitpress.app.ui import charts
from bitpress.app.ui.numbers import amount, signed_percent
from bitpress.app.ui.run_view import RunView, Training
from bitpress.app.ui.theme import COMPRESSED_COLOUR, DENSE_COLOUR

HEIGHT = 230


def training_chart(view: RunView, key: str) -> None:
    """The newest training; with more than one block the table has all of them."""
    training = list(view.trainings.values())[-1]
    st.markdown(f"**{title(training)}**")
    words = so_far(training)
    shown = charts.kept(key, training.held_out, lambda: training_figure(training))
    charts.show(shown, key, f"{title(training)}: {words}", training_table(view), table_label="All blocks as a table", note=words)


def title(training: Training) -> str:
    """What is trained."""
    return "Training of the model" if training.block is None else f"Training of block {training.block}"


def so_far(training: Training) -> str:
    """From which error to which, and where in the steps."""
    found = training.held_out
    if not found:
        return f"step {training.last} of {training.steps}"
    (_, start), (at, best) = found[0], min(found, key=lambda point: point[1])
    change = f", {signed_percent(best / start - 1)}" if start > 0 else ""
    return f"Held-out error {amount(start)} → {amount(best)}{change} at step {at}; step {training.last} of {training.steps}"


def training_figure(training: Training) -> go.Figure:
    """Held-out error over the steps, and the error of the start as a dashed line."""
    found = training.held_out
    chart = charts.figure(HEIGHT, "step", "error on held-out text", legend=True)
    if found:
        steps, values = [float(step) for step, _ in found], [value for _, value in found]
        charts.line(chart, [0.0, float(training.steps)], [values[0]] * 2, "start", DENSE_COLOUR, dash="dash")
        charts.line(chart, steps, values, "held out", COMPRESSED_COLOUR, marks="circle")
        chart.update_xaxes(range=[0, max(1, training.steps)])
    return chart


def training_table(view: RunView) -> charts.Table:
    """A row a training: the error of its start, its least and the step of that."""
    rows = [(item, item.held_out) for item in view.trainings.values() if item.held_out]
    best = [min(found, key=lambda point: point[1]) for _, found in rows]
    return {
        "block": ["whole model" if item.block is None else item.block for item, _ in rows],
        "error at the start": [found[0][1] for _, found in rows],
        "least error": [value for _, value in best],
        "at step": [step for step, _ in best],
        "steps": [item.steps for item, _ in rows],
    }
