"""The three answers at the top of a page: how small, how good, how fast, each dense -> now and with the badge that says how it is known.

Knows the keys of a metrics record (DESIGN 3) and how to word them; computes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import streamlit as st

from bitpress.app.ui.numbers import THIN, amount, duration, file_size, signed_percent, times

# Each badge is a word and a shape besides its colour.
BADGES = {
    "measured": ":green-badge[:material/verified: measured]",
    "live": ":green-badge[:material/bolt: measured, live]",
    "noisy": ":orange-badge[:material/graphic_eq: measured, noisy]",
    "recorded": ":violet-badge[:material/history: recorded]",
    "predicted": ":blue-badge[:material/calculate: predicted]",
    "predicted (exact)": ":blue-badge[:material/calculate: predicted, exact]",
    "simulated": ":orange-badge[:material/science: simulated]",
    "ideal": ":gray-badge[:material/change_history: ideal]",
    "previous": ":orange-badge[:material/update: previous recipe]",
    "running": ":blue-badge[:material/hourglass_top: measuring]",
}
CARD_HEIGHT = 232
Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class Card:
    """One answer. `value` None draws a skeleton with `note` under it. `lines` are the smaller figures, `help` the protocol and the command."""

    title: str
    badge: str
    value: str | None
    delta: str = ""
    lines: tuple[str, ...] = ()
    help: str = ""
    note: str = ""
    better: bool | None = None  # None: neither good nor bad


def cards(items: Sequence[Card], key: str, changes: int = 0) -> None:
    """Draw cards side by side at a fixed height. A card whose text differs from the one drawn before `changes` rose is marked for a moment."""
    for column, item in zip(st.columns(len(items)), items, strict=True):
        with column:
            card(item, f"{key}-{item.title}", changes)


def card(item: Card, key: str, changes: int = 0) -> None:
    """Draw one card."""
    with st.container(border=True, height=CARD_HEIGHT, key=f"{_mark(key, item)}{key.replace(' ', '-')}", gap="xsmall"):
        st.markdown(
            f"**{item.title}**  \n{BADGES[item.badge]}" if item.badge else f"**{item.title}**  \n:gray-badge[:material/pending: not measured]",
            help=item.help or None,
        )
        if item.value is None:
            st.skeleton(height=44)
            st.caption(item.note)
            return
        colour = "off" if item.better is None else "normal"
        st.metric(
            item.title, item.value, item.delta or None, delta_color=colour, delta_arrow="off" if item.better is None else "auto", label_visibility="collapsed"
        )
        st.caption("  \n".join((*item.lines, item.note) if item.note else item.lines))


def _mark(key: str, item: Card) -> str:
    """A key prefix that changes when the card's numbers do: the new element runs the mark's animation once (theme.css)."""
    shown, count = st.session_state.get(f"{key}-shown", (None, 0))
    text = (item.value, item.delta, item.badge)
    if shown is not None and shown != text:
        count += 1
    st.session_state[f"{key}-shown"] = (text, count)
    return f"changed-{count % 2}-" if count else "still-"


@dataclass(frozen=True)
class Known:
    """Metrics and how they are known: a record of `metrics.json`, its badge, and the sentence and command behind it."""

    badge: str
    dense: Metrics = field(default_factory=dict)
    now: Metrics = field(default_factory=dict)
    help: str = ""


def quality_card(known: Known) -> Card:
    """Perplexity of the compressed model against dense with the paired interval of their ratio, KL divergence and agreement."""
    dense, now = known.dense, known.now
    if "perplexity" in now.get("not_finite", ()):
        lines = (f"mean loss {amount(now['nll_mean'])} nat a token", f"from {amount(dense['perplexity'])} dense") if "perplexity" in dense else ()
        return Card("How good", known.badge, "∞", "perplexity beyond any number", lines, known.help)
    if "perplexity" not in now:
        return Card("How good", known.badge, None, note="Not measured in this run.", help=known.help)
    lines = [f"perplexity, from {amount(dense['perplexity'])} dense" if "perplexity" in dense else "perplexity"]
    if "perplexity_ratio_low" in now:
        lines.append(_interval(now["perplexity_ratio_low"] - 1, now["perplexity_ratio_high"] - 1))
    if "kl_mean" in now:
        lines.append(f"KL {amount(now['kl_mean'])} nat" + (f" · same top-1 {amount(100 * now['same_top1'])}{THIN}%" if "same_top1" in now else ""))
    return Card("How good", known.badge, amount(now["perplexity"]), _change(dense, now), tuple(lines), known.help)


def _change(dense: Metrics, now: Metrics) -> str:
    """The change of perplexity, signed; empty where dense was not measured."""
    if "perplexity_ratio" in now:
        return f"{signed_percent(now['perplexity_ratio'] - 1)} perplexity"
    return f"{signed_percent(now['perplexity'] / dense['perplexity'] - 1)} perplexity" if dense.get("perplexity") else ""


def _interval(low: float, high: float) -> str:
    """The 95 % interval of a change; one that holds zero is no difference that was shown."""
    if low <= 0 <= high:
        return "not distinguishable from dense"
    return f"95{THIN}%: {signed_percent(low)} to {signed_percent(high)}"


def speed_card(known: Known) -> Card:
    """Decode speed of the packed weights against dense in the same loop, and time to first token. A disturbed timing says so."""
    dense, now = known.dense, known.now
    if "decode_tokens_per_s" not in now:
        return Card("How fast", known.badge, None, note="Latency was not measured in this run.", help=known.help)
    latency = now.get("protocol", {}).get("latency", {})
    ratio = now["decode_tokens_per_s"] / dense["decode_tokens_per_s"] if dense.get("decode_tokens_per_s") else None
    delta = f"{times(ratio)} the speed of dense" if ratio else ""
    lines = [f"tokens/s, from {amount(dense['decode_tokens_per_s'])} dense" if ratio else "tokens/s"]
    if "ttft_s" in now:
        lines.append(f"first token after {duration(now['ttft_s'])}")
    if "tpot_p95_s" in now:
        lines.append(f"{duration(now['tpot_p50_s'])} a token, 19 of 20 within {duration(now['tpot_p95_s'])}")
    badge = "noisy" if known.badge == "measured" and latency.get("noisy") else known.badge
    return Card(
        "How fast",
        badge,
        f"{amount(now['decode_tokens_per_s'])}",
        delta,
        tuple(lines),
        "\n\n".join(part for part in (_conditions(now, latency), known.help) if part),
    )


def _conditions(now: Metrics, latency: Mapping[str, Any]) -> str:
    """How a speed was timed, in one line."""
    shown = [f"{name.replace('_', ' ')} {value}" for name, value in latency.items() if not isinstance(value, list | dict)]
    kernels = [f"{layers} layers on {name}" for name, layers in now.get("kernels", {}).items()]
    noise = [f"noisy: {'; '.join(latency['noisy'])}"] if latency.get("noisy") else []
    return " · ".join((*noise, *kernels, *shown))


def size_card(dense_bytes: int, now_bytes: int, bits_linears: float, bits_model: float, badge: str, help_text: str = "") -> Card:
    """Stored bytes of the whole model, dense -> now, with both bits per weight."""
    delta = f"{times(dense_bytes / now_bytes)} smaller" if now_bytes else ""
    lines = (f"from {file_size(dense_bytes)} dense", f"{amount(bits_linears)} bits a linear weight, {amount(bits_model)} overall")
    return Card("How small", badge, file_size(now_bytes), delta, lines, help_text)


def ideal_speed_card(speedup: float, help_text: str = "") -> Card:
    """The bound on decode speed that bytes over bandwidth sets, before anything ran."""
    return Card("How fast", "ideal", times(speedup), "at most, bytes read a token", ("decode at batch 1 if reading weights is all it costs",), help_text)
