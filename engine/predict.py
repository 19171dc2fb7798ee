"""What a recipe will do to the predictions, from kept sensitivities, before anything runs. Knows schemes and scores; torch-free.

Harms of single layers are added up. What was not scored is read between or beyond what was: a width lies on the line through the
logarithms of its neighbours, a share of zeros on a power law through the scored one. So it is a prediction, and says so.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping

from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Recipe, Scheme, SparsityScheme
from bitpress.engine.sensitivity_file import DROP, NATS, SensitivityReport

ZEROS_POWER = 3.0  # magnitude pruning: the error grows about as the cube of the share
MOST_EXTRA_BITS = 3  # a width is not read further beyond the scored ones than this


def predicted_kl(recipe: Recipe, anatomy: Anatomy, report: SensitivityReport, kind: str | None = None) -> float | None:
    """KL divergence from the dense model in nats a token; None where a part of the recipe has no score to read it from."""
    kind = kind or next((name for name in ("kl", "fisher") if name in report.kinds), None)
    if kind is None or kind not in NATS:
        return None
    table = report.table(kind)
    widths = {option.scheme.weights.bits: table[option.id] for option in report.options if option.scheme.weights}
    zeros: dict[tuple[str, float], dict[str, float]] = {}
    for option in report.options:
        if option.scheme.sparsity:
            zeros[option.scheme.sparsity.pattern, option.scheme.sparsity.ratio] = table[option.id]
    harms = [_layer(name, scheme, widths, zeros) for name, scheme in recipe.resolve(anatomy).items()]
    harms += [table.get(DROP, {}).get(f"{anatomy.block_prefix}.{block}") for block in recipe.dropped_blocks(anatomy)]
    for part, scheme in ((anatomy.embedding, recipe.embedding), (anatomy.head, recipe.head)):
        if part is not None and scheme is not None:
            harms.append(_at_width(scheme.bits, {bits: scores[part.name] for bits, scores in widths.items() if part.name in scores}))
    return None if any(harm is None for harm in harms) else sum(harm for harm in harms if harm is not None)


def _layer(name: str, scheme: Scheme, widths: Mapping[int, Mapping[str, float]], zeros: Mapping[tuple[str, float], Mapping[str, float]]) -> float | None:
    if scheme.rank is not None or getattr(scheme, "activations", None) is not None:
        return None
    total = 0.0
    if scheme.weights is not None:
        harm = _at_width(scheme.weights.bits, {bits: scores[name] for bits, scores in widths.items() if name in scores})
        if harm is None:
            return None
        total += harm
    if scheme.sparsity is not None and scheme.sparsity.ratio > 0:
        harm = _at_share(name, scheme.sparsity, zeros)
        if harm is None:
            return None
        total += harm
    return total


def _at_width(bits: int, known: Mapping[int, float]) -> float | None:
    """On the line through the logarithms of the two scored widths that hold `bits`, or of the two nearest."""
    if bits in known:
        return known[bits]
    places = sorted(width for width, harm in known.items() if harm > 0)
    if len(places) < 2 or not places[0] - MOST_EXTRA_BITS <= bits <= places[-1] + MOST_EXTRA_BITS:
        return None
    right = min(max(bisect_left(places, bits), 1), len(places) - 1)
    low, high = places[right - 1], places[right]
    slope = (math.log(known[high]) - math.log(known[low])) / (high - low)
    return math.exp(math.log(known[low]) + slope * (bits - low))


def _at_share(name: str, sparsity: SparsityScheme, zeros: Mapping[tuple[str, float], Mapping[str, float]]) -> float | None:
    same = [(ratio, scores[name]) for (pattern, ratio), scores in zeros.items() if pattern == sparsity.pattern and name in scores]
    if not same:
        return None
    ratio, harm = min(same, key=lambda pair: abs(pair[0] - sparsity.ratio))
    return harm * (sparsity.ratio / ratio) ** ZEROS_POWER
