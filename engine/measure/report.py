"""The mapping M that commands and screens read: one flat record of figures a model. Knows the stable keys; measures nothing.

A quantity that was not asked for is absent, never null. A figure that was asked for and came out infinite or as no number
(the perplexity of a destroyed model) is absent too, since JSON has no word for it, and its key stands in `not_finite`;
`nll_mean`, the logarithm of the perplexity, stays readable long after the perplexity itself has overflowed.
"""

import math
from dataclasses import asdict
from statistics import fmean
from typing import Any

from bitpress.engine.measure.interval import t_interval
from bitpress.engine.measure.latency import Latency
from bitpress.engine.measure.memory import Weights
from bitpress.engine.measure.perplexity import Quality, perplexity

Metrics = dict[str, Any]


def finite_only(values: Metrics) -> Metrics:
    """The values without those that are None, infinite or NaN; the latter two are named under `not_finite`."""
    broken = sorted(key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value))
    kept = {key: value for key, value in values.items() if value is not None and key not in broken}
    return {**kept, "not_finite": broken} if broken else kept


def text_figures(nll: list[float]) -> Metrics:
    """Perplexity of one model with the 95% interval of its own mean over windows: how much another text might differ.

    It is wide, since some windows are hard for any model; what compression costs is in `comparison_figures`.
    """
    interval = t_interval(nll)
    bounds = interval.exp() if interval else None
    return {"perplexity": perplexity(nll), "perplexity_low": bounds and bounds.low, "perplexity_high": bounds and bounds.high, "nll_mean": fmean(nll)}


def comparison_figures(quality: Quality) -> Metrics:
    """The other model against the dense one on the same windows: ratio of perplexities with its paired interval, divergence."""
    ratio, (kl_mean, kl_p99) = quality.ratio(), quality.kl()
    bounds = {"perplexity_ratio": perplexity(quality.log_ratios), "perplexity_ratio_low": ratio and ratio.low, "perplexity_ratio_high": ratio and ratio.high}
    return {**bounds, "kl_mean": kl_mean, "kl_p99": kl_p99, "same_top1": quality.same_top1()}


def size_figures(weights: Weights) -> Metrics:
    """Stored bytes and bits per weight of what is really packed, and the bytes it takes in memory."""
    return {
        "bytes": weights.stored_bytes,
        "resident_bytes": weights.resident_bytes,
        "bits_per_weight_linears": weights.bits_per_weight_linears,
        "bits_per_weight_model": weights.bits_per_weight_model,
    }


def latency_figures(latency: Latency) -> Metrics:
    """Seconds and rates, and the parts of a token as `token_parts`; the conditions go into the protocol."""
    rates = {key: value for key, value in asdict(latency).items() if key not in ("conditions", "parts")}
    return {**rates, **({"token_parts": latency.parts} if latency.parts else {})}
