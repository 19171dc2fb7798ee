"""Runs beside each other: figures, differences to a baseline, the Pareto front, its knee, constraints. Pure functions over records; knows no widget."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from bitpress.app.edits import describe
from bitpress.app.ui.layer_map import Cell, Legend, grid
from bitpress.app.ui.numbers import MINUS, THIN, amount
from bitpress.app.ui.run_names import plan_of_run, short_id
from bitpress.engine.model.anatomy import Anatomy, Part
from bitpress.engine.recipe import Recipe, Scheme
from bitpress.engine.runs.labels import Labels, read_labels
from bitpress.engine.runs.status import Status
from bitpress.engine.runs.store import Run, Store

MOST_RUNS = 5000
DENSE_BITS = 16


@dataclass(frozen=True)
class Quantity:
    """One figure of a run: title, unit, whether less is better, the key of its record and what one unit is in the record's own."""

    title: str
    unit: str
    less: bool
    key: str
    scale: float = 1.0


QUANTITIES = {
    "size": Quantity("Stored size", "MB", True, "bytes", 1e-6),
    "linear_bits": Quantity("Bits a linear weight", "bits", True, "bits_per_weight_linears"),
    "model_bits": Quantity("Bits a weight overall", "bits", True, "bits_per_weight_model"),
    "perplexity": Quantity("Perplexity", "", True, "perplexity"),
    "kl": Quantity("Divergence", "nat", True, "kl_mean"),
    "top1": Quantity("Same top-1", "%", False, "same_top1", 100.0),
    "speed": Quantity("Decode speed", "tokens/s", False, "decode_tokens_per_s"),
    "ttft": Quantity("First token", "ms", True, "ttft_s", 1e3),
    "peak": Quantity("Peak memory", "MiB", True, "peak_bytes", 2.0**-20),
}
SHORT = ("size", "linear_bits", "perplexity", "kl", "top1", "speed")


@dataclass(frozen=True)
class Entry:
    """One finished run with its figures by quantity, absent ones left out. protocol: text, tier and windows that its quality holds for."""

    id: str
    title: str
    model: str
    created: float
    figures: Mapping[str, float]
    protocol: str
    labels: Labels = field(default_factory=Labels)

    def get(self, quantity: str) -> float | None:
        """A figure, None where it was not measured."""
        return self.figures.get(quantity)


def entries_of(statuses: Iterable[Status]) -> list[Entry]:
    """Finished compress runs that were measured and not deleted, the newest first."""
    folder = Store().folder
    found = []
    for status in statuses:
        facts, labels = _facts(str(folder), status.id), read_labels(folder / status.id)
        if facts is not None and labels.deleted is None:
            found.append(Entry(status.id, plan_of_run(status), status.model or "", status.created, facts[0], facts[1], labels))
    return found


@lru_cache(maxsize=2 * MOST_RUNS)
def _facts(folder: str, run_id: str) -> tuple[dict[str, float], str] | None:
    """The figures of a finished run, which never change, and what they hold for."""
    now = ((Run(Store().folder / run_id).metrics() or {}).get("metrics") or {}).get("compressed")
    return None if not now else (figures_of(now), protocol_of(now))


def figures_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The quantities that a record of one side holds."""
    return {name: record[quantity.key] * quantity.scale for name, quantity in QUANTITIES.items() if isinstance(record.get(quantity.key), int | float)}


def protocol_of(record: Mapping[str, Any]) -> str:
    """What perplexities must share to be compared: the text, its part, and the length of a window."""
    protocol = record.get("protocol", {})
    return " ".join(str(protocol[name]) for name in ("text", "part", "window") if name in protocol)


def dense_of(model: str, entries: Sequence[Entry]) -> Entry | None:
    """The dense model as a baseline, with the figures that the newest run measured of it."""
    for entry in entries:
        sides = (Run(Store().folder / entry.id).metrics() or {}).get("metrics", {})
        if entry.model == model and sides.get("dense"):
            return Entry("dense", "dense", model, entry.created, figures_of(sides["dense"]), protocol_of(sides["dense"]))
    return None


# Differences -------------------------------------------------------------------------------------------------------


def change(value: float | None, base: float | None) -> float | None:
    """Relative change; None where either is missing or the base is zero."""
    return value / base - 1 if value is not None and base else None


def said(delta: float | None, quantity: Quantity) -> str:
    """A change as sign, number and a word-shape for better or worse, so that colour is not needed."""
    if delta is None:
        return ""
    if abs(delta) < 5e-4:
        return "= same"
    sign, better = "+" if delta > 0 else MINUS, (delta < 0) == quantity.less
    return f"{'▲' if better else '▽'} {sign}{amount(abs(delta) * 100)}{THIN}%"


def is_better(delta: float | None, quantity: Quantity) -> bool | None:
    """Whether a change is for the better; None for none."""
    return None if delta is None or abs(delta) < 5e-4 else (delta < 0) == quantity.less


def table(entries: Sequence[Entry], base: Entry | None, quantities: Sequence[str]) -> dict[str, list[Any]]:
    """The columns: star, plan, each figure and its change to the baseline, tags, note, id. The baseline comes first."""
    rows = [*([base] if base is not None else []), *(entry for entry in entries if base is None or entry.id != base.id)]
    columns: dict[str, list[Any]] = {
        "star": ["★" if entry.labels.star else "" for entry in rows],
        "plan": [f"{entry.title}{' · baseline' if base is not None and entry is base else ''}" for entry in rows],
    }
    for name in quantities:
        quantity = QUANTITIES[name]
        columns[heading(name)] = [entry.get(name) for entry in rows]
        if base is not None:
            comparable = [name not in PROTOCOL_BOUND or entry.protocol == base.protocol for entry in rows]
            deltas = [change(entry.get(name), base.get(name)) if fair and entry is not base else None for entry, fair in zip(rows, comparable, strict=True)]
            if any(delta is not None for delta in deltas):  # the dense model has no bits a linear weight: an empty column says nothing
                columns[f"Δ {quantity.title.lower()}"] = [said(delta, quantity) for delta in deltas]
    columns |= {"tags": [", ".join(entry.labels.tags) for entry in rows], "note": [entry.labels.note for entry in rows], "run": [entry.id for entry in rows]}
    return columns


PROTOCOL_BOUND = ("perplexity", "kl", "top1")


def heading(name: str) -> str:
    """A column's title with its unit."""
    quantity = QUANTITIES[name]
    return f"{quantity.title}, {quantity.unit}" if quantity.unit else quantity.title


# The Pareto front --------------------------------------------------------------------------------------------------


def placed(entries: Sequence[Entry], x: str, y: str, protocol: str | None = None) -> list[Entry]:
    """The entries that have both figures; where a quality is among them, of one protocol (None: the commonest), as two never share an axis."""
    both = [entry for entry in entries if entry.get(x) is not None and entry.get(y) is not None]
    if not {x, y} & set(PROTOCOL_BOUND):
        return both
    protocols = [entry.protocol for entry in both]
    wanted = protocol if protocol is not None else max(dict.fromkeys(protocols), key=protocols.count, default="")
    return [entry for entry in both if entry.protocol == wanted]


def goodness(entry: Entry, name: str) -> float:
    """A figure turned so that less is better."""
    value = entry.figures[name]
    return value if QUANTITIES[name].less else -value


def front(entries: Sequence[Entry], x: str, y: str) -> list[Entry]:
    """The entries that no other beats in one without losing in the other, along x."""
    kept: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: (goodness(entry, x), goodness(entry, y))):
        if not kept or goodness(entry, y) < goodness(kept[-1], y):
            kept.append(entry)
    return kept


def knee(entries: Sequence[Entry], x: str, y: str) -> Entry | None:
    """The point of a front farthest below the line between its ends, both axes stretched to 0..1; None under three points."""
    if len(entries) < 3:
        return None
    xs, ys = [goodness(entry, x) for entry in entries], [goodness(entry, y) for entry in entries]
    if max(xs) == min(xs) or max(ys) == min(ys):
        return None
    depths = [1 - (a - min(xs)) / (max(xs) - min(xs)) - (b - min(ys)) / (max(ys) - min(ys)) for a, b in zip(xs, ys, strict=True)]
    best = max(range(len(entries)), key=depths.__getitem__)
    return entries[best] if depths[best] > 1e-9 else None


def allowed(entries: Sequence[Entry], limits: Mapping[str, tuple[float, float]]) -> list[Entry]:
    """The entries within every constraint; one that lacks a figure is not known to be."""
    return [entry for entry in entries if all((value := entry.get(name)) is not None and low <= value <= high for name, (low, high) in limits.items())]


def span(entries: Sequence[Entry], name: str) -> tuple[float, float] | None:
    """Least and largest of a figure, widened to numbers that read well; None where fewer than two differ."""
    values = [value for entry in entries if (value := entry.get(name)) is not None and math.isfinite(value)]
    if not values or max(values) <= min(values):
        return None
    unit = 10.0 ** (math.floor(math.log10(max(values) - min(values))) - 1)
    return math.floor(min(values) / unit) * unit, math.ceil(max(values) / unit) * unit


def uniform_curve(entries: Sequence[Entry], x: str, y: str) -> list[Entry]:
    """The newest run of each uniform width, along x: what a mixed recipe has to beat."""
    newest: dict[str, Entry] = {}
    for entry in entries:
        if width := _uniform_width(str(Store().folder), entry.id):
            newest.setdefault(width, entry)
    return sorted(newest.values(), key=lambda entry: goodness(entry, x))


@lru_cache(maxsize=2 * MOST_RUNS)
def _uniform_width(folder: str, run_id: str) -> str:
    """`4` for a run whose recipe gives every linear the same plain width, "" for any other."""
    recipe = Run(Store().folder / run_id).recipe()
    if recipe is None or len(recipe.schemes) != 1 or recipe.structure.drop_blocks or recipe.schemes[0].sparsity or recipe.schemes[0].match != "*":
        return ""
    return str(getattr(recipe.schemes[0].weights, "bits", "") or "")


# Words and pieces --------------------------------------------------------------------------------------------------


def title_of(entry: Entry) -> str:
    """Plan and short id."""
    return entry.title if entry.id == "dense" else f"{entry.title} · {short_id(entry.id)}"


def line_of(entry: Entry) -> str:
    """The main figures in one line."""
    return " · ".join(
        f"{QUANTITIES[name].title.lower()} {amount(entry.figures[name])}{THIN}{QUANTITIES[name].unit}".strip() for name in SHORT if name in entry.figures
    )


def sieved(entries: Sequence[Entry], words: str, tags: Sequence[str], starred: bool, archived: bool) -> list[Entry]:
    """Those that hold every word and tag; archived ones where asked for, starred ones first."""

    def holds(entry: Entry) -> bool:
        labels = entry.labels
        text = f"{entry.title} {entry.id} {labels.note} {' '.join(labels.tags)}".lower()
        seen = (archived or not labels.archived) and (labels.star or not starred)
        return seen and set(tags) <= set(labels.tags) and all(word in text for word in words.lower().split())

    return sorted(filter(holds, entries), key=lambda entry: not entry.labels.star)


def texts_of(run_id: str) -> dict[str, str]:
    """Prompt -> what the run's compressed model wrote on it."""
    return _texts(str(Store().folder), run_id)


@lru_cache(maxsize=256)
def _texts(folder: str, run_id: str) -> dict[str, str]:
    samples = Run(Store().folder / run_id).samples()
    return {
        str(sample["prompt"]): str(sample["prompt"]) + "".join(str(token.get("text", "")) for token in sample.get("tokens", ()))
        for sample in samples
        if sample.get("side") == "compressed" and "prompt" in sample
    }


def difference_cells(anatomy: Anatomy, before: Recipe, after: Recipe) -> tuple[list[Cell], int]:
    """A square a matrix, coloured by how many bits a weight it gained or lost, and how many matrices differ in any way."""
    old, new = before.resolve(anatomy), after.resolve(anatomy)

    def draw(part: Part) -> Cell:
        one, two = old.get(part.name), new.get(part.name)
        more = _bits(two) - _bits(one)
        text = "" if one == two else f"{'+' if more > 0 else MINUS if more < 0 else '±'}{abs(more)}"
        title = f"Block {part.block}, {part.role}\nfrom {describe(one)}\nto {describe(two)}\n{part.name}"
        return Cell(part.name, part.role, part.block, None if one == two else 0.5 + max(-0.5, min(0.5, more / 12)), text, title)

    return grid(anatomy, draw), sum(old.get(part.name) != new.get(part.name) for part in anatomy.linears)


def _bits(scheme: Scheme | None) -> int:
    return 0 if scheme is None else scheme.weights.bits if scheme.weights else DENSE_BITS


def difference_legend() -> Legend:
    """Steps of the diverging scale."""
    steps = tuple((f"{'+' if bits > 0 else MINUS if bits < 0 else ''}{abs(bits)}", 0.5 + bits / 12) for bits in (-6, -3, 0, 3, 6))
    return Legend("Bits gained or lost", (*steps, ("the same", None)))
