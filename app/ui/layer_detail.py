"""One layer close up: its weights with the levels drawn on them, its error against bits, its spectrum. Reads `stats/` only; no torch.

The records are documented in `engine/model/weight_stats.py`; a worker's `inspect` writes them once a model.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import streamlit as st

from bitpress.app.edits import describe
from bitpress.app.ui import charts
from bitpress.app.ui.notices import empty, plain
from bitpress.app.ui.numbers import amount, whole
from bitpress.app.ui.theme import ACCENT, DENSE_COLOUR
from bitpress.engine.accounting import break_even, part_rank
from bitpress.engine.model import library
from bitpress.engine.model.anatomy import Part
from bitpress.engine.recipe import Scheme, WeightScheme

HEIGHT = 230
DRAWN_LEVELS = 64  # more lines than this would be a grey surface
LEVEL_COLOUR = "#c96a1d"


def read_stats(model: str, layer: str) -> dict[str, Any] | None:
    """The record of a layer, None until the model was inspected or when the record cannot be read."""
    path = library.stats_dir(model) / f"{layer}.json"
    try:
        return _record(str(path), path.stat().st_mtime_ns)
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=64)
def _record(path: str, changed: int) -> dict[str, Any]:
    return json.loads(Path(path).read_text(encoding="utf8"))


def layer_detail(model: str, part: Part, scheme: Scheme | None, key: str = "layer-detail") -> None:
    """Draw the three charts of one layer under the scheme it has now."""
    st.markdown(f"**{title_of(part)}** · {plain(describe(scheme))} · {whole(part.out_features)} × {whole(part.in_features)} · `{part.name}`")
    stats = read_stats(model, part.name)
    if stats is None:
        empty("The weights of this layer have not been looked at yet. They are once the model has been inspected.")
        return
    weights = scheme.weights if scheme else None
    with st.container(horizontal=True, gap="medium"):
        for draw in (_weights, _error):
            with st.container(width="stretch"):
                draw(stats, weights, key)
        with st.container(width="stretch"):
            _spectrum(stats, break_even(part.out_features, part.in_features), part_rank(part, scheme), key)
    with st.expander("As tables", key=f"{key}-twins"):
        for heading, table in tables(stats).items():
            st.caption(heading)
            charts.twin(table, f"{key}-{heading.split()[0].lower()}")


def title_of(part: Part) -> str:
    """Block and role in words."""
    return f"Block {part.block}, {part.role}" if part.block is not None else part.role


def tables(stats: Mapping[str, Any]) -> dict[str, charts.Table]:
    """The table twins of the three charts."""
    edges, spectrum = stats["histogram"]["edges"], stats["spectrum"]
    return {
        "Weights": {"from": edges[:-1], "to": edges[1:], "weights": stats["histogram"]["counts"]},
        "Error against bits": {"bits": [int(bits) for bits in stats["error_by_bits"]], "relative error": list(stats["error_by_bits"].values())},
        "Spectrum": {"number": spectrum["index"], "singular value, relative": spectrum["value"], "share of energy": spectrum["energy"]},
    }


# --- weights ------------------------------------------------------------------------------------------------------


def _weights(stats: Mapping[str, Any], weights: WeightScheme | None, key: str) -> None:
    edges, counts = stats["histogram"]["edges"], stats["histogram"]["counts"]
    chart = charts.figure(HEIGHT, x="weight", y="count (log)", log_y=True)
    charts.bars(chart, [(low + high) / 2 for low, high in pairwise(edges)], counts, "weights", DENSE_COLOUR)
    levels = drawn_levels(stats["histogram"], weights)
    top = max(counts, default=1)
    for level in levels:
        chart.add_shape(type="line", x0=level, x1=level, y0=0.7, y1=top, line={"color": LEVEL_COLOUR, "width": 1.4 if len(levels) <= 16 else 0.7})
    chart.update_layout(hovermode="closest")
    st.caption("Weights and levels")
    charts.show(chart, f"{key}-weights", weights_alt(stats, levels), {}, fold=False)
    st.caption(_levels_note(weights, levels) + f" Kurtosis {amount(stats['kurtosis'])}; a normal distribution has 3.")


def weights_alt(stats: Mapping[str, Any], levels: Sequence[float]) -> str:
    """What a screen reader says of the histogram."""
    drawn = f", with {len(levels)} levels drawn from {amount(levels[0])} to {amount(levels[-1])}" if levels else ""
    return f"Histogram of the weights from {amount(stats['min'])} to {amount(stats['max'])}, standard deviation {amount(stats['std'])}{drawn}"


def _levels_note(weights: WeightScheme | None, levels: Sequence[float]) -> str:
    if weights is None:
        return "The layer is dense: no levels."
    if not levels:
        return f"{2**weights.bits} levels, too many to draw."
    return f"Lines: the {len(levels)} levels of a typical group{f' of {weights.group_size}' if weights.group_size else ', a whole row'}."


def drawn_levels(histogram: Mapping[str, Sequence[float]], weights: WeightScheme | None) -> list[float]:
    """The levels that a group of typical range gets (METHODS 15.1); none for a dense layer or when they are too many to draw.

    Typical: the median over groups of the largest of g weights drawn from the histogram, whose distribution is F**g; the
    same at the low end.
    """
    if weights is None or 2**weights.bits > DRAWN_LEVELS:
        return []
    size = weights.group_size or 1024
    low, high = min(0.0, quantile(histogram, 1 - 0.5 ** (1 / size))), max(0.0, quantile(histogram, 0.5 ** (1 / size)))
    if weights.symmetric:
        half = 2 ** (weights.bits - 1)
        step = max(-low, high) / max(1, half - 1)
        return [code * step for code in range(-half, half)]
    step = (high - low) / (2**weights.bits - 1)
    zero = round(-low / step) if step else 0
    return [(code - zero) * step for code in range(2**weights.bits)]


def quantile(histogram: Mapping[str, Sequence[float]], share: float) -> float:
    """The value below which this share of the weights lies, linear inside a bin."""
    edges, counts = histogram["edges"], histogram["counts"]
    wanted, seen = share * sum(counts), 0.0
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        if count and seen + count >= wanted:
            return low + (high - low) * (wanted - seen) / count
        seen += count
    return edges[-1]


# --- error and spectrum -------------------------------------------------------------------------------------------


def _error(stats: Mapping[str, Any], weights: WeightScheme | None, key: str) -> None:
    errors = {int(bits): value for bits, value in stats["error_by_bits"].items()}
    chart = charts.figure(HEIGHT, x="bits", y="relative error (log)", log_y=True)
    charts.line(chart, list(errors), list(errors.values()), "relative error", ACCENT, marks="circle")
    now = weights.bits if weights and weights.bits in errors else None
    if now:
        chart.add_scatter(
            x=[now],
            y=[errors[now]],
            name="in the recipe now",
            mode="markers",
            marker={"symbol": "diamond-open", "size": 15, "color": LEVEL_COLOUR, "line": {"width": 2.5}},
        )
    chart.update_xaxes(tickvals=list(errors))
    st.caption("Error against bits")
    listed = ", ".join(f"{bits} bits {amount(value)}" for bits, value in errors.items())
    charts.show(chart, f"{key}-error", f"Relative error of the weights after rounding: {listed}", {}, fold=False)
    marked = "Diamond: the width in the recipe. " if now else ""
    st.caption(f"{marked}Round to nearest, groups of 64.")


def _spectrum(stats: Mapping[str, Any], limit: int, rank: int, key: str) -> None:
    spectrum = stats["spectrum"]
    chart = charts.figure(HEIGHT, x="singular value, by number", y="relative to the largest")
    charts.line(chart, spectrum["index"], spectrum["value"], "singular value", ACCENT)
    charts.line(chart, spectrum["index"], spectrum["energy"], "share of energy", DENSE_COLOUR, dash="dash")
    chart.update_yaxes(range=[0, 1.02])
    chart.add_vline(x=limit, line={"color": DENSE_COLOUR, "width": 1.5, "dash": "dot"}, annotation_text="break-even")
    if rank:
        chart.add_vline(x=rank, line={"color": LEVEL_COLOUR, "width": 2}, annotation_text=f"rank {rank}")
    half = next((index for index, energy in zip(spectrum["index"], spectrum["energy"], strict=True) if energy >= 0.9), spectrum["index"][-1])
    st.caption("Spectrum")
    charts.show(
        chart,
        f"{key}-spectrum",
        f"Singular values, falling to {amount(spectrum['value'][-1])} of the largest; nine tenths of the energy by number {half}; "
        f"break-even at {limit}{f', the recipe keeps {rank}' if rank else ''}",
        {},
        fold=False,
    )
    st.caption(f"Dashed: share of energy. Nine tenths by number {half} of {spectrum['index'][-1]}. Dotted: the break-even rank, {limit}.")
