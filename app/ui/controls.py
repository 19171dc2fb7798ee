"""The settings of what is selected on the map: bits, group, zeros, rank, protection, ends, removal. Knows edits and widgets; no run.

Each widget is drawn from the recipe and its callback writes back to the recipe, so undo and presets move the widgets too.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import streamlit as st

from bitpress.app import edits, state
from bitpress.app.ui.layer_map import select, selected
from bitpress.app.ui.overlays import bits_of, selection_parts
from bitpress.app.ui.zeros_note import zeros_note
from bitpress.engine.accounting import break_even, part_rank
from bitpress.engine.errors import BitpressError
from bitpress.engine.latency_table import kept_table
from bitpress.engine.model.anatomy import ATTENTION_ROLES, MLP_ROLES, Anatomy
from bitpress.engine.recipe import BITS, PATTERNS, Recipe, Scheme

WIDTHS = (*BITS, edits.DENSE_BITS)
GROUPS = (32, 64, 128, 256, 0)
ALL = "All layers"
GRID = 0.05
RANK_STEP = 5


def scopes(anatomy: Anatomy) -> dict[str, str]:
    """The ready-made selections: label -> pattern."""
    roles = set(anatomy.roles)
    found = {ALL: "*"}
    found |= {"Attention": "role:attention"} if roles & set(ATTENTION_ROLES) else {}
    found |= {"MLP": "role:mlp"} if roles & set(MLP_ROLES) else {}
    ends = min(2, max(1, anatomy.blocks // 3))
    return found | {f"First {ends}": f"blocks:first{ends}", f"Last {ends}": f"blocks:last{ends}"} | {role: f"role:{role}" for role in anatomy.roles}


def target(anatomy: Anatomy) -> tuple[str, str]:
    """What the controls act on: (pattern, words for it). The whole model when no linear is selected."""
    names = selection_parts(selected(state.MAP), anatomy)["linears"]
    if not names or len(names) == len(anatomy.linears):
        return "*", f"all {len(anatomy.linears)} layers"
    pattern = edits.pattern_of(names, anatomy)
    if len(names) == 1:
        part = anatomy.by_name[names[0]]
        return pattern, f"block {part.block}, {part.role}" if part.block is not None else part.name
    return pattern, f"{len(names)} layers"


def scope_picker(anatomy: Anatomy) -> None:
    """Pills that select groups of layers on the map."""
    choices = scopes(anatomy)
    pattern, _ = target(anatomy)
    whole = anatomy.linears if pattern == "*" else ()
    chosen = edits.covered(pattern, anatomy) if not whole else frozenset(part.name for part in whole)
    st.session_state["scope"] = next((label for label, option in choices.items() if edits.covered(option, anatomy) == chosen), None)
    st.pills(
        "Change",
        list(choices),
        key="scope",
        on_change=lambda: _take_scope(choices, anatomy),
        help="Or select squares on the map: click, shift-click, drag a box, or click a label.",
    )


def _take_scope(choices: dict[str, str], anatomy: Anatomy) -> None:
    label = st.session_state["scope"]
    names = edits.covered(choices[label], anatomy) if label and label != ALL else frozenset()
    select(state.MAP, [part.name for part in anatomy.linears if part.name in names])


def common(values: list[Any]) -> Any:
    """The value that all share, None where they differ."""
    return values[0] if values and all(value == values[0] for value in values) else None


def try_edit(change: Callable[[], Recipe]) -> None:
    """Put a changed recipe on screen, or tell why it cannot be."""
    try:
        state.edit(change())
        state.session().notice = None
    except BitpressError as error:
        state.session().notice = error


def on_edit(key: str, change: Callable[[Recipe, Any], Recipe]) -> Callable[[], None]:
    """The callback of a widget: put the recipe that its value makes on screen."""

    def take() -> None:
        value = st.session_state[key]
        if value is not None:
            try_edit(partial(change, state.session().recipe, value))

    return take


def chosen_schemes(pattern: str, anatomy: Anatomy, schemes: Mapping[str, Scheme]) -> list[Scheme]:
    """The schemes of the linears that a pattern points at."""
    names = edits.covered(pattern, anatomy)
    return [scheme for name, scheme in schemes.items() if name in names]


def weight_controls(anatomy: Anatomy, schemes: Mapping[str, Scheme]) -> None:
    """Bits, group and symmetry of the selection."""
    pattern, words = target(anatomy)
    mine = chosen_schemes(pattern, anatomy, schemes)
    widths = sorted({bits_of(scheme) for scheme in mine})
    st.session_state["bits"] = common(widths)
    mixed = f"Bits of {words}" + (f" · now {', '.join(map(str, widths))}" if len(widths) > 1 else "")
    st.segmented_control(
        mixed, WIDTHS, key="bits", on_change=on_edit("bits", lambda recipe, bits: edits.set_weights(recipe, pattern, anatomy, bits=bits)),
        help="Bits a weight. 16 leaves the layer as it is.",
    )  # fmt: skip
    coded = [scheme.weights for scheme in mine if scheme.weights]
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        _group_control(pattern, anatomy, coded)
        st.session_state["symmetric"] = bool(common([scheme.symmetric for scheme in coded]))
        st.toggle(
            "Symmetric", key="symmetric", disabled=not coded, help="Levels lie evenly around zero and no zero point is stored.",
            on_change=on_edit("symmetric", lambda recipe, on: edits.set_weights(recipe, pattern, anatomy, symmetric=on)),
        )  # fmt: skip


def _group_control(pattern: str, anatomy: Anatomy, coded: list[Any]) -> None:
    found = common([scheme.group_size for scheme in coded])
    options = sorted({*GROUPS, *([found] if found is not None else [])}, key=lambda size: size or 1 << 30)
    st.session_state["group"] = found
    st.segmented_control(
        "Group", options, key="group", disabled=not coded, format_func=lambda size: str(size) if size else "row",
        on_change=on_edit("group", lambda recipe, size: edits.set_weights(recipe, pattern, anatomy, group_size=size)),
        help="Weights that share one scale. Smaller groups are closer to the weights and cost more bits.",
    )  # fmt: skip


def sparsity_controls(anatomy: Anatomy, schemes: Mapping[str, Scheme]) -> None:
    """Share of zeros and their pattern for the selection."""
    pattern, words = target(anatomy)
    mine = chosen_schemes(pattern, anatomy, schemes)
    kind = common([scheme.sparsity.pattern for scheme in mine if scheme.sparsity and scheme.sparsity.ratio]) or PATTERNS[0]
    ratios = {scheme.sparsity.ratio if scheme.sparsity else 0.0 for scheme in mine}
    percent = round(100 * (common(list(ratios)) or 0.0) / (100 * GRID)) * round(100 * GRID)
    st.session_state["zeros"], st.session_state["zeros-pattern"] = min(percent, 90), kind
    left, right = st.columns(2, vertical_alignment="bottom")

    def change(recipe: Recipe, _: Any) -> Recipe:
        share = st.session_state["zeros"] / 100
        wanted = st.session_state["zeros-pattern"] or PATTERNS[0]
        return edits.set_sparsity(recipe, pattern, anatomy, share if wanted == PATTERNS[0] else 0.5, wanted)

    def slide(recipe: Recipe, percent: int) -> Recipe:
        wanted = PATTERNS[0] if percent not in (0, 50) else st.session_state["zeros-pattern"] or PATTERNS[0]
        return edits.set_sparsity(recipe, pattern, anatomy, percent / 100, wanted)

    with left:
        mixed = " · now mixed" if len(ratios) > 1 else ""
        st.slider(
            f"Zeros in {words}, %{mixed}", 0, 90, step=round(100 * GRID), key="zeros", on_change=on_edit("zeros", slide),
            help="Share of weights set to zero. Below says what that brings in bytes and, where this machine was timed, in speed.",
        )  # fmt: skip
    with right:
        help_text = "2:4 zeroes two of every four neighbours, 4:8 four of every eight."
        st.segmented_control("Pattern", PATTERNS, key="zeros-pattern", on_change=on_edit("zeros-pattern", change), help=help_text)
    _zeros_note(pattern, anatomy, schemes)


def _zeros_note(pattern: str, anatomy: Anatomy, schemes: Mapping[str, Scheme]) -> None:
    """What the zeros bring: of the largest matrix among those selected that has any."""
    names = [name for name in edits.covered(pattern, anatomy) if name in schemes and schemes[name].sparsity]
    if names:
        part = max((anatomy.by_name[name] for name in names), key=lambda part: (part.numel, part.name))
        st.caption(zeros_note(schemes[part.name], part, kept_table()))


def rank_controls(anatomy: Anatomy, schemes: Mapping[str, Scheme]) -> None:
    """Share of the break-even rank that the factors of the selection keep."""
    pattern, words = target(anatomy)
    shares = {rank_share(scheme) for scheme in chosen_schemes(pattern, anatomy, schemes)}
    st.session_state["rank"] = max(RANK_STEP, round(100 * (common(list(shares)) or 1.0) / RANK_STEP) * RANK_STEP)
    st.slider(
        f"Rank of {words}, % of break-even{' · now mixed' if len(shares) > 1 else ''}", RANK_STEP, 100, step=RANK_STEP, key="rank",
        on_change=on_edit("rank", lambda recipe, percent: edits.set_rank(recipe, pattern, anatomy, percent / 100)),
        help="Below 100 a layer becomes two thin factors with that share of its parameters. At 100, break-even, it stays whole: factors are no smaller.",
    )  # fmt: skip
    names = edits.covered(pattern, anatomy)
    if len(names) == 1 and (part := anatomy.by_name[next(iter(names))]):
        now, limit = part_rank(part, schemes.get(part.name)), break_even(part.out_features, part.in_features)
        st.caption(f"{f'Rank {now}' if now else 'Whole'}; break-even at rank {limit}, of {min(part.out_features, part.in_features)} singular values.")


def rank_share(scheme: Scheme) -> float:
    """Share of the break-even rank under a scheme; 1 for a whole matrix, and nearly 0 where the recipe names the rank itself."""
    return 1.0 if scheme.rank is None else scheme.rank.keep or 0.01


def protect_controls(anatomy: Anatomy) -> None:
    """First and last blocks kept at 8 bits."""
    recipe, most = state.session().recipe, max(1, anatomy.blocks // 2)
    for column, end in zip(st.columns(2), ("first", "last"), strict=True):
        key = f"protect-{end}"
        st.session_state[key] = min(edits.protected(recipe, end), most)
        change = on_edit(key, lambda recipe, count, end=end: edits.protect(recipe, anatomy, end, count))
        column.slider(f"Keep {end} blocks at {edits.PROTECTED_BITS} bit", 0, most, key=key, on_change=change)


def end_controls(anatomy: Anatomy) -> None:
    """Width of the embedding, and of a head of its own."""
    recipe = state.session().recipe
    st.session_state["embedding-bits"] = recipe.embedding.bits if recipe.embedding else edits.DENSE_BITS
    label = "Embedding and tied head bits" if anatomy.tied else "Embedding bits"
    st.segmented_control(
        label, WIDTHS, key="embedding-bits", on_change=on_edit("embedding-bits", lambda recipe, bits: edits.set_embedding(recipe, anatomy, bits))
    )
    if anatomy.head is not None:
        st.session_state["head-bits"] = recipe.head.bits if recipe.head else edits.DENSE_BITS
        st.segmented_control("Head bits", WIDTHS, key="head-bits", on_change=on_edit("head-bits", lambda recipe, bits: edits.set_head(recipe, anatomy, bits)))


def drop_controls(anatomy: Anatomy) -> None:
    """Remove the selected blocks, or put removed ones back; offered when whole blocks are selected."""
    names = set(selection_parts(selected(state.MAP), anatomy)["linears"])
    blocks = [block for block in range(anatomy.blocks) if names and {part.name for part in anatomy.of_block(block)} <= names]
    gone = set(state.session().recipe.dropped_blocks(anatomy))
    put_back = bool(blocks) and set(blocks) <= gone
    label = "Put blocks back" if put_back else "Remove blocks"
    shown = f"{label} {', '.join(map(str, blocks))}" if blocks and len(blocks) < 6 else label
    all_gone = not put_back and len(gone | set(blocks)) >= anatomy.blocks
    refused = "One block has to stay: select fewer." if blocks else "Select whole blocks on the map first: click their numbers."
    change = partial(try_edit, lambda: edits.drop_blocks(state.session().recipe, anatomy, blocks, not put_back))
    st.button(
        shown,
        key="drop",
        disabled=not blocks or all_gone,
        on_click=change,
        help=refused if not blocks or all_gone else None,
        icon=":material/backspace:",
    )
