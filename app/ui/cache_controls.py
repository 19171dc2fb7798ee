"""The settings of the KV cache and what they make of its bytes at any length. Knows edits, accounting and widgets; no run."""

import streamlit as st

from bitpress.app import edits, state
from bitpress.app.ui.cache_view import cache_forms
from bitpress.app.ui.controls import on_edit
from bitpress.app.ui.numbers import file_size
from bitpress.engine.accounting import cache_bytes
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import CACHED, Recipe

CACHE_WIDTHS = (2, 3, 4, 8, edits.DENSE_BITS)
LEAST, STEP = 10, 5  # percent


def cache_controls(anatomy: Anatomy) -> None:
    """Bits of cached keys and values, the latent's share, and the bytes at a length of context."""
    recipe, own = state.session().recipe, anatomy.architecture in CACHED
    bits, keep = cache_state(recipe)
    st.session_state["cache-bits"], st.session_state["cache-rank"] = bits if bits in CACHE_WIDTHS else None, keep
    st.segmented_control(
        "KV cache bits", CACHE_WIDTHS, key="cache-bits", disabled=not own,
        on_change=on_edit("cache-bits", lambda recipe, bits: edits.set_cache(recipe, anatomy, bits, cache_state(recipe)[1] / 100)),
        help=f"Keys share a scale over tokens of a channel, values over channels of a token; the last {edits.CACHE_WINDOW} tokens stay dense.",
    )  # fmt: skip
    st.slider(
        "KV cache rank, % of its width", LEAST, 100, step=STEP, key="cache-rank", disabled=not own,
        on_change=on_edit("cache-rank", lambda recipe, percent: edits.set_cache(recipe, anatomy, cache_state(recipe)[0], percent / 100)),
        help="Below 100 the cache holds what is between two factors of the key and value matrices. Keys cost more time then: they are made anew at every step.",
    )  # fmt: skip
    tokens = st.select_slider("Context, tokens", lengths(anatomy.context), key="cache-context")
    st.caption(cache_words(recipe, anatomy, tokens))
    cache_forms(anatomy, tokens)


def cache_state(recipe: Recipe) -> tuple[int, int]:
    """(bits, percent of the width that is kept) of a recipe's cache."""
    cache = recipe.kv_cache
    bits = cache.keys.bits if cache and cache.keys else edits.DENSE_BITS
    keep = cache.rank.keep if cache and cache.rank else 1.0
    return bits, min(100, max(LEAST, round(100 * keep / STEP) * STEP))


def lengths(context: int) -> list[int]:
    """Powers of two from 128, and the model's whole context."""
    return sorted({*(length for length in (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768) if length < context), context})


def cache_words(recipe: Recipe, anatomy: Anatomy, tokens: int) -> str:
    """Bytes of the dense cache and of the recipe's, exact."""
    if recipe.validate_for(anatomy):
        return "The cache of this recipe does not fit the model."
    dense, now = cache_bytes(None, anatomy, tokens), cache_bytes(recipe, anatomy, tokens)
    if now == dense:
        return f"{file_size(dense)} at {tokens:,} tokens, dense."
    return f"{file_size(dense)} dense, {file_size(now)} now: {dense / now:.3g} times smaller at {tokens:,} tokens."
