"""The generations of a run, dense and compressed beside each other, streamed while it works. Knows samples; drawing is `token_diff`'s."""

from typing import Any

import streamlit as st

from bitpress.app.ui.numbers import THIN, amount
from bitpress.app.ui.run_view import RunView
from bitpress.app.ui.token_diff import token_diff
from bitpress.engine.runs.status import Status
from bitpress.engine.runs.store import Run

SIDES = ("dense", "compressed")
Pair = dict[str, dict[str, Any]]  # side -> {tokens, tokens_per_s}


def pairs_of(samples: list[dict[str, Any]]) -> dict[str, Pair]:
    """Prompt -> both sides, in the order in which the prompts came."""
    found: dict[str, Pair] = {}
    for sample in samples:
        found.setdefault(str(sample.get("prompt", "")), {})[str(sample.get("side", SIDES[1]))] = sample
    return found


def streaming_pairs(view: RunView) -> dict[str, Pair]:
    """The same from the events of a run that is still writing."""
    found: dict[str, Pair] = {}
    for (prompt, side), tokens in view.samples.items():
        found.setdefault(prompt, {})[side] = {"tokens": tokens}
    return found


def side_by_side(run: Run, status: Status, view: RunView) -> None:
    """Pick a prompt and read both."""
    finished = pairs_of(run.samples())
    pairs = finished | {prompt: pair for prompt, pair in streaming_pairs(view).items() if prompt not in finished or len(finished[prompt]) < len(SIDES)}
    if not pairs:
        if status.active:
            st.markdown("**Side by side**")
            st.skeleton(height=260)
            st.caption("Both models write the same prompts at the end of the run.")
        return
    st.markdown("**Side by side**", help="Same prompt, same seed. The first token that differs is marked; the tint is the KL divergence at each token.")
    prompts = list(pairs)
    prompt = st.pills("Prompt", prompts, default=prompts[0], required=True, key=f"prompt-{run.id}", label_visibility="collapsed") or prompts[0]
    pair = pairs[prompt]
    feet = tuple(_foot(pair.get(side, {})) for side in SIDES)
    token_diff(*(pair.get(side, {}).get("tokens", []) for side in SIDES), key=f"diff-{run.id}", feet=feet, writing=status.active and prompt not in finished)  # type: ignore[misc, arg-type]


def _foot(side: dict[str, Any]) -> str:
    return f"{amount(side['tokens_per_s'])}{THIN}tokens/s" if side.get("tokens_per_s") else ""
