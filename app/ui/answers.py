"""The three cards of a recipe, from what is known of it now. Knows readings and a run's view; picks the badge, never a number.

A figure of another recipe is shown only under the badge that says so.
"""

from bitpress.app import readings
from bitpress.app.readings import Prediction
from bitpress.app.ui import live_session
from bitpress.app.ui.equivalent import command
from bitpress.app.ui.metric_cards import Card, Known, ideal_speed_card, quality_card, size_card, speed_card
from bitpress.app.ui.numbers import amount, signed_percent
from bitpress.app.ui.run_view import RunView
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs.status import Status
from bitpress.engine.runs.store import Run

WAITING = "Press Compress to measure."


def answers(recipe: Recipe, anatomy: Anatomy, prediction: Prediction, status: Status | None, run: Run | None, view: RunView) -> list[Card]:
    """How small, how good, how fast, for the recipe on screen."""
    mine = run is not None and readings.same_work(run, recipe)
    if mine and status is not None and status.active:
        return [_size(anatomy, prediction, recipe), _quality_so_far(view, recipe), _speed_so_far(view, recipe)]
    known = known_of(run, "recorded" if run and readings.is_recording(run) else "measured", recipe) if mine else None
    if known is not None:
        return [_measured_size(known, anatomy, prediction, recipe), quality_card(known), speed_card(known)]
    before = known_of(run, "previous", recipe) if run is not None and not mine else None
    quality = live_session.quality(recipe, anatomy, command(recipe)) or (quality_card(before) if before else Card("How good", "", None, note=WAITING))
    return [
        _size(anatomy, prediction, recipe),
        quality,
        ideal_speed_card(prediction.speedup, "Bytes of weights that one decode step reads, dense over compressed."),
    ]


def known_of(run: Run | None, badge: str, recipe: Recipe) -> Known | None:
    """The metrics of a finished run with their badge, None when it has none."""
    found = (run.metrics() or {}).get("metrics") if run else None
    if not found or "compressed" not in found:
        return None
    line = protocol_line(found["compressed"].get("protocol", {}))
    return Known(badge, found.get("dense", {}), found["compressed"], "\n\n".join(part for part in (line, f"`{command(recipe)}`") if part))


def protocol_line(protocol: dict) -> str:  # type: ignore[type-arg]
    """The protocol of a figure in one line, whatever of it the record holds."""
    if "one_line" in protocol:
        return str(protocol["one_line"])
    shown = {name: value for name, value in protocol.items() if not isinstance(value, dict | list) and name not in ("sha256", "digest", "asked_window")}
    return " · ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())


def _size(anatomy: Anatomy, prediction: Prediction, recipe: Recipe) -> Card:
    size = prediction.size
    if size is None:
        return Card("How small", "", None, note="The recipe does not fit the model yet.")
    told = f"Stored bytes from the shapes alone, scales and zeros counted; what is packed has exactly these.\n\n`{command(recipe)}`"
    return size_card(size.dense_bytes, size.bytes, size.bits_per_weight_linears, size.bits_per_weight_model, "predicted (exact)", told)


def _measured_size(known: Known, anatomy: Anatomy, prediction: Prediction, recipe: Recipe) -> Card:
    now = known.now
    if "bytes" not in now:
        return _size(anatomy, prediction, recipe)
    dense = known.dense.get("bytes", anatomy.bytes)
    return size_card(
        dense,
        now["bytes"],
        now["bits_per_weight_linears"],
        now["bits_per_weight_model"],
        known.badge,
        f"Bytes of what is packed, counted on disk.\n\n`{command(recipe)}`",
    )


def _quality_so_far(view: RunView, recipe: Recipe) -> Card:
    dense, now = view.perplexities()
    if not now:
        return Card("How good", "running", None, note="Windows are scored once every layer is done.")
    delta = f"{signed_percent(now[-1] / dense[-1] - 1)} from {amount(dense[-1])} dense" if dense else ""
    return Card("How good", "running", amount(now[-1]), delta, (f"perplexity over {len(now)} windows so far",), f"`{command(recipe)}`")


def _speed_so_far(view: RunView, recipe: Recipe) -> Card:
    if "decode_tokens_per_s" not in view.metrics.get("compressed", {}):
        return Card("How fast", "running", None, note="Timed after the windows, on the packed layers.")
    return speed_card(Known("running", view.metrics.get("dense", {}), view.metrics["compressed"], f"`{command(recipe)}`"))
