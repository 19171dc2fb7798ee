"""Cache forms side by side at a length of context: bytes, exact; decode time and perplexity, measured. Knows accounting and runs; measures nothing."""

from functools import partial
from typing import Any

import plotly.graph_objects as go
import streamlit as st

from bitpress.app.ui import charts
from bitpress.app.ui.live_panel import STATE_BADGES, told
from bitpress.app.ui.numbers import signed_percent
from bitpress.app.ui.theme import COMPRESSED_COLOUR, DENSE_COLOUR
from bitpress.engine.accounting import cache_bytes
from bitpress.engine.cache_forms import DENSE, forms
from bitpress.engine.model import library
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import CACHED
from bitpress.engine.runs import jobs
from bitpress.engine.runs.store import Run, Store

WITHOUT_GQA = "without GQA"
POLL_SECONDS = 1.0


def cache_forms(anatomy: Anatomy, tokens: int) -> None:
    """The table at this length, the chart over all lengths measured, and the button that measures."""
    if anatomy.architecture not in CACHED:
        return
    found = measured(anatomy.model)
    sizes = bytes_of(anatomy, tokens)
    rows = rows_at(sizes, found, tokens)
    st.dataframe(rows, hide_index=True, key="cache-forms", alt=f"Cache forms at {tokens} tokens", column_config={
        "MB, exact": st.column_config.NumberColumn(format="%.3g"), "ms a token": st.column_config.NumberColumn(format="%.3g")})  # fmt: skip
    if found and (lengths := sorted(map(int, next(iter(found["forms"].values()))["steps"]))):
        words = f"Time of a decode step behind {lengths[0]:,} to {lengths[-1]:,} tokens"
        charts.show(times_figure(found), "cache-times", words, times_table(found), note=f"{words}. {_noise(found)}")
    active = next((status for status in jobs.active() if status.kind == "caches" and status.model in (anatomy.model, None)), None)
    st.button("Measure these caches", key="cache-measure", icon=":material/timer:", disabled=active is not None, on_click=told(partial(_start, anatomy.model)),
              help="Perplexity on 8 windows through each cache, and decode steps behind contexts up to the model's own. Some minutes.")  # fmt: skip
    if active:
        st.fragment(_wait, run_every=POLL_SECONDS)(active.id)


def _start(model: str) -> None:
    jobs.submit_once("caches", {"model": model})


def _wait(run_id: str) -> None:
    jobs.pump()
    status = Store().get(run_id).status()
    if not status.active:
        st.rerun()
    st.markdown(f"{STATE_BADGES[status.state]} {status.done or 0} of {status.total or '…'}")


def measured(model: str) -> dict[str, Any] | None:
    """The newest record of this model's caches."""
    runs: list[Run] = [Store().get(status.id) for status in Store().list(kind="caches", state="finished")]
    return next((result for run in runs if run.request().get("args", {}).get("model") == model and (result := run.result())), None)


def bytes_of(anatomy: Anatomy, tokens: int) -> dict[str, int]:
    """Exact bytes of every form at a length; that without grouped heads would hold a key head for every query head."""
    plans = forms(anatomy, library.stats_dir(anatomy.model))
    found = {name: cache_bytes(plan, anatomy, tokens) for name, plan in plans.items()}
    without = {WITHOUT_GQA: found[DENSE] * anatomy.heads // anatomy.kv_heads} if anatomy.heads > anatomy.kv_heads else {}
    return without | found


def rows_at(sizes: dict[str, int], found: dict[str, Any] | None, tokens: int) -> charts.Table:
    """A row a form: bytes, share of the dense cache, time at the measured length next to this one, change of perplexity."""
    known = (found or {}).get("forms", {})
    near = {name: min(form["steps"], key=lambda length: abs(int(length) - tokens)) for name, form in known.items() if form["steps"]}
    times = [known[name]["steps"][near[name]]["ms"] if name in near else None for name in sizes]
    changes = [signed_percent(known[name]["ratio"] - 1) if "ratio" in known.get(name, {}) else "not measured" for name in sizes]
    return {
        "cache": list(sizes), "MB, exact": [size / 1e6 for size in sizes.values()], "of dense": [f"{size / sizes[DENSE]:.0%}" for size in sizes.values()],
        "ms a token": times, "measured at": [f"{int(near[name]):,} tokens" if name in near else "not measured" for name in sizes], "perplexity": changes,
    }  # fmt: skip


def times_figure(found: dict[str, Any]) -> go.Figure:
    """A line a form over the context."""
    chart = charts.figure(x="context, tokens", y="ms a token", legend=True)
    styles = zip(found["forms"].items(), ("solid", "dash", "dot", "dashdot", "longdash"), ("square", "circle", "diamond", "x", "triangle-up"), strict=False)
    for (name, form), dash, mark in styles:
        lengths = sorted(form["steps"], key=int)
        colour = DENSE_COLOUR if name == DENSE else COMPRESSED_COLOUR
        charts.line(chart, [int(length) for length in lengths], [form["steps"][length]["ms"] for length in lengths], name, colour, dash=dash, marks=mark)
    return chart


def times_table(found: dict[str, Any]) -> charts.Table:
    """A row a length, a column a form."""
    lengths = sorted(next(iter(found["forms"].values()))["steps"], key=int)
    columns = {name: [form["steps"][length]["ms"] for length in lengths] for name, form in found["forms"].items()}
    return {"tokens": [int(length) for length in lengths], **columns}


def _noise(found: dict[str, Any]) -> str:
    windows, length = found["windows"]
    said = f"Medians; perplexity on {windows} windows of {length}, through the cache."
    return f"{said} Noisy: {found['noise'][0]}." if found["noise"] else said
