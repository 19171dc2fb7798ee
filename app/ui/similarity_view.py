"""How alike a run's tokens are, before and after: two histograms of cosines. Knows the run's file; measures nothing."""

import plotly.graph_objects as go
import streamlit as st

from bitpress.app.ui import charts
from bitpress.app.ui.numbers import amount
from bitpress.app.ui.theme import COMPRESSED_COLOUR, DENSE_COLOUR
from bitpress.engine.runs.store import Run
from bitpress.engine.similarity_file import Alike, read_similarity

HEADINGS = {"embedding": "Embeddings of two tokens", "last state": "Last states of two tokens of a text"}


def similarity_charts(run: Run) -> None:
    """Both kinds side by side, each with its table; a sentence where the run has none."""
    found = read_similarity(run.path)
    if not found:
        st.caption("How alike two tokens look to the model, before and after. Written at the end of a run that compresses.")
        return
    for column, (kind, sides) in zip(st.columns(len(found)), found.items(), strict=True):
        with column:
            st.markdown(f"**{HEADINGS.get(kind, kind)}**")
            _chart(kind, sides, f"alike-{run.id}-{kind.replace(' ', '-')}")
    st.caption("Cosine of random pairs. When few bits make tokens look the same, the compressed curve moves to the right, towards 1.")


def _chart(kind: str, sides: dict[str, Alike], key: str) -> None:
    words = f"mean cosine {amount(sides['dense'].mean)} dense, {amount(sides['compressed'].mean)} compressed"
    chart = charts.kept(key, sides, lambda: similarity_figure(sides))
    charts.show(chart, key, f"{HEADINGS.get(kind, kind)}: {words}", similarity_table(sides), note=words)


def similarity_table(sides: dict[str, Alike]) -> charts.Table:
    """The share of pairs, a row a bin."""
    return {"cosine": sides["dense"].centres, **{side: list(alike.share) for side, alike in sides.items()}}


def similarity_figure(sides: dict[str, Alike]) -> go.Figure:
    """A line a side over the cosine."""
    chart = charts.figure(x="cosine", y="share of pairs", legend=True)
    charts.line(chart, sides["dense"].centres, sides["dense"].share, "dense", DENSE_COLOUR, dash="dash")
    charts.line(chart, sides["compressed"].centres, sides["compressed"].share, "compressed", COMPRESSED_COLOUR)
    return chart
