"""The methods of a recipe and their options, drawn from the catalogue's JSON schemas: a new method needs no form of its own.

Knows schemas and widgets; of a method only what its catalogue entry says.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from bitpress.app import edits, readings, state
from bitpress.app.ui.controls import try_edit
from bitpress.app.ui.model_picker import newest
from bitpress.engine.methods.catalogue import kinds
from bitpress.engine.recipe import Stage

Schema = Mapping[str, Any]
POLL_SECONDS = 0.5
VERBS = {"lowrank": "factor", "structure": "remove parts", "ratios": "share out zeros"}  # of kinds whose name is no verb


def method_form(catalogue: Mapping[str, Any] | None) -> None:
    """For each stage of the recipe: which method of its family, and that method's options."""
    stages = state.session().recipe.stages
    if catalogue is None:
        _undescribed(stages)
        return
    entries = {entry["id"]: entry for entry in catalogue["methods"]}
    for number, stage in enumerate(stages):
        if stage.method in entries:
            _stage_form(number, stage, entries)
    if not stages:
        st.caption("Nothing to do: every layer stays dense.")
    _preparing(stages, entries)


def _undescribed(stages: Sequence[Stage]) -> None:
    """Stands in until a worker has written what the methods say of themselves."""
    if _being_described():
        st.fragment(_awaited, run_every=POLL_SECONDS)()
        return
    names = " then ".join(stage.method for stage in stages) or "none, every layer stays dense"
    st.caption(f"Methods: {names}. They can be chosen here once a job has run.")


def _being_described() -> bool:
    run = newest("inspect", state.FIRST_MODEL)
    return run is not None and run.active


def _awaited() -> None:
    if readings.catalogue() is not None or not _being_described():
        st.rerun()
    st.caption("The methods are being described: it takes some seconds, once after an update.")


def _preparing(stages: Sequence[Stage], entries: Mapping[str, Any]) -> None:
    """Which methods prepare the model before it is rounded."""
    offered = [name for name, entry in entries.items() if entry["ability"]["part"] == "prepare"]
    if not offered or not any(entries[stage.method]["ability"]["part"] == "weights" for stage in stages if stage.method in entries):
        return
    st.session_state["preparing"] = [stage.method for stage in stages if stage.method in offered]
    st.multiselect(
        "Prepare first with",
        offered,
        key="preparing",
        format_func=lambda name: entries[name].get("title", name),
        on_change=lambda: try_edit(lambda: edits.set_preparations(state.session().recipe, st.session_state["preparing"])),
        help="\n\n".join(f"**{entries[name].get('title', name)}**: {entries[name]['summary']}" for name in offered),
    )


def _stage_form(number: int, stage: Stage, entries: Mapping[str, Any]) -> None:
    entry = entries[stage.method]
    kind = kinds()  # what a method does, not how: one that trains the whole model is chosen where rounding to nearest is
    alike = [name for name in entries if kind.get(name) == kind.get(stage.method)]
    key = f"method-{number}"
    st.session_state[key] = stage.method

    def take_method() -> None:
        chosen = entries[st.session_state[key]]
        fitted = edits.fit_weights if chosen["ability"]["part"] == "weights" else lambda recipe, ability: recipe
        try_edit(lambda: edits.set_stage(fitted(state.session().recipe, chosen["ability"]), kind, chosen["id"], {}))

    st.selectbox(
        f"Method to {VERBS.get(kind.get(stage.method, ''), entry['family'])}",
        alike,
        key=key,
        format_func=lambda name: entries[name].get("title", name),
        on_change=take_method,
        help="\n\n".join(f"**{entries[name].get('title', name)}**: {entries[name].get('use_when') or entries[name]['summary']}" for name in alike),
    )
    st.caption(f"{entry['summary']} {explained(entry)}")
    st.caption(f"Source: {entry['citation']}")
    properties = entry["options"].get("properties", {})
    if properties:
        with st.expander(f"Options of {entry.get('title', stage.method)}"):
            for name, schema in properties.items():
                _option(f"{key}-{stage.method}-{name}", name, schema, stage, kinds)


def explained(entry: Mapping[str, Any]) -> str:
    """What a method needs, costs and is good for, as sentences."""
    wants = ["calibration text"] * bool(entry.get("needs")) + ["gradients"] * bool(entry.get("gradients"))
    needs = f"Needs {' and '.join(wants)}." if wants else "Needs no text."
    return " ".join(filter(None, [needs, entry.get("cost"), entry.get("use_when")]))


def _option(key: str, name: str, schema: Schema, stage: Stage, kinds: Mapping[str, str]) -> None:
    value = stage.options.get(name, schema.get("default"))

    def take() -> None:
        chosen = st.session_state[key]
        options = {other: kept for other, kept in stage.options.items() if other != name} | ({} if chosen == schema.get("default") else {name: chosen})
        try_edit(lambda: edits.set_stage(state.session().recipe, kinds, stage.method, options))

    draw_option(key, schema.get("title", name).replace("_", " ").capitalize(), schema, value, take)


def draw_option(key: str, label: str, schema: Schema, value: Any, take: Any) -> None:
    """The widget that a schema of one option asks for: toggle, list, number or text."""
    st.session_state[key] = value
    common = {"key": key, "help": schema.get("description"), "on_change": take}
    kind = option_kind(schema)
    if kind == "toggle":
        st.toggle(label, **common)
    elif kind == "choice":
        st.selectbox(label, schema["enum"], **common)
    elif kind in ("integer", "number"):
        whole = kind == "integer"
        low, high = bounds(schema)
        cast = int if whole else float
        st.number_input(
            label, min_value=None if low is None else cast(low), max_value=None if high is None else cast(high), step=1 if whole else None, **common
        )
    else:
        st.text_input(label, **common)


def option_kind(schema: Schema) -> str:
    """toggle, choice, integer, number or text."""
    if "enum" in schema:
        return "choice"
    return {"boolean": "toggle", "integer": "integer", "number": "number"}.get(schema.get("type", ""), "text")


def bounds(schema: Schema) -> tuple[float | None, float | None]:
    """Least and largest value of a number's schema, None where it has none."""
    return schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum", schema.get("exclusiveMaximum"))
