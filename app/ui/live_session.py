"""A live session as the explore page uses it: every edit is an order to the resident worker, and what it has measured so far. Knows desks and orders.

The prediction stands in the card until the first window is there; then the measurement takes its place, window by window.
"""

import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import streamlit as st

from bitpress.app import state
from bitpress.app.ui.desk_state import BADGES, engine_of
from bitpress.app.ui.metric_cards import Card
from bitpress.app.ui.numbers import amount, duration, signed_percent
from bitpress.app.ui.sensitivity_read import report_of
from bitpress.engine.errors import BitpressError
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.predict import predicted_kl
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs.desk import Desk, open_desk
from bitpress.engine.runs.events import ORDER_ENDS, last_number
from bitpress.engine.runs.store import Run, Store
from bitpress.engine.sensitivity_file import FISHER

POLL_SECONDS = 0.25
_KEY = "live-order"
_SESSION = "live-session"


@dataclass
class Asked:
    """The order of this tab: for which recipe, to which desk, what came back. `seen` is the last event read."""

    digest: str
    desk: str
    order: str
    seen: int
    windows: list[dict[str, Any]] = field(default_factory=list)
    end: str = ""
    told: Mapping[str, Any] = field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Whether an answer is still to come."""
        return not self.end


def toggle(anatomy: Anatomy) -> None:
    """Turn the session on or off, and how its worker stands."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.toggle("Live session", key="live", help="Every edit is measured at once on eight short windows by a worker that keeps the model in memory. "
                  "Layers are made by methods that look at no text.")  # fmt: skip
        asked = _asked()
        if asked is None or not st.session_state.get("live"):
            return
        engine = engine_of(Run(Store().folder / asked.desk).status())
        if asked.end == "order_failed":
            st.caption(f":orange[{' '.join(str(asked.told.get(part, '')) for part in ('what', 'why', 'remedy')).strip()}]")
        elif asked.open:
            st.markdown(BADGES.get(engine.state, "") if not asked.windows else ":blue-badge[:material/hourglass_top: measuring]")
        else:
            words = f"{asked.told.get('layers', 0)} layers made anew, answered in {duration(float(asked.told.get('seconds', 0.0)))}"
            st.caption(" ".join([words + ".", *map(str, asked.told.get("notes", ()))]))


def follow(anatomy: Anatomy) -> bool:
    """Ask for the recipe on screen if it is not asked for yet, and read what has come; True while an answer is to come."""
    if not st.session_state.get("live"):
        st.session_state.pop(_KEY, None)
        return False
    recipe, asked = state.session().recipe, _asked()
    if asked is None or asked.digest != recipe.digest():
        try:
            asked = _ask(recipe)
        except BitpressError as error:
            state.session().notice = error
            return False
    _read(asked)
    return asked.open


def _asked() -> Asked | None:
    return st.session_state.get(_KEY)


def _ask(recipe: Recipe) -> Asked:
    session = st.session_state.setdefault(_SESSION, uuid.uuid4().hex)
    digest = state.keep_recipe(recipe)
    desk = open_desk(recipe.model, session=session)
    seen = last_number(desk.path / "events.jsonl")
    asked = st.session_state[_KEY] = Asked(digest, desk.id, desk.order("scheme", {"recipe": digest}), seen)
    return asked


def _read(asked: Asked) -> None:
    if not asked.open:
        return
    for event in Desk(Run(Store().folder / asked.desk)).events(asked.seen):
        asked.seen = event.n
        if event.data.get("order") != asked.order:
            continue
        if event.kind == "window":
            asked.windows.append(event.data)
        elif event.kind in ORDER_ENDS:
            asked.end, asked.told = event.kind, event.data


def quality(recipe: Recipe, anatomy: Anatomy, command: str) -> Card | None:
    """The quality card of a recipe that no run has measured: live windows where there are some, else what the scores foretell."""
    asked = _asked()
    mine = asked if asked is not None and st.session_state.get("live") and asked.digest == recipe.digest() else None
    if mine is not None and mine.windows:
        return _measured(mine, command)
    return _predicted(recipe, anatomy, mine is not None and mine.open)


def _measured(asked: Asked, command: str) -> Card:
    nlls = [float(window["nll"]) for window in asked.windows if "nll" in window]
    denses = [float(window["nll_dense"]) for window in asked.windows if "nll_dense" in window]
    if not nlls or not denses:
        return Card("How good", "live", "∞", "perplexity beyond any number")
    now, dense = math.exp(min(700.0, sum(nlls) / len(nlls))), math.exp(sum(denses) / len(denses))
    lines = [f"perplexity, from {amount(dense)} dense"]
    last = asked.windows[-1]
    if "low" in last and "high" in last:
        inside = last["low"] <= 1 <= last["high"]
        lines.append("not distinguishable from dense" if inside else f"95\u2009%: {signed_percent(last['low'] - 1)} to {signed_percent(last['high'] - 1)}")
    figures = asked.told.get("metrics", {}).get("compressed", {})
    if "kl_mean" in figures:
        lines.append(f"KL {amount(figures['kl_mean'])} nat · same top-1 {amount(100 * figures['same_top1'])}\u2009%")
    else:
        lines.append(f"{len(nlls)} windows so far")
    help_text = f"{asked.told.get('protocol', '')}\n\n`{command}`".strip()
    return Card("How good", "live", amount(now), f"{signed_percent(now / dense - 1)} perplexity", tuple(lines), help_text)


def _predicted(recipe: Recipe, anatomy: Anatomy, waiting: bool) -> Card | None:
    report = report_of(anatomy, FISHER)
    harm = predicted_kl(recipe, anatomy, report) if report is not None else None
    if harm is None:
        return None
    note = "being measured" if waiting else "Press Compress to measure."
    help_text = "The layers' divergences, added up; how they disturb each other only a measurement knows."
    lines = (f"{amount(harm)} nat of divergence a token", "foretold from the layers' sensitivity")
    return Card("How good", "predicted", signed_percent(math.expm1(min(harm, 700.0))), "perplexity over dense", lines, help_text, note)
