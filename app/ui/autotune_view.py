"""What the autotune page shows, as plain values: slider ranges, the frontier, measured runs beside it, squares, reasons. Knows allocations; no widget."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pandas as pd

from bitpress.app.ui.layer_map import Cell, Legend, grid
from bitpress.app.ui.numbers import MINUS, THIN, amount, counted, file_size, whole
from bitpress.engine.accounting import flops_per_token
from bitpress.engine.allocate import Allocation, Curve, Reason, frontier
from bitpress.engine.cache_choice import DENSE_BITS, bytes_per_token, cache_of
from bitpress.engine.choices import Choices, choices_of
from bitpress.engine.errors import BitpressError
from bitpress.engine.model.anatomy import Anatomy, Part
from bitpress.engine.predict import predicted_kl
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs.store import Run, Store
from bitpress.engine.sensitivity_file import CACHE_BITS, DROP, NATS, SensitivityReport, cache_layer

MOST_RUNS = 500
KEPT_TABLES = 16
KEPT_PREDICTIONS = 8 * MOST_RUNS
HARM_COLUMNS = ("harm, nat a token", "harm + price of its bytes")
BIT_PLACES = {2: 0.0, 3: 0.2, 4: 0.4, 5: 0.6, 6: 0.8, 8: 1.0}


@dataclass(frozen=True)
class Slide:
    """A budget as a slider: its name, unit, ends, step, first value, and what one slider unit is in the budget's own."""

    label: str
    unit: str
    low: float
    high: float
    step: float
    start: float
    scale: float = 1.0

    def budget(self, value: float, kind: str) -> float:
        """The budget that a place of the slider stands for: a rise of perplexity in % is a ratio, all else a multiple."""
        return 1 + value / 100 if kind == "perplexity_ratio" else value * self.scale

    def said(self, value: float) -> str:
        """The value with its unit."""
        return f"{amount(value)}{THIN}{self.unit}"


def slides(curve: Curve, dense_seconds: float | None = None, least_seconds: float = 0.0) -> dict[str, Slide]:
    """The budgets that this model can be given, from the smallest that can be met to dense."""
    choices, first = curve.choices, curve.points[0]
    anatomy = choices.anatomy
    low_bits, low_bytes = _up(first.linear_bits, 0.05), _up(first.bytes / 1e6, _byte_step(anatomy))
    low_model = _up(8 * first.bytes / anatomy.params, 0.05)
    worst = min(400.0, 100 * math.expm1(min(first.harm, 6.0)))
    dense_bits = 8.0 * anatomy.itemsize
    found = {
        "linear_bits": Slide("Bits a linear weight", "bits", low_bits, dense_bits, 0.05, max(low_bits, min(3.5, dense_bits))),
        "model_bits": Slide("Bits a weight overall", "bits", low_model, _down(8 * anatomy.bytes / anatomy.params, 0.05), 0.05, max(low_model, 5.0)),
        "bytes": Slide("Stored size", "MB", low_bytes, _down(anatomy.bytes / 1e6, _byte_step(anatomy)), _byte_step(anatomy),
                       max(low_bytes, _up(anatomy.bytes / 4e6, _byte_step(anatomy))), 1e6),
        "perplexity_ratio": Slide("Predicted rise of perplexity, at most", "%", 0.5, max(1.0, _up(worst, 0.5)), 0.5, min(10.0, max(1.0, _up(worst, 0.5)))),
    }  # fmt: skip
    if dense_seconds:
        step = dense_seconds * 1e3 / 200
        low = _up(least_seconds * 1e3, step)
        found["latency_s"] = Slide(
            "Time a token, products alone", "ms", low, _down(dense_seconds * 1e3, step), step, max(low, _up(dense_seconds * 500, step)), 1e-3
        )
    if choices.drop_harm:
        dense = float(flops_per_token(None, anatomy)) / 1e6
        block = 2e-6 * sum(part.numel for part in anatomy.of_block(0))
        low = _up(dense - block * len(choices.drop_harm), dense / 200)
        found["flops"] = Slide("Operations a token", "MFLOPs", low, _up(dense, dense / 200), dense / 200, _up(dense - 2 * block, dense / 200), 1e6)
    if cache_layer(0) in choices.scores.get(f"{CACHE_BITS[0]}-bit", {}):
        low, high = (bytes_per_token(cache_of(bits), anatomy) / 1e3 for bits in (CACHE_BITS[-1], DENSE_BITS))
        step = 10.0 ** math.floor(math.log10(high) - 2)
        found["kv_bytes"] = Slide("KV cache a token", "kB", _up(low, step), _down(high, step), step, _up(high / 2, step), 1e3)
    return found


def _byte_step(anatomy: Anatomy) -> float:
    return 10.0 ** math.floor(math.log10(anatomy.bytes / 1e6) - 2)


def _up(value: float, step: float) -> float:
    return round(math.ceil(round(value / step, 6)) * step, 9)


def _down(value: float, step: float) -> float:
    return round(math.floor(round(value / step, 6)) * step, 9)


_tables: dict[tuple[Any, ...], tuple[Choices, Curve]] = {}


def table_of(
    report: SensitivityReport, anatomy: Anatomy, kind: str, ties: Sequence[str], locks: Mapping[str, str], embedding: int | None
) -> tuple[Choices, Curve]:
    """Choices and frontier, kept while nothing of them changes. Raises InputError as `choices_of` does."""
    key = (report.digest, report.seconds, anatomy.fingerprint, anatomy.model, kind, tuple(ties), tuple(sorted(locks.items())), embedding)
    if key not in _tables:
        made = choices_of(anatomy, report, kind, ties, locks, embedding)
        if len(_tables) >= KEPT_TABLES:
            _tables.clear()
        _tables[key] = (made, frontier(made))
    return _tables[key]


def kinds_of(report: SensitivityReport) -> list[str]:
    """The kinds that foretell a loss or a divergence, the one to spend by first; leaving one layer dense does not add up to one."""
    order = (report.spent_by, "kl", "fisher")
    return [kind for kind in dict.fromkeys(order) if kind in report.kinds and kind in NATS and not (kind == "fisher" and "loss" in report.kinds)]


# The frontier and what was measured --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A finished run on the frontier's axes, with what the scores foretell of its recipe."""

    run: str
    title: str
    bytes: int
    linear_bits: float
    model_bits: float
    kl: float
    change: float | None
    predicted: float | None
    text: str


def measured_runs(anatomy: Anatomy, report: SensitivityReport, kind: str, titles: Mapping[str, str]) -> list[Measured]:
    """The finished runs of this model that measured a divergence, those of the commonest text only: others are another quantity."""
    store = Store()
    found = [run for name in list(titles)[:MOST_RUNS] if (run := _measured(str(store.folder), name, titles[name], anatomy, report, kind))]
    texts = [run.text for run in found]
    common = max(set(texts), key=texts.count, default="")
    return [run for run in found if run.text == common]


def _measured(folder: str, name: str, title: str, anatomy: Anatomy, report: SensitivityReport, kind: str) -> Measured | None:
    facts = _facts(folder, name)
    if facts is None or facts["fingerprint_model"] != anatomy.model:
        return None
    predicted = _foretold(folder, name, facts["recipe"], anatomy, report, kind)
    return Measured(name, title, facts["bytes"], facts["linear"], facts["model"], facts["kl"], facts["change"], predicted, facts["text"])


_predictions: dict[tuple[str, ...], float | None] = {}


def _foretold(folder: str, name: str, recipe: Recipe, anatomy: Anatomy, report: SensitivityReport, kind: str) -> float | None:
    """What these scores foretell of a finished run, worked out once: neither its recipe nor a kept measurement ever changes."""
    key = (folder, name, anatomy.fingerprint, report.digest, str(report.seconds), kind)
    if key not in _predictions:
        if len(_predictions) >= KEPT_PREDICTIONS:
            _predictions.clear()
        _predictions[key] = predicted_kl(recipe, anatomy, report, kind)
    return _predictions[key]


@lru_cache(maxsize=2048)
def _facts(folder: str, name: str) -> dict[str, Any] | None:
    """What never changes of a finished run."""
    run = Run(Store().folder / name)
    sides = (run.metrics() or {}).get("metrics", {})
    now = sides.get("compressed", {})
    if not {"kl_mean", "bytes", "bits_per_weight_linears", "bits_per_weight_model"} <= now.keys():
        return None
    try:
        recipe = run.recipe()
    except BitpressError:
        return None
    dense = sides.get("dense", {}).get("perplexity")
    change = now["perplexity"] / dense - 1 if dense and "perplexity" in now else None
    protocol = now.get("protocol", {})
    text = f"{protocol.get('text', '')} {protocol.get('part', '')}".strip()
    return {"bytes": now["bytes"], "linear": now["bits_per_weight_linears"], "model": now["bits_per_weight_model"], "kl": now["kl_mean"], "change": change,
            "recipe": recipe, "text": text, "fingerprint_model": recipe.model if recipe else None}  # fmt: skip


def rank_correlation(runs: Sequence[Measured]) -> float | None:
    """Spearman's, of predicted against measured divergence; None under four runs, or where one of them never differs."""
    pairs = [(run.predicted, run.kl) for run in runs if run.predicted is not None]
    if len(pairs) < 4 or any(len(set(column)) < 2 for column in zip(*pairs, strict=True)):
        return None
    predicted, measured = (pd.Series(column).rank() for column in zip(*pairs, strict=True))  # scipy.stats takes a quarter of a second to load
    value = float(predicted.corr(measured))
    return value if math.isfinite(value) else None


def error_so_far(runs: Sequence[Measured]) -> str:
    """How far predictions of divergence were off: the middle half of measured over predicted, in words."""
    ratios = sorted(run.kl / run.predicted for run in runs if run.predicted and run.kl > 0)
    if not ratios:
        return "no run has checked it yet"
    if len(ratios) < 4:
        return f"measured was {', '.join(amount(ratio, 2) for ratio in ratios)} times predicted in {counted(len(ratios), 'run')}"
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    return f"measured was {amount(low, 2)} to {amount(high, 2)} times predicted in half of {len(ratios)} runs"


# Axes of the frontier: name -> (title, value of a point, value of a run)
AXES = {
    "linear_bits": "Bits a linear weight",
    "model_bits": "Bits a weight overall",
    "bytes": "Stored size, MB",
}


def axis_of(kind: str) -> str:
    """The axis that belongs to a budget."""
    return kind if kind in AXES else "linear_bits"


def x_of(point: Any, axis: str, anatomy: Anatomy) -> float:
    """Where a frontier point, a uniform recipe or a run stands on an axis."""
    if axis == "linear_bits":
        return float(point.linear_bits)
    return point.bytes / 1e6 if axis == "bytes" else 8 * point.bytes / anatomy.params


# Squares, reasons, words -------------------------------------------------------------------------------------------


def cells(anatomy: Anatomy, choices: Choices, allocation: Allocation, locked: Mapping[str, str]) -> list[Cell]:
    """The chosen recipe as squares: bits in colour and number, zeros as a smaller square, a lock where a person set it."""
    schemes = {option.id: option.scheme for option in choices.options}

    def draw(part: Part) -> Cell:
        option = allocation.options[part.name]
        weights, sparsity = schemes[option].weights, schemes[option].sparsity
        if option == DROP:
            return Cell(part.name, part.role, part.block, None, "", f"Block {part.block}, {part.role}\nleft out with its block\n{part.name}", state="removed")
        held = ", locked" if part.name in locked else ""
        title = f"Block {part.block}, {part.role}\n{option}{held}\n{whole(part.out_features)} × {whole(part.in_features)}\n{part.name}"
        value = BIT_PLACES.get(weights.bits) if weights else None
        text = str(weights.bits) if weights else "16"
        return Cell(part.name, part.role, part.block, value, text, title, 0.6 if sparsity else 1.0, state="locked" if part.name in locked else "")

    return grid(anatomy, draw)


def legend() -> Legend:
    """Bits, and what else a square shows."""
    return Legend(
        "Bits a weight", (*((str(bits), place) for bits, place in BIT_PLACES.items() if bits not in (5, 6)), ("16 dense", None)), ("lock: set by hand",)
    )


def locked_layers(anatomy: Anatomy, choices: Choices, locks: Mapping[str, str]) -> dict[str, str]:
    """Layer -> option of everything that locks reach, tied neighbours included."""
    return {layer: option for pattern, option in locks.items() for layers in choices.items for layer in layers if pattern in layers}


def why(reasons: Sequence[Reason], layer: str, allocation: Allocation, tied: Sequence[str], locked: bool) -> str:
    """Why a layer got what it got, in two sentences with the numbers."""
    if allocation.options[layer] == DROP:
        return "Its whole block is left out: that loses least of what the budget of operations asks for."
    chosen = next(reason for reason in reasons if reason.chosen)
    together = f" (with {len(tied) - 1} tied to it)" if len(tied) > 1 else ""
    if locked:
        return f"It is locked to {chosen.option}{together}."
    place = reasons.index(chosen)
    said = [f"**{chosen.option}**{together}: {file_size(chosen.bytes)} and a predicted divergence of {amount(chosen.harm)} nat."]
    if place > 0:
        up = reasons[place - 1]
        saved, more = chosen.harm - up.harm, up.bytes - chosen.bytes
        if more > 0:
            said.append(f"{up.option} would save {amount(saved)} nat for {file_size(more)} more: {rate(saved / more)}.")
    below = [reason for reason in reasons[place + 1 :] if reason.bytes < chosen.bytes]
    if below:
        down = below[0]
        said.append(f"{down.option} would give {file_size(chosen.bytes - down.bytes)} back and cost {amount(down.harm - chosen.harm)} nat: "
                    f"{rate((down.harm - chosen.harm) / (chosen.bytes - down.bytes))}.")  # fmt: skip
    return " ".join(said)


def rate(nats_a_byte: float) -> str:
    """A price in a unit that reads well."""
    return f"{MINUS if nats_a_byte < 0 else ''}{amount(abs(nats_a_byte) * 1e6)} nat a MB"


def reason_rows(reasons: Sequence[Reason], byte_price: float) -> dict[str, list[Any]]:
    """The table behind the sentence."""
    return {
        "option": [f"{reason.option}{' ◄' if reason.chosen else ''}" for reason in reasons],
        "stored, kB": [reason.bytes / 1e3 for reason in reasons],
        "harm, nat a token": [reason.harm for reason in reasons],
        "harm + price of its bytes": [reason.priced for reason in reasons],
    }


def shape_line(found: Allocation) -> str:
    """What goes beside bits: blocks and cache, empty where neither does."""
    structure, cache = found.recipe.structure, found.recipe.kv_cache
    parts = [f"blocks {', '.join(map(str, structure.drop_blocks))} left out"] if structure.drop_blocks else []
    if cache is not None and cache.keys is not None:
        parts.append(f"KV cache at {cache.keys.bits} bits, {file_size(found.predicted['kv_bytes'])} a token")
    return "; ".join(parts)
