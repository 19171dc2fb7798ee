"""The small language that points at layers: `role:v, blocks:first2 & role:mlp, model.layers.3.*`. Knows names and numbers only.

A comma means or, an ampersand means and. Atoms: a layer name or glob, `role:R` (also the families `role:attention` and
`role:mlp`), `blocks:B` with B one of `firstK`, `lastK`, `N`, `A-B`, `odd`, `even`.
"""

import re
from difflib import get_close_matches
from fnmatch import fnmatchcase

from bitpress.engine.errors import InputError
from bitpress.engine.model.anatomy import ATTENTION_ROLES, MLP_ROLES, ROLES, Anatomy, Part

ROLE_FAMILIES = {"attention": ATTENTION_ROLES, "mlp": MLP_ROLES}


def chosen_blocks(selector: str, blocks: int) -> set[int]:
    """Block numbers that a selector names in a model of `blocks` blocks. Raises InputError when it is not understood."""
    text = selector.strip()
    if ends := re.fullmatch(r"(first|last)(\d+)", text):
        count = min(int(ends[2]), blocks)
        return set(range(count)) if ends[1] == "first" else set(range(blocks - count, blocks))
    if span := re.fullmatch(r"(\d+)(?:-(\d+))?", text):
        return set(range(int(span[1]), int(span[2] or span[1]) + 1))
    if text in ("odd", "even"):
        return set(range(text == "odd", blocks, 2))
    raise InputError(f"'{selector}' names no blocks.", "", "Write firstK, lastK, N, A-B, odd or even, such as first2 or 3-5.")


def _atom_matches(atom: str, part: Part, blocks: int) -> bool:
    if atom.startswith("role:"):
        role = atom[5:].strip()
        wanted = ROLE_FAMILIES.get(role, (role,))
        return part.role in wanted or any(inner in wanted for inner in part.fused)
    if atom.startswith("blocks:"):
        return part.block in chosen_blocks(atom[7:], blocks)
    return fnmatchcase(part.name, atom)


def matches(pattern: str, part: Part, blocks: int) -> bool:
    """Whether the pattern points at this part of a model with `blocks` blocks."""
    return any(all(_atom_matches(atom.strip(), part, blocks) for atom in option.split("&")) for option in pattern.split(","))


def pattern_problem(pattern: str, anatomy: Anatomy) -> str | None:
    """What is wrong with a pattern on this model, as a sentence; None when every alternative of it points at something."""
    for option in pattern.split(","):
        for atom in (piece.strip() for piece in option.split("&")):
            if wrong := _atom_problem(atom, anatomy):
                return wrong
        if not any(matches(option, part, anatomy.blocks) for part in anatomy.linears):
            return f"'{option.strip()}' matches none of the {len(anatomy.linears)} layers."
    return None


def _atom_problem(atom: str, anatomy: Anatomy) -> str | None:
    if not atom:
        return "An empty pattern matches nothing."
    if atom.startswith("role:"):
        role = atom[5:].strip()
        known = (*ROLES, *ROLE_FAMILIES)
        near = get_close_matches(role, known, 1)
        return None if role in known else f"There is no role '{role}'" + (f"; did you mean '{near[0]}'?" if near else ".")
    if atom.startswith("blocks:"):
        try:
            chosen_blocks(atom[7:], anatomy.blocks)
        except InputError as error:
            return str(error)
    return None
