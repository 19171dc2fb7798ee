"""Why it is not faster: the split of a decoded token's time, and how near each part is to the machine's limit. Knows the `token_parts` of a metrics record.

Seconds are measured, each group of products by itself; the rest of a token is what they leave of it. The limit is ideal: the
stored bytes of a part over the rate at which this machine was measured to read memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import streamlit as st

from bitpress.app.ui import charts
from bitpress.app.ui.metric_cards import BADGES
from bitpress.app.ui.numbers import THIN, amount, duration, times
from bitpress.app.ui.theme import AMOUNT, COMPRESSED_COLOUR, DENSE_COLOUR
from bitpress.engine.runs.store import Run

CALLS_SHARE = 0.3  # of a part's time in the fixed cost of its calls, above which that is what bounds it
NEAR_LIMIT = 0.6  # of the read rate, above which reading is what bounds a part
HEAD, REST = "head", "rest"
NAMES = {HEAD: "output head", REST: "attention, norms, calls between"}
KINDS = ("linears", "output head", "attention, norms, calls between")
LOOKS = {"linears": (AMOUNT[6], ""), "output head": (AMOUNT[3], "/"), "attention, norms, calls between": (DENSE_COLOUR, ".")}  # colour and hatching
BAR_HEIGHT, DOT_HEIGHT = 190, 260
Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """One part of a token: seconds measured, seconds that its bytes need at the read rate, and what bounds it, in words."""

    name: str
    kernel: str
    reason: str
    layers: int
    nbytes: int
    seconds: float
    ideal_s: float
    bound: str

    @property
    def fraction(self) -> float | None:
        """Of the read rate; None where no weights are read."""
        return self.ideal_s / self.seconds if self.layers and self.seconds else None


def parts_of(metrics: Metrics) -> list[Part]:
    """The parts of a side's token in their order; empty where they were not measured."""
    found = metrics.get("token_parts") or {}
    return [_part(part, found["read_bytes_per_s"], found["call_s"]) for part in found.get("parts", ())]


def _part(part: Metrics, rate: float, call_s: float) -> Part:
    name, seconds, ideal = part["part"], part["seconds"], part["bytes"] / rate
    calls = call_s * part.get("calls", 0)
    return Part(NAMES.get(name, name), part.get("kernel", ""), part.get("reason", ""), part.get("layers", 0), part["bytes"], seconds, ideal,
                _bound(name, seconds, ideal, calls))  # fmt: skip


def _bound(name: str, seconds: float, ideal: float, calls: float) -> str:
    if name == REST:
        return "not weights: does not shrink with bits"
    if ideal > seconds:
        return "cache: read faster than memory"
    if ideal >= NEAR_LIMIT * seconds:
        return "memory-bound: near the read rate"
    if calls >= CALLS_SHARE * seconds:
        return "launch overhead: the calls cost more than the reading"
    return "compute-bound: unpacking and multiplying"


def split(parts: Sequence[Part]) -> dict[str, float]:
    """Seconds by kind: linears, head, rest."""
    sums = dict.fromkeys(KINDS, 0.0)
    for part in parts:
        sums[part.name if part.name in sums else "linears"] += part.seconds
    return sums


def sentences(dense: Metrics, now: Metrics) -> list[str]:
    """What the numbers say: the split, the most that smaller weights can give (Amdahl), and what the calls cost."""
    parts, found = parts_of(now), now["token_parts"]
    sums, token = split(parts), sum(part.seconds for part in parts)
    shares = ", ".join(f"{amount(100 * seconds / token)}{THIN}% {kind}" for kind, seconds in sums.items())
    lines = [f"A token takes {duration(found['token_s'])}: {shares}."]
    if found.get("excess", 1) > 1:
        lines[0] += f" Timed one by one, its products took {times(found['excess'])} the whole step; their times are scaled down to it."
    before = (dense.get("token_parts") or {}).get("token_s")
    if before:
        free = token - sums["linears"]
        most = f"Were the linears free, it would be {times(before / free)}" if free > 0 else "The linears take all of the time"
        lines.append(f"Measured {times(before / found['token_s'])} the speed of dense. {most}; "
                     f"if reading all its bytes were all it cost, {times(before / sum(part.ideal_s for part in parts))}.")  # fmt: skip
    calls = sum(part.get("calls", 0) for part in found["parts"])
    if not found["call_s"]:
        return [*lines, "The step is one call for all blocks, so there is no launch overhead between its products."]
    lines.append(f"{calls} products a token, {amount(1e6 * found['call_s'])}{THIN}µs each before any weight is read: "
                 f"{amount(100 * calls * found['call_s'] / token)}{THIN}% of the token.")  # fmt: skip
    return lines


def table(dense: Metrics, now: Metrics) -> charts.Table:
    """All parts of the compressed side, with the dense side's seconds beside them."""
    parts, before = parts_of(now), {part.name: _micro(part.seconds) for part in parts_of(dense)}
    return {
        "part": [part.name for part in parts], "layers": [part.layers or None for part in parts], "kernel": [part.kernel or None for part in parts],
        "µs measured": [_micro(part.seconds) for part in parts], "µs dense": [before.get(part.name) for part in parts],
        "µs ideal": [_micro(part.ideal_s) for part in parts], "share of read rate": [part.fraction and round(part.fraction, 3) for part in parts],
        "bound by": [part.bound for part in parts], "bytes": [part.nbytes for part in parts], "why this kernel": [part.reason or None for part in parts],
    }  # fmt: skip


def _micro(seconds: float) -> float:
    return round(1e6 * seconds, 1)


def split_figure(sides: Mapping[str, Mapping[str, float]]) -> go.Figure:
    """One bar a side, in milliseconds, cut by kind; hatched, so that colour is not all that tells the kinds apart."""
    chart = charts.figure(BAR_HEIGHT, x="milliseconds a token", legend=True)
    for kind, (colour, hatch) in LOOKS.items():
        chart.add_bar(y=list(sides), x=[1e3 * sums[kind] for sums in sides.values()], name=kind, orientation="h",
                      marker={"color": colour, "pattern": {"shape": hatch, "fillmode": "overlay", "fgcolor": "#ffffff", "solidity": 0.2}})  # fmt: skip
    chart.update_yaxes(type="category", autorange="reversed")
    chart.update_layout(barmode="stack", hovermode="y unified", bargap=0.35)
    return chart


def roofline_figure(sides: Mapping[str, Sequence[Part]]) -> go.Figure:
    """A dot a part and side: the share of the machine's read rate that it reached; the line at 1 is the limit."""
    chart = charts.figure(DOT_HEIGHT, x="share of the read rate", legend=True)
    for (side, parts), (colour, symbol) in zip(sides.items(), ((DENSE_COLOUR, "square"), (COMPRESSED_COLOUR, "circle")), strict=False):
        shown = [part for part in parts if part.fraction is not None]
        chart.add_scatter(x=[part.fraction for part in shown], y=[part.name for part in shown], name=side, mode="markers",
                          marker={"color": colour, "symbol": symbol, "size": 11}, customdata=[part.kernel for part in shown],
                          hovertemplate="%{y}<br>%{x:.2f} of the read rate<br>%{customdata}")  # fmt: skip
    chart.add_vline(x=1, line={"color": DENSE_COLOUR, "dash": "dash", "width": 2})
    chart.update_xaxes(rangemode="tozero")
    chart.update_yaxes(type="category", autorange="reversed")
    chart.update_layout(hovermode="closest")
    return chart


def why_speed(run: Run, metrics: Mapping[str, Metrics], recorded: bool) -> None:
    """The panel, where the run measured the parts of a token."""
    dense, now = metrics.get("dense", {}), metrics.get("compressed", {})
    parts = parts_of(now)
    if not parts:
        return
    noisy = now.get("protocol", {}).get("latency", {}).get("noisy")
    with st.container(border=True, key="why-speed"):
        badge = "recorded" if recorded else "noisy" if noisy else "measured"
        st.markdown(f"**Why is it not faster?** {BADGES[badge]}", help="Each group of products is timed by itself, weights cold, in the decode loop that "
                    "the speed card times; the rest is what they leave of a token.")  # fmt: skip
        for line in sentences(dense, now):
            st.markdown(line)
        figures = st.expander("Each part, as a picture and a table", key="why-figures", on_change="rerun")
        if figures.open:  # two charts cost a redraw more than all the sliders do
            with figures:
                _figures(run, dense, now, parts)


def _figures(run: Run, dense: Metrics, now: Metrics, parts: list[Part]) -> None:
    before, rate = parts_of(dense), now["token_parts"]["read_bytes_per_s"]
    sides = ({"dense": before} if before else {}) | {"compressed": parts}
    sums = {side: split(of_side) for side, of_side in sides.items()}
    left, right = st.columns(2)
    with left:
        told = "; ".join(f"{side} {duration(sum(by_kind.values()))}, of which linears {duration(by_kind['linears'])}" for side, by_kind in sums.items())
        charts.show(charts.kept(f"split-{run.id}", sums, lambda: split_figure(sums)), f"split-{run.id}", f"Time of a decoded token by part: {told}",
                    table(dense, now), note="Only the linears and the head shrink with bits.")  # fmt: skip
    with right:
        reached = ", ".join(f"{part.name} {part.fraction:.2f} on {part.kernel}" for part in parts if part.fraction is not None)
        chart = charts.kept(f"roofline-{run.id}", sides, lambda: roofline_figure(sides))
        note = f"{BADGES['ideal']} The dashed line is {amount(rate / 1e9)}{THIN}GB/s, this machine's measured read rate; a dot beyond it came from a cache."
        charts.show(chart, f"roofline-{run.id}", f"Share of the read rate that each part reaches: {reached}", {}, fold=False, note=note)
