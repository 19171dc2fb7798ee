"""Parallel coordinates: an axis a quantity, a line a run; a drag along an axis picks lines out. Knows axes and lines, no run.

Drawn by our own component (`parallel_lines.js`) on a plain canvas: Plotly's needs WebGL, which without a graphics card kept the
page busy for more than a second after it was drawn, whatever the number of runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bitpress.app.ui.component import own_component

HEIGHT = 360
SCALE = ("#e0a33e", "#00a5ab", "#7f8cf5")
DIGITS = 5
_component = own_component("parallel_lines")


@dataclass(frozen=True)
class Axis:
    """One quantity of all lines, in their order.

    less: whether less is better; the better end is at the foot. log: on a logarithmic scale, where all values are above 0.
    """

    label: str
    values: Sequence[float]
    less: bool = True
    log: bool = False


def parallel_lines(titles: Sequence[str], axes: Sequence[Axis], key: str, label: str) -> None:
    """Draw the lines, coloured by the first axis. `label` is what a screen reader says of the whole."""
    _component(key=key, data=payload(titles, axes, label))


def payload(titles: Sequence[str], axes: Sequence[Axis], label: str) -> dict[str, Any]:
    """What the browser gets: the ends of each axis, and of each line its title and values to five digits."""
    columns = ([float(f"{value:.{DIGITS}g}") for value in axis.values] for axis in axes)
    lines = [list(line) for line in zip(titles, *columns, strict=True)]
    return {"axes": [_ends(axis) for axis in axes], "lines": lines, "scale": SCALE, "height": HEIGHT, "label": label}


def _ends(axis: Axis) -> dict[str, Any]:
    low, high = min(axis.values), max(axis.values)
    log = axis.log and low > 0
    if low == high:
        low, high, log = low - 1, high + 1, False
    foot, head = (low, high) if axis.less else (high, low)
    return {"label": axis.label, "foot": foot, "head": head, "log": log}
