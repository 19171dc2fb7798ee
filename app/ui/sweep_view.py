"""A sweep as the screens show it: what a form asks for, its points as rows, measured against foretold. Knows records; no widget."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from bitpress.app.ui.numbers import counted, duration
from bitpress.engine.methods.catalogue import kinds
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs.status import Status
from bitpress.engine.runs.store import Store
from bitpress.engine.sweep import SweepPlan

# Axis of the engine -> (label, values offered)
GRID_AXES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "bits": ("Bits", (2, 3, 4, 5, 6, 8)),
    "group_size": ("Group", (32, 64, 128, "row")),
    "sparsity": ("Zeros", (0, 0.3, 0.5, 0.7, "2:4", "4:8")),
    "rank": ("Rank kept", (1, 0.9, 0.8, 0.6)),
    "embedding": ("Embedding bits", (4, 8, 16)),
}
STATE_WORDS = {"open": "● under way", "finished": "✓ finished", "failed": "✕ failed", "cancelled": "⊘ cancelled", "unfit": "△ cannot run"}
RECENT = 20


def methods_that_round() -> list[str]:
    """Methods that a grid or a search can choose among; rounding to nearest first."""
    return sorted({"rtn", *(name for name, kind in kinds().items() if kind == "quantize")}, key=lambda name: (name != "rtn", name))


def grid_plan(base: Recipe, chosen: Mapping[str, Sequence[Any]]) -> SweepPlan | None:
    """The plan of the axes that have values; None where none has. Raises InputError as `SweepPlan.of` does."""
    grid = {axis: list(values) for axis, values in chosen.items() if values}
    return SweepPlan.of({"base": base.to_dict(), "grid": grid}) if grid else None


def search_plan(base: Recipe, trials: int, bits: tuple[float, float], methods: Sequence[str]) -> SweepPlan:
    """The plan of a search. Raises InputError as `SweepPlan.of` does."""
    return SweepPlan.of({"base": base.to_dict(), "search": {"trials": trials, "low": bits[0], "high": bits[1], "methods": list(methods)}})


def time_words(model: str, count: int) -> str:
    """How many recipes, and about how long, by the latest runs of this model."""
    took = [status.seconds for status in Store().list(kind="compress", state="finished", limit=200) if status.model == model and status.seconds][:RECENT]
    about = f", about {duration(fmean(took) * count)} by the latest runs" if took else ""
    return f"{counted(count, 'recipe')}{about}. Finished runs of the same recipe are taken as they are."


def newest_sweep(model: str) -> Status | None:
    """The sweep to show: the latest one of this model."""
    found = (status for status in Store().list(kind="sweep") if status.model == model)
    return next(found, None)


def rows(records: Sequence[Mapping[str, Any]], front: Sequence[str], at_work: bool = True) -> dict[str, list[Any]]:
    """The points as a table, those on the front marked; columns in which nothing stands are left out."""

    def column(name: str, scale: float = 1.0) -> list[float | None]:
        return [record["figures"][name] * scale if name in record["figures"] else None for record in records]

    words = STATE_WORDS | ({} if at_work else {"open": "‖ paused"})
    table = {
        "front": ["◆" if record["run"] in front and record["run"] else "" for record in records],
        "recipe": [record["name"] for record in records],
        "state": [words.get(record["state"], record["state"]) for record in records],
        "size, MB": column("bytes", 1e-6),
        "divergence, nat": column("kl_mean"),
        "foretold, nat": [record.get("predicted") for record in records],
        "perplexity": column("perplexity"),
        "bits a linear weight": column("bits_per_weight_linears"),
        "run": [str(record["run"] or "")[-4:] for record in records],
        "why not": [record["wrong"] for record in records],
    }
    empty = {name for name in ("why not", "foretold, nat") if not any(table[name])}
    return {name: values for name, values in table.items() if name not in empty}


def measured(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The points that have both figures of the plot."""
    return [record for record in records if {"bytes", "kl_mean"} <= record["figures"].keys()]
