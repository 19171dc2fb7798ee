"""Checks a stage's options against the JSON schema of its method. Knows the flat schemas that methods have; no torch."""

from difflib import get_close_matches
from typing import Any

from bitpress.engine.recipe import Problem

TYPES: dict[str, tuple[type, ...]] = {"boolean": (bool,), "integer": (int,), "number": (int, float), "string": (str,)}
TYPE_WORDS = {"boolean": "true or false", "integer": "a whole number", "number": "a number", "string": "text"}
BOUNDS = {
    "minimum": ("at least", lambda value, bound: value >= bound),
    "maximum": ("at most", lambda value, bound: value <= bound),
    "exclusiveMinimum": ("more than", lambda value, bound: value > bound),
    "exclusiveMaximum": ("less than", lambda value, bound: value < bound),
}


def option_problems(field: str, options: dict[str, Any], schema: dict[str, Any]) -> list[Problem]:
    """One Problem for every option that is unknown, of another type, or outside its bounds."""
    known = schema.get("properties", {})
    found = []
    for name, value in options.items():
        if name not in known:
            found.append(Problem(field=f"{field}.{name}", wrong="There is no such option.", right=_known_names(name, list(known))))
        elif right := _right_value(value, known[name]):
            found.append(Problem(field=f"{field}.{name}", wrong=f"{value!r} cannot be used.", right=right))
    return found


def _known_names(name: str, known: list[str]) -> str:
    if not known:
        return "This method has no options."
    near = get_close_matches(name, known, 1)
    return f"Did you mean '{near[0]}'?" if near else f"Options are {', '.join(known)}."


def _right_value(value: Any, rule: dict[str, Any]) -> str:
    """What would be right in place of `value`, as a sentence; empty when the value is right."""
    if "enum" in rule:
        return "" if value in rule["enum"] else f"Choose {' or '.join(map(str, rule['enum']))}."
    kind = rule.get("type", "string")
    if not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return f"Give {TYPE_WORDS[kind]}."
    limits = [(words, rule[name], test(value, rule[name])) for name, (words, test) in BOUNDS.items() if name in rule]
    if all(kept for _, _, kept in limits):
        return ""
    return f"Give {TYPE_WORDS[kind]}, {' and '.join(f'{words} {bound}' for words, bound, _ in limits)}."
