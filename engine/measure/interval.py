"""How sure a mean over windows is. Knows numbers only, not what they measure; imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.special import stdtrit

LEVEL = 0.95
MIN_WINDOWS = 8


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Distance from the mean to either end."""
        return (self.high - self.low) / 2

    def exp(self) -> "Interval":
        """The interval of exp(x); an end that float64 cannot hold becomes infinite."""
        return Interval(safe_exp(self.mean), safe_exp(self.low), safe_exp(self.high))


def safe_exp(x: float) -> float:
    """exp(x), infinite where Python would raise OverflowError."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def t_interval(values: Sequence[float]) -> Interval | None:
    """Student's interval of the mean of independent values; None for fewer than two, which say nothing of their spread.

    On differences of paired windows it is the paired t interval: what both models find hard cancels.
    """
    if len(values) < 2:
        return None
    mean = fmean(values)
    if not all(map(math.isfinite, values)):
        return Interval(mean, math.nan, math.nan)
    half = float(stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def settled(log_ratios: Sequence[float]) -> bool:
    """Whether a live run may stop: at least 8 windows, and the half-width of the paired log-ratio is under the larger of
    0.5% and a tenth of the log-ratio itself. Looking after every window makes the interval a little too narrow, which is
    why only live runs stop early and say so."""
    interval = t_interval(log_ratios)
    if interval is None or len(log_ratios) < MIN_WINDOWS:
        return False
    return interval.half_width < max(math.log(1.005), abs(interval.mean) / 10)
