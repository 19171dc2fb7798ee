"""The small language that points at layers: `role:v, blocks:first2 & role:mlp, model.layers.3.*`. Knows names and numbers only.

A comma means or, an ampersand means and. Atoms: a layer name or glob, `role:R` (also the families `role:attention` and
`role:mlp`), `blocks:B` with B one of `firstK`, `lastK`, `N`, `A-B`, `odd`, `even`.
"""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from bitpress.engine.errors import InputError
from bitpress.engine.model.anatomy import ATTENTION_ROLES, MLP_ROLES, ROLES, Anatomy, Part

ROLE_FAMILIES = {"attention": ATTENTION_ROLES, "mlp": MLP_ROLES}
KEPT_PATTERNS = 4096
FEW_NAMES = 6  # up to here a list of names reads better than roles and blocks


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


# From layers back to a pattern ------------------------------------------------------------------------------------


_coverage: dict[tuple[str, str, int], frozenset[str]] = {}


def covered(pattern: str, anatomy: Anatomy) -> frozenset[str]:
    """The names of the block linears that a pattern points at. Raises InputError for a pattern that is not understood."""
    key = (pattern, anatomy.fingerprint, anatomy.blocks)
    if key not in _coverage:
        if len(_coverage) >= KEPT_PATTERNS:
            _coverage.clear()
        _coverage[key] = frozenset(part.name for part in anatomy.linears if matches(pattern, part, anatomy.blocks))
    return _coverage[key]


def role_pattern(names: Iterable[str], anatomy: Anatomy) -> str:
    """A pattern for any set of linears inside blocks, role by role: not always the shortest, but made without trying any."""
    wanted = set(names)
    parts = [part for part in anatomy.linears if part.name in wanted]
    if any(part.block is None for part in parts):
        return ", ".join(part.name for part in parts)
    if len(parts) == len(anatomy.linears):
        return "*"
    pieces = []
    for role in dict.fromkeys(part.role for part in parts):
        blocks = _blocks_of(role, parts)
        whole = len(blocks) == sum(part.role == role for part in anatomy.linears)
        pieces += [f"role:{role}"] if whole else [f"role:{role} & blocks:{span}" for span in _spans(blocks)]
    return ", ".join(pieces)


def pattern_of(names: Iterable[str], anatomy: Anatomy) -> str:
    """The shortest pattern that points at exactly these linears: everything, a role, blocks, both, or their names."""
    wanted = frozenset(names)
    for pattern in _candidates(wanted, anatomy):
        if covered(pattern, anatomy) == wanted:
            return pattern
    return ", ".join(part.name for part in anatomy.linears if part.name in wanted)


def _candidates(wanted: frozenset[str], anatomy: Anatomy) -> Iterable[str]:
    parts = [part for part in anatomy.linears if part.name in wanted]
    blocks = sorted({part.block for part in parts if part.block is not None})
    roles = [role for role in anatomy.roles if any(part.role == role for part in parts)]
    by_role = ["role:attention", "role:mlp", *([f"role:{roles[0]}"] if len(roles) == 1 else [])]
    spans = [f"blocks:{span}" for span in _spans(blocks)]
    yield "*"
    yield from by_role
    yield ", ".join(spans)
    yield ", ".join(f"role:{role}" for role in roles)
    yield from (", ".join(f"{role} & {span}" for span in spans) for role in by_role)
    yield ", ".join(f"role:{role} & {span}" for role in roles for span in spans)
    if len(parts) > FEW_NAMES:
        yield role_pattern(wanted, anatomy)


def _blocks_of(role: str, parts: Sequence[Part]) -> list[int]:
    return sorted(part.block for part in parts if part.role == role and part.block is not None)


def _spans(blocks: Sequence[int]) -> list[str]:
    """Runs of consecutive numbers: 0, 3-5."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    return [str(first) if first == last else f"{first}-{last}" for first, last in runs]
