"""The two charts of the autotune page: the frontier, and predicted against measured. Knows plain values; solves nothing."""

import math
from collections.abc import Sequence

import plotly.graph_objects as go
import streamlit as st

from bitpress.app.ui import autotune_view as view
from bitpress.app.ui import charts
from bitpress.app.ui.numbers import amount, counted
from bitpress.app.ui.theme import ACCENT, DENSE_COLOUR
from bitpress.engine.allocate import Allocation, Curve
from bitpress.engine.model.anatomy import Anatomy

MEASURED_COLOUR = "#a74a00"
CHART = 330
MANY, FAINT = 50, 0.45  # from so many runs on, marks let those behind them through


def frontier_chart(anatomy: Anatomy, curve: Curve, found: Allocation | None, runs: Sequence[view.Measured], axis: str) -> None:
    """Every best choice at once, the chosen one, uniform recipes and measured runs."""
    x = [view.x_of(point, axis, anatomy) for point in curve.points]
    y = [max(point.harm, 1e-6) for point in curve.points]
    uniform = {name: point for name, point in curve.uniform.items() if point.harm > 0}
    here = (_here(found, axis, anatomy), max(found.predicted["kl"], 1e-6)) if found else None
    near = [run for run in runs if run.kl > 0]
    values = (x, y, [(name, point.bytes, point.harm) for name, point in uniform.items()], here, near, axis)
    chart = charts.kept("frontier", values, lambda: _frontier_figure(anatomy, curve, x, y, here, near, axis))
    alt = f"Predicted divergence against {view.AXES[axis].lower()}: a falling frontier of {len(x)} points, {len(uniform)} uniform recipes above it"
    alt += f", the chosen one at {amount(here[0])} with {amount(here[1])} nat" if here else ""
    rows: dict[str, list[object]] = {
        "what": ["frontier"] * len(x) + [f"uniform {name}" for name in uniform] + [f"measured {run.title}" for run in near],
        view.AXES[axis]: x + [view.x_of(point, axis, anatomy) for point in uniform.values()] + [view.x_of(run, axis, anatomy) for run in near],
        "divergence, nat a token": y + [point.harm for point in uniform.values()] + [run.kl for run in near],
    }
    charts.show(chart, "frontier-chart", alt, rows)


def _here(found: Allocation, axis: str, anatomy: Anatomy) -> float:
    predicted = found.predicted
    return {"linear_bits": predicted["bits_per_weight_linears"], "model_bits": predicted["bits_per_weight_model"], "bytes": predicted["bytes"] / 1e6}[axis]


def _frontier_figure(anatomy: Anatomy, curve: Curve, x: list[float], y: list[float], here: tuple[float, float] | None,
                     runs: Sequence[view.Measured], axis: str) -> go.Figure:  # fmt: skip
    chart = charts.figure(CHART, view.AXES[axis], "divergence, nat a token", log_y=True, legend=True)
    chart.update_layout(hovermode="closest")
    charts.line(chart, x, y, "best by the scores", ACCENT)
    uniform = {name: point for name, point in curve.uniform.items() if point.harm > 0}
    chart.add_scatter(
        x=[view.x_of(point, axis, anatomy) for point in uniform.values()], y=[point.harm for point in uniform.values()], text=list(uniform), name="uniform",
        mode="markers+text", textposition="top right", marker={"symbol": "diamond-open", "size": 10, "color": DENSE_COLOUR, "line": {"width": 2}},
        hovertemplate="uniform %{text}: %{y:.3g} nat<extra></extra>",
    )  # fmt: skip
    if runs:
        chart.add_scatter(
            x=[view.x_of(run, axis, anatomy) for run in runs], y=[run.kl for run in runs], text=[run.title for run in runs],
            name="measured runs", mode="markers",
            marker={"symbol": "circle", "size": 8, "color": MEASURED_COLOUR, "opacity": _strength(runs)},
            hovertemplate="%{text}: measured %{y:.3g} nat<extra></extra>",
        )  # fmt: skip
    if here:
        chart.add_scatter(x=[here[0]], y=[here[1]], name="chosen", mode="markers", marker={"symbol": "star", "size": 17, "color": ACCENT, "line": {"width": 1}})
    visible = [value for value in (*y, *(point.harm for point in uniform.values()), *(run.kl for run in runs)) if value > 1e-5]
    if visible:
        chart.update_yaxes(range=[math.log10(min(visible)) - 0.2, math.log10(max(visible)) + 0.6], exponentformat="power")
        shown = [place for place, harm in zip(x, y, strict=True) if harm >= min(visible)]
        chart.update_xaxes(range=[min(shown) - 0.04 * (max(shown) - min(shown)), max(shown) + 0.04 * (max(shown) - min(shown))])
    return chart


def _strength(runs: Sequence[view.Measured]) -> float:
    return FAINT if len(runs) > MANY else 1.0


def check_chart(runs: Sequence[view.Measured]) -> None:
    """How far predictions can be trusted: every finished run of this model on one text."""
    pairs = [run for run in runs if run.predicted and run.kl > 0]
    st.markdown("**Predicted against measured**")
    if not pairs:
        st.caption("Verify a recipe, or compress one on the explore page: every finished run of this model appears here.")
        return
    rho = view.rank_correlation(runs)
    x, y = [run.predicted or 0.0 for run in pairs], [run.kl for run in pairs]
    chart = charts.kept("check", (x, y), lambda: _check_figure(pairs, x, y))
    order = f"rank correlation {amount(rho, 2)}" if rho is not None else "too few runs for a rank correlation"
    alt = f"Measured against predicted divergence of {counted(len(pairs), 'run')}, with the diagonal: {order}"
    rows = {"run": [run.run for run in pairs], "plan": [run.title for run in pairs], "predicted, nat": x, "measured, nat": y}
    note = f"{counted(len(pairs), 'run')} on {pairs[0].text}: {order}; {view.error_so_far(pairs)}."
    charts.show(chart, "check-chart", alt, rows, note=note)


def _check_figure(runs: Sequence[view.Measured], x: list[float], y: list[float]) -> go.Figure:
    chart = charts.figure(260, "predicted divergence, nat a token", "measured", log_y=True)
    chart.update_layout(hovermode="closest")
    chart.update_xaxes(type="log", dtick=1, exponentformat="power")
    chart.update_yaxes(exponentformat="power")
    ends = [min(*x, *y) * 0.7, max(*x, *y) * 1.4]
    charts.line(chart, ends, ends, "as predicted", DENSE_COLOUR, "dash")
    chart.add_scatter(x=x, y=y, text=[run.title for run in runs], mode="markers", name="runs",
                      marker={"size": 9, "color": MEASURED_COLOUR, "opacity": _strength(runs)},
                      hovertemplate="%{text}<br>predicted %{x:.3g}, measured %{y:.3g} nat<extra></extra>")  # fmt: skip
    return chart
