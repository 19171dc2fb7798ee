"""The desk's order `scheme`: show a recipe on the resident model, window by window. Knows orders and events; the arithmetic is `engine.live`'s.

`{recipe: DIGEST}` names a recipe kept under `recipes/` of the home folder, because an order is at most 4 KiB. Each window is an event
`window` with the order's id; the order's end carries the figures that hold for all of them.
"""

import re
import time
from collections.abc import Callable
from typing import Any

from bitpress.engine.accounting import size_of
from bitpress.engine.errors import InputError
from bitpress.engine.home import home
from bitpress.engine.live import Live, Scored
from bitpress.engine.measure import report
from bitpress.engine.measure.measure import windows_for
from bitpress.engine.measure.perplexity import Quality
from bitpress.engine.recipe import Measure, Recipe
from bitpress.engine.runs.orders import Order
from bitpress.engine.runs.resident import Resident

Emit = Callable[[str, dict[str, Any]], None]


def kept_recipe(digest: str) -> Recipe:
    """A recipe that a screen has kept. Raises InputError when there is none."""
    if not re.fullmatch(r"[0-9a-f]{16}", digest):
        raise InputError("The order names no recipe.", f"'{digest[:40]}' is not a digest.", "Send the digest of a kept recipe.")
    return Recipe.from_yaml(home() / "recipes" / f"{digest}.yaml")


class LiveDesk:
    """The live twin of a resident model; made at the first order, and anew when another text is asked for."""

    def __init__(self, resident: Resident) -> None:
        self.resident = resident
        self.live: Live | None = None
        self.text, self.one_line = "", ""

    def perform(self, order: Order, emit: Emit, cut: Callable[[], bool]) -> dict[str, Any]:
        """Answer an order; `cut` says between two blocks whether to stop. Gives what its end event carries."""
        began = time.perf_counter()
        recipe = kept_recipe(str(order.args.get("recipe", "")))
        if recipe.model != self.resident.entry.id:
            raise InputError(f"This recipe is for {recipe.model}.", f"This desk holds {self.resident.entry.id}.", "Open a desk of its model.")
        live = self._live(recipe.measure.text)
        change = live.turn(recipe, cut)
        told: dict[str, Any] = {"recipe": recipe.digest(), "layers": len(change.layers), "lowest": change.lowest, "notes": list(change.notes)}
        if cut():
            return told
        quality = Quality(asked=1)
        for scored, quality in live.windows(cut):  # noqa: B007 - the last one holds the figures of all
            emit("window", {"order": order.id, **_event(scored)})
        if quality.windows < quality.asked or cut():
            return told
        return {**told, **self._figures(recipe, quality), "made_s": round(change.seconds, 4), "seconds": round(time.perf_counter() - began, 4)}

    def _live(self, text: str) -> Live:
        if self.live is None or text != self.text:
            windows = windows_for(self.resident.loaded, self.resident.entry, Measure(tier="quick", text=text))
            self.live, self.text, self.one_line = Live(self.resident.loaded, windows.ids_NT), text, windows.protocol.one_line()
        return self.live

    def _figures(self, recipe: Recipe, quality: Quality) -> dict[str, Any]:
        compressed = {**report.text_figures(quality.nll), **report.comparison_figures(quality), "bytes": size_of(recipe, self.resident.loaded.anatomy).bytes}
        found = {"dense": report.text_figures(quality.nll_dense), "compressed": compressed}
        return {"metrics": {side: report.finite_only(values) for side, values in found.items()}, "protocol": self.one_line}


def _event(scored: Scored) -> dict[str, Any]:
    ratio = scored.ratio
    bounds = {"ratio": ratio and ratio.mean, "low": ratio and ratio.low, "high": ratio and ratio.high}
    return report.finite_only({"index": scored.index, "nll_dense": scored.nll_dense, "nll": scored.nll, **bounds})
