"""Edits of a recipe as a person makes them on screen. Knows recipes and anatomies; pure functions, no widget.

Every edit becomes lines of `schemes`, where later lines win. The list stays short: what an edit overrides everywhere is
taken out, and an edit goes into the line that already has its pattern wherever that means the same.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bitpress.engine.errors import InputError
from bitpress.engine.methods.catalogue import kinds
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import EmbeddingScheme, KVCache, Recipe, Scheme, SchemeLine, Stage, Structure, WeightPatch
from bitpress.engine.stage_fit import fit_stages
from bitpress.engine.structure import Place, blocks_to_remove, chopped
from bitpress.engine.targets import covered, pattern_of, pattern_problem

DENSE_BITS = 16
PROTECTED_BITS = 8
CACHE_WINDOW = 32  # tokens that stay dense where the cache is coded
PARTS = ("weights", "sparsity", "rank")


def set_weights(recipe: Recipe, pattern: str, anatomy: Anatomy, **fields: Any) -> Recipe:
    """Set `bits`, `group_size` or `symmetric` of the linears that the pattern points at; bits 16 leaves them dense."""
    if fields.get("bits") == DENSE_BITS:
        return _with_line(recipe, {"match": pattern, "weights": "dense"}, anatomy)
    return _with_line(recipe, {"match": pattern, "weights": fields}, anatomy)


def set_sparsity(recipe: Recipe, pattern: str, anatomy: Anatomy, ratio: float, kind: str) -> Recipe:
    """Set the share of zeros and their pattern; 0 removes the scheme. 2:4 and 4:8 are always a half."""
    if ratio == 0:
        return _with_line(recipe, {"match": pattern, "sparsity": "dense"}, anatomy)
    return _with_line(recipe, {"match": pattern, "sparsity": {"ratio": ratio if kind == "unstructured" else 0.5, "pattern": kind}}, anatomy)


def set_rank(recipe: Recipe, pattern: str, anatomy: Anatomy, keep: float) -> Recipe:
    """Keep this share of the break-even rank of the linears that the pattern points at; 1 leaves them whole."""
    if keep >= 1:
        return _with_line(recipe, {"match": pattern, "rank": "dense"}, anatomy)
    return _with_line(recipe, {"match": pattern, "rank": {"keep": keep}}, anatomy)


def set_cache(recipe: Recipe, anatomy: Anatomy, bits: int, keep: float) -> Recipe:
    """Width of cached keys and values (16 leaves them dense), and the share of their numbers that a latent keeps (1: all)."""
    sides = {"keys": {"bits": bits, "axis": "channel"}, "values": {"bits": bits, "axis": "token"}, "residual_window": CACHE_WINDOW} if bits < DENSE_BITS else {}
    latent = {"rank": {"keep": keep}} if keep < 1 else {}
    changed = recipe.model_copy(update={"kv_cache": KVCache.model_validate({**sides, **latent}) if sides or latent else None})
    return fit_stages(changed, anatomy)


def protect(recipe: Recipe, anatomy: Anatomy, end: str, count: int) -> Recipe:
    """Keep the `count` first or last blocks (`end`) at 8 bits; 0 takes the protection back."""
    lines = [line for line in recipe.schemes if not is_protection(line, end)]
    kept = recipe.model_copy(update={"schemes": lines})
    return set_weights(kept, f"blocks:{end}{count}", anatomy, bits=PROTECTED_BITS) if count else fit_stages(kept, anatomy, kinds())


def is_protection(line: SchemeLine, end: str) -> bool:
    """Whether a line is one that `protect` writes for this end."""
    number = line.match.removeprefix(f"blocks:{end}")
    bits = getattr(line.weights, "bits", None)
    return number != line.match and number.isdigit() and bits == PROTECTED_BITS and line.sparsity is None and line.rank is None


def protected(recipe: Recipe, end: str) -> int:
    """How many blocks at this end are protected."""
    return max((int(line.match.removeprefix(f"blocks:{end}")) for line in recipe.schemes if is_protection(line, end)), default=0)


def set_embedding(recipe: Recipe, anatomy: Anatomy, bits: int) -> Recipe:
    """Width of the embedding (and the head tied to it); 16 leaves it dense."""
    return recipe.model_copy(update={"embedding": None if bits == DENSE_BITS else EmbeddingScheme(bits=bits)})


def set_head(recipe: Recipe, anatomy: Anatomy, bits: int) -> Recipe:
    """Width of a head that is not tied; 16 leaves it dense."""
    return recipe.model_copy(update={"head": None if bits == DENSE_BITS or anatomy.tied else EmbeddingScheme(bits=bits)})


def drop_blocks(recipe: Recipe, anatomy: Anatomy, blocks: Iterable[int], drop: bool) -> Recipe:
    """Remove whole blocks, or put them back. Raises InputError when none would be left."""
    gone = set(recipe.dropped_blocks(anatomy))
    gone = gone | set(blocks) if drop else gone - set(blocks)
    if len(gone) >= anatomy.blocks:
        raise InputError("Every block would be removed.", f"The model has {anatomy.blocks} blocks.", "Leave at least one.")
    structure = Structure(**{**recipe.structure.model_dump(), "drop_blocks": sorted(gone)})
    return recipe.model_copy(update={"structure": structure})


def with_lines(recipe: Recipe, lines: Sequence[Mapping[str, Any]], anatomy: Anatomy) -> Recipe:
    """Replace all lines, as the table of exceptions does. Raises InputError when one is wrong or points at nothing."""
    changed = Recipe.from_dict({**recipe.to_dict(), "schemes": [dict(line) for line in lines]})
    for line in changed.schemes:
        wrong = pattern_problem(line.match, anatomy)
        if wrong:
            raise InputError(f"The line '{line.match}' cannot be used.", wrong, "Use names, globs, role:… or blocks:….")
    return fit_stages(changed, anatomy, kinds())


def set_stage(recipe: Recipe, family_of: Mapping[str, str], method: str, options: Mapping[str, Any]) -> Recipe:
    """Use this method, with these options, for its family; a stage of the same family is replaced where it stands."""
    stage = Stage(method=method, options=dict(options))
    family = family_of.get(method)
    stages = [stage if family_of.get(old.method) == family else old for old in recipe.stages]
    return recipe.model_copy(update={"stages": stages if stage in stages else [*stages, stage]})


def set_preparations(recipe: Recipe, methods: Sequence[str]) -> Recipe:
    """Prepare with these methods, in this order, before everything that rounds; one that was there keeps its options."""
    kind = kinds()
    old = {stage.method: stage for stage in recipe.stages if kind.get(stage.method) == "prepare"}
    rest = [stage for stage in recipe.stages if stage.method not in old]
    at = next((number for number, stage in enumerate(rest) if kind.get(stage.method) == "quantize"), len(rest))
    chosen = [old.get(name, Stage(method=name)) for name in methods]
    return recipe.model_copy(update={"stages": [*rest[:at], *chosen, *rest[at:]]})


def fit_weights(recipe: Recipe, ability: Mapping[str, Any]) -> Recipe:
    """The same schemes in a format, and of the nearest widths, that a method has. ability: of its catalogue entry."""
    return recipe.model_copy(update={"schemes": [line.model_copy(update={"weights": _fitted(line.weights, ability)}) for line in recipe.schemes]})


def _fitted(weights: Any, ability: Mapping[str, Any]) -> Any:
    if not isinstance(weights, WeightPatch) or weights.bits is None:
        return weights
    formats, bits = ability.get("formats") or ["uniform"], ability.get("bits") or [weights.bits]
    form = weights.format if (weights.format or "uniform") in formats else None if "uniform" in formats else formats[0]
    nearest = min(bits, key=lambda width: abs(width - (weights.bits or width)))
    return weights.model_copy(update={"format": form, "bits": nearest})


def _with_line(recipe: Recipe, line: dict[str, Any], anatomy: Anatomy) -> Recipe:
    new = SchemeLine.model_validate(line)
    appended = compacted([*recipe.schemes, new], anatomy)
    return fit_stages(recipe.model_copy(update={"schemes": appended}), anatomy, kinds())


def compacted(lines: Sequence[SchemeLine], anatomy: Anatomy) -> list[SchemeLine]:
    """Fewer lines with the same meaning: overridden fields are dropped, the last line is merged into one of the same pattern."""
    live = [kept for index, line in enumerate(lines) if (kept := _live_part(line, lines[index + 1 :], anatomy))]
    if len(live) < 2:
        return live
    last = live[-1]
    for index in range(len(live) - 2, -1, -1):
        if live[index].match == last.match and _can_join(live[index], last, live[index + 1 : -1], anatomy):
            return [*live[:index], _merged(live[index], last), *live[index + 1 : -1]]
    return live


def _can_join(old: SchemeLine, last: SchemeLine, between: Sequence[SchemeLine], anatomy: Anatomy) -> bool:
    """Whether the last line means the same in the old one's place: nothing between sets the same fields of the same layers."""
    if old.weights == "dense" and last.weights not in (None, "dense"):
        return False  # what comes after the word dense starts from nothing; in its place it would build on earlier lines
    mine = covered(last.match, anatomy)
    rivals = [line for line in between if covered(line.match, anatomy) & mine]
    if last.weights == "dense" and any(line.weights is not None for line in rivals):
        return False
    fields = [] if last.weights in (None, "dense") else list(last.weights.model_dump(exclude_none=True))
    parts = [part for part in PARTS[1:] if getattr(last, part) is not None]
    return not any(_sets_weight(line, field) for line in rivals for field in fields) and not any(_sets_whole(line, part) for line in rivals for part in parts)


def _live_part(line: SchemeLine, later: Sequence[SchemeLine], anatomy: Anatomy) -> SchemeLine | None:
    """The fields of a line that still reach some linear under the lines after it; None when none does."""
    fields = line.model_dump(exclude_none=True)
    for part in PARTS:
        value = fields.get(part)
        if value == "dense" or part != "weights":
            if part in fields and _hidden(line, later, anatomy, lambda other, part=part: _sets_whole(other, part)):
                del fields[part]
        elif value:
            alive = {name: v for name, v in value.items() if not _hidden(line, later, anatomy, lambda other, name=name: _sets_weight(other, name))}
            fields["weights"] = alive
            if not alive:
                del fields["weights"]
    return SchemeLine.model_validate(fields) if len(fields) > 1 else None


def _sets_whole(line: SchemeLine, part: str) -> bool:
    """Whether the line sets a part whatever stood before: any value of sparsity and rank, the word dense for weights."""
    value = getattr(line, part)
    return value == "dense" if part == "weights" else value is not None


def _sets_weight(line: SchemeLine, field: str) -> bool:
    return line.weights == "dense" or (line.weights is not None and getattr(line.weights, field) is not None)


def _hidden(line: SchemeLine, later: Sequence[SchemeLine], anatomy: Anatomy, sets: Any) -> bool:
    seen: frozenset[str] = frozenset().union(*(covered(other.match, anatomy) for other in later if sets(other)))
    return covered(line.match, anatomy) <= seen


def _merged(old: SchemeLine, new: SchemeLine) -> SchemeLine:
    fields = old.model_dump(exclude_none=True)
    for part, value in new.model_dump(exclude_none=True).items():
        before = fields.get(part)
        fields[part] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) and part == "weights" else value
    return SchemeLine.model_validate(fields)


def set_units(recipe: Recipe, anatomy: Anatomy, kind: str, blocks: Iterable[int], keep: float) -> Recipe:
    """Let these blocks keep a share of their `heads` or `neurons`; a stage is added that chooses which."""
    shares = {block: recipe.structure.share_of(kind, anatomy, block) for block in range(anatomy.blocks)} | dict.fromkeys(blocks, keep)
    by_share: dict[float, list[int]] = {}
    for block, share in shares.items():
        by_share.setdefault(share, []).append(block)
    lines = [{"match": _match(found, anatomy), "keep": share} for share, found in by_share.items() if share < 1]
    return fit_stages(_with_structure(recipe, {kind: lines or None}), anatomy)


def chop(recipe: Recipe, anatomy: Anatomy, count: int, place: Place) -> Recipe:
    """Drop `count` blocks by their place, instead of those dropped so far; 0 puts all back. Raises InputError when the ends would go."""
    gone = chopped(anatomy.blocks, blocks_to_remove(anatomy.blocks, count / anatomy.blocks), place) if count else []
    return fit_stages(_with_structure(recipe, {"drop_blocks": gone}), anatomy)


def _with_structure(recipe: Recipe, fields: Mapping[str, Any]) -> Recipe:
    return recipe.model_copy(update={"structure": Structure.model_validate({**recipe.structure.model_dump(), **fields})})


def _match(blocks: Sequence[int], anatomy: Anatomy) -> str:
    """A pattern for whole blocks."""
    if len(blocks) == anatomy.blocks:
        return "*"
    return pattern_of([part.name for block in blocks for part in anatomy.of_block(block)], anatomy)


def difference(base: Recipe, now: Recipe, anatomy: Anatomy) -> list[tuple[str, str, str]]:
    """What the recipe does otherwise than its preset: (where, in the preset, now), layers of the same change under one pattern."""
    before, after = base.resolve(anatomy), now.resolve(anatomy)
    changes: dict[tuple[str, str], list[str]] = {}
    for name in anatomy.by_name:
        old, new = describe(before.get(name)), describe(after.get(name))
        if old != new and (name in before or name in after):
            changes.setdefault((old, new), []).append(name)
    found = [(pattern_of(names, anatomy), old, new) for (old, new), names in changes.items()]
    ends = [("embedding", base.embedding, now.embedding), ("head", base.head, now.head)]
    found += [(name, _width(old), _width(new)) for name, old, new in ends if old != new]
    caches = [("cache", describe_cache(base.kv_cache), describe_cache(now.kv_cache))] if base.kv_cache != now.kv_cache else []
    found += caches
    shapes = [structure_words(recipe.structure, anatomy) for recipe in (base, now)]
    found += [("shape", *shapes)] if shapes[0] != shapes[1] else []  # type: ignore[list-item]
    methods = [" then ".join(stage.method for stage in recipe.stages) or "none" for recipe in (base, now)]
    return found + ([("methods", *methods)] if base.stages != now.stages else [])  # type: ignore[list-item]


def structure_words(structure: Structure, anatomy: Anatomy) -> str:
    """What of the blocks stays, in a few words."""
    units = structure.units(anatomy)
    gone = set(structure.dropped(anatomy.blocks))
    if structure.stream:
        return f"{structure.stream.width} of {anatomy.hidden} channels between the blocks"
    left = [units.get(block, anatomy.units) for block in range(anatomy.blocks) if block not in gone]
    heads, neurons = sum(unit.heads for unit in left), sum(unit.neurons for unit in left)
    if len(left) == anatomy.blocks and heads == anatomy.blocks * anatomy.heads and neurons == anatomy.blocks * anatomy.ffn:
        return "whole"
    return f"{len(left)} blocks, {heads:,} heads, {neurons:,} neurons"


def describe(scheme: Scheme | None) -> str:
    """A scheme in a few words: 4 bit, group 64, asymmetric; half zero 2:4."""
    if scheme is None:
        return "removed"
    words = []
    if scheme.weights:
        group = f"group {scheme.weights.group_size}" if scheme.weights.group_size else "one group a row"
        words.append(f"{scheme.weights.bits} bit, {group}, {'symmetric' if scheme.weights.symmetric else 'asymmetric'}")
    if scheme.sparsity and scheme.sparsity.ratio:
        words.append(f"{scheme.sparsity.ratio:.0%} zeros, {scheme.sparsity.pattern}")
    if scheme.rank:
        words.append(f"rank {scheme.rank.rank}" if scheme.rank.rank else f"rank {scheme.rank.keep:.0%} of break-even")
    return "; ".join(words) or "dense"


def describe_layers(recipe: Recipe, anatomy: Anatomy) -> dict[str, str]:
    """Layer -> its scheme in a few words; the embedding and a head of its own too."""
    words = {name: describe(scheme) for name, scheme in recipe.resolve(anatomy).items()}
    ends = ((anatomy.embedding, recipe.embedding), (anatomy.head, recipe.head))
    return {part.name: _width(scheme) for part, scheme in ends if part is not None} | words


def describe_cache(cache: KVCache | None) -> str:
    """A cache scheme in a few words."""
    if cache is None:
        return "dense"
    words = [f"{side} {scheme.bits} bit" for side, scheme in (("keys", cache.keys), ("values", cache.values)) if scheme]
    if cache.rank:
        words.append("latent, ranks by block" if cache.rank.ranks else f"latent {cache.rank.keep:.0%}")
    if cache.window:
        words.append(f"first {cache.window.sinks} and last {cache.window.recent} tokens")
    return ", ".join(words)


def _width(scheme: EmbeddingScheme | None) -> str:
    return f"{scheme.bits} bit" if scheme else "dense"
