"""Generations side by side, token by token: where they part, what differs, how sure the model was. Knows token records, no run.

A token record is `{id, text, logprob, rank, top: [[text, probability]...], kl}`; all but `text` may be absent, and rank 0 is the
most likely, which people are told as 1. The text is a model's own and not to be trusted: it goes to the browser as data and
is only ever written as text, never as markup.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log10
from typing import Any

import streamlit as st

from bitpress.app.ui.alignment import FIRST, OTHER, SAME, Alignment, align
from bitpress.app.ui.component import own_component

Token = Mapping[str, Any]
KL_LOW, KL_HIGH = 1e-3, 10.0  # nats; the tint is logarithmic between them
KL_STEPS = ("0.01", "0.1", "1", "10")
SHOWN_ALTERNATIVES = 5
_component = own_component("token_diff")


@dataclass(frozen=True)
class Side:
    """One generation: its title, its tokens, a line under it (tokens/s), and whether more is to come."""

    title: str
    tokens: Sequence[Token] = ()
    foot: str = ""
    writing: bool = False


def token_diff(
    left: Sequence[Token],
    right: Sequence[Token],
    key: str,
    titles: tuple[str, str] = ("Dense", "Compressed"),
    feet: tuple[str, str] = ("", ""),
    writing: bool = False,
) -> None:
    """Draw two generations of one prompt and seed, the reference on the left, with the table twin folded away below."""
    token_panes([Side(titles[0], left, feet[0], writing), Side(titles[1], right, feet[1], writing)], key)


def token_panes(sides: Sequence[Side], key: str, height: int = 260) -> None:
    """Draw any number of generations, each compared with the first one. `height` is of the scrolling text in pixels."""
    found = alignments(sides)
    panes = [_pane(side, marks) for side, marks in zip(sides, _marks(sides, found), strict=True)]
    steps = [[label, kl_place(float(label))] for label in KL_STEPS]
    data = {"panes": panes, "firsts": [one.first for one in found], "steps": steps, "height": height, "verdict": verdict(sides, found)}
    _component(key=key, data=data)
    if any(side.tokens for side in sides):
        with st.expander("As a table", key=f"{key}-twin"):
            st.dataframe(table(sides, found), hide_index=True, height=240, key=f"{key}-table", alt="The same tokens as a table")


def alignments(sides: Sequence[Side]) -> list[Alignment]:
    """Each side after the first aligned with the first."""
    reference = [_identity(token) for token in sides[0].tokens]
    return [align(reference, [_identity(token) for token in side.tokens], not (side.writing or sides[0].writing)) for side in sides[1:]]


def _identity(token: Token) -> Any:
    """What makes two tokens the same: the id, or the text where a record has none."""
    return token["id"] if token.get("id") is not None else str(token.get("text", ""))


def _marks(sides: Sequence[Side], found: Sequence[Alignment]) -> list[tuple[str, ...]]:
    """Marks of every side; the reference wears those of its comparison with the next one."""
    own = found[0].left if found else (SAME,) * len(sides[0].tokens)
    return [own, *(one.right for one in found)]


def _pane(side: Side, marks: Sequence[str]) -> dict[str, Any]:
    """A side as the browser gets it, short names to keep the polling light."""
    tokens = [
        {"t": str(token.get("text", "")), "m": mark, "k": kl_place(token.get("kl")), "p": _probability(token.get("logprob")), "r": _place(token),
         "a": [[str(text), round(float(p), 4)] for text, p in (token.get("top") or [])[:SHOWN_ALTERNATIVES]], "kl": _rounded(token.get("kl"))}
        for token, mark in zip(side.tokens, marks, strict=True)
    ]  # fmt: skip
    return {"title": side.title, "foot": side.foot, "writing": side.writing, "tokens": tokens}


def _probability(logprob: float | None) -> float | None:
    return None if logprob is None else round(exp(min(0.0, logprob)), 5)


def _place(token: Token) -> int | None:
    """Place among all tokens by probability, the most likely being 1."""
    return None if token.get("rank") is None else int(token["rank"]) + 1


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def kl_place(kl: float | None) -> float:
    """Strength of the tint in 0..1 for a divergence in nats, logarithmic from 0.001 to 10."""
    if kl is None or kl <= KL_LOW:
        return 0.0
    share = (log10(kl) - log10(KL_LOW)) / (log10(KL_HIGH) - log10(KL_LOW))
    return round(min(share, 1.0), 2)


def verdict(sides: Sequence[Side], found: Sequence[Alignment]) -> str:
    """One sentence on how far the sides agree."""
    if not found or not sides[0].tokens or not any(side.tokens for side in sides[1:]):
        return ""
    parts = [_verdict_of(side, one) for side, one in zip(sides[1:], found, strict=True) if side.tokens]
    return " · ".join(parts)


def _verdict_of(side: Side, one: Alignment) -> str:
    if one.first is None:
        return f"{side.title}: same so far" if side.writing else f"{side.title}: all {len(side.tokens)} tokens the same"
    return f"{side.title}: parts at token {one.first + 1}, {one.agreeing} of {len(side.tokens)} tokens agree"


NAMES = {SAME: "same", FIRST: "first divergence", OTHER: "different"}


def table(sides: Sequence[Side], found: Sequence[Alignment]) -> dict[str, list[Any]]:
    """The table twin: one row a position, for each side its token, probability, rank, divergence and mark."""
    rows = max((len(side.tokens) for side in sides), default=0)
    columns: dict[str, list[Any]] = {"position": list(range(1, rows + 1))}
    for number, (side, marks) in enumerate(zip(sides, _marks(sides, found), strict=True)):
        name = side.title if [other.title for other in sides].count(side.title) == 1 else f"{side.title} ({number + 1})"
        tokens = list(side.tokens) + [{}] * (rows - len(side.tokens))
        columns[name] = [_shown(token) for token in tokens]
        columns[f"{name}: probability"] = [_probability(token.get("logprob")) for token in tokens]
        columns[f"{name}: rank"] = [_place(token) for token in tokens]
        columns[f"{name}: KL, nat"] = [_rounded(token.get("kl")) for token in tokens]
        columns[f"{name}: compared"] = [NAMES[mark] for mark in marks] + [""] * (rows - len(marks))
    return {name: values for name, values in columns.items() if any(value is not None for value in values)}


def _shown(token: Token) -> str:
    """A token with its white space visible."""
    return str(token.get("text", "")).replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
