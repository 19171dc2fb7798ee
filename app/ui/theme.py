"""The colours that mean something, in one place. Knows scales and inks; the rest of the theme is `.streamlit/config.toml`.

Both scales step evenly in lightness (OKLCH), so that an equal step in value looks like an equal step in colour.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import streamlit as st

ACCENT = "#5b66e4"
DENSE_COLOUR = "#7a8494"
COMPRESSED_COLOUR = ACCENT
AMOUNT = ("#e9e386", "#b1d97d", "#6bcd87", "#00bc9a", "#00a5ab", "#008ab3", "#006bad", "#344e99", "#43347a")
HARM = ("#ebebeb", "#ddc3b2", "#cd9c7a", "#bb7440", "#a74a00")
CHANGE = ("#1f68bc", "#578aca", "#88aad7", "#b9cbe2", "#ebebeb", "#ddc3b2", "#cd9c7a", "#bb7440", "#a74a00")
STEPS = 33


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def colour_at(scale: Sequence[str], position: float) -> str:
    """Hex colour at `position` in 0..1 along a scale; positions outside are pulled to its ends."""
    place = min(max(position, 0.0), 1.0) * (len(scale) - 1)
    low = min(int(place), len(scale) - 2)
    share = place - low
    pairs = zip(_channels(scale[low]), _channels(scale[low + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def ink_on(colour: str) -> str:
    """Black or white, whichever reads better on this colour (WCAG relative luminance)."""
    linear = [value / 255 / 12.92 if value <= 10 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in _channels(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#11151c" if luminance > 0.179 else "#ffffff"


def palette(scale: Sequence[str], steps: int = STEPS) -> list[tuple[str, str]]:
    """`steps` colours along a scale, each with the ink for text on it."""
    colours = [colour_at(scale, index / (steps - 1)) for index in range(steps)]
    return [(colour, ink_on(colour)) for colour in colours]


@cache
def _style() -> str:
    return f"<style>{Path(__file__).with_name('theme.css').read_text(encoding='utf8')}</style>"


def style() -> None:
    """Put the few rules of our own into the page: the mark of a change, and less empty space at the top."""
    st.html(_style())
