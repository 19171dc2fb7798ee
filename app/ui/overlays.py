"""What colour and number each square of the layer map carries, for each overlay. Knows anatomy, recipe and results; draws nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import log10
from typing import Any

from bitpress.app.edits import DENSE_BITS, describe, describe_cache
from bitpress.app.ui.layer_map import Cell, Legend, grid
from bitpress.app.ui.numbers import TIMES, amount, file_size, whole
from bitpress.app.ui.theme import AMOUNT, HARM
from bitpress.engine.accounting import Size, break_even, cache_bytes, part_rank
from bitpress.engine.model.anatomy import Anatomy, Part
from bitpress.engine.recipe import Recipe, Scheme

OVERLAYS = ("bits", "sparsity", "rank", "sensitivity", "error", "bytes")
BIT_STEPS = (2, 3, 4, 5, 6, 8)
SMALLEST_SQUARE = 0.45
HEAD, CACHE = "head", "kv-cache"


@dataclass(frozen=True)
class Picture:
    """What an overlay draws from. `errors` and `scores` by layer name; `done` None means no job is at work."""

    anatomy: Anatomy
    recipe: Recipe
    schemes: Mapping[str, Scheme]
    size: Size
    errors: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    score_name: str = ""
    done: frozenset[str] | None = None
    fresh: frozenset[str] = frozenset()


def scale_of(overlay: str) -> tuple[str, ...]:
    """The colour scale of an overlay: amounts, or harm where more is worse."""
    return HARM if overlay in ("error", "sensitivity") else AMOUNT


def cells_of(picture: Picture, overlay: str) -> list[Cell]:
    """Every square of the map under one overlay, in the order of rows and blocks, the parts outside the blocks last."""
    schemes = picture.schemes
    paint = _painter(picture, overlay, schemes)
    smaller = picture.recipe.reduced(picture.anatomy).by_name
    cells = grid(picture.anatomy, lambda part: _cell(picture, smaller.get(part.name, part), schemes, paint))
    cells += [_cell(picture, part, schemes, paint) for part in picture.anatomy.linears if part.block is None]
    return cells + _ends(picture, overlay)


def _cell(picture: Picture, part: Part, schemes: Mapping[str, Scheme], paint: Callable[[Part], tuple[float | None, str, float | None]]) -> Cell:
    scheme = schemes.get(part.name)
    value, text, level = paint(part)
    zeros = scheme.sparsity.ratio if scheme and scheme.sparsity else 0.0
    gone = 1 - (1 - zeros) * part.numel / picture.anatomy.by_name[part.name].numel
    side = 1 - (1 - SMALLEST_SQUARE) * min(1.0, gone)
    state = _state(picture, part, scheme)
    return Cell(part.name, part.role, part.block, value, "" if state == "removed" else text, _title(picture, part, scheme), side, level, state)


def _state(picture: Picture, part: Part, scheme: Scheme | None) -> str:
    if scheme is None:
        return "removed"
    if part.name in picture.fresh:
        return "fresh"
    return "pending" if picture.done is not None and part.name not in picture.done else ""


def _title(picture: Picture, part: Part, scheme: Scheme | None) -> str:
    """The tooltip, which is also what a screen reader says of the square."""
    where = f"Block {part.block}, {part.role}" if part.block is not None else part.role
    held = f" (holds {', '.join(part.fused)})" if part.fused else ""
    lines = [where + held, describe(scheme), f"{whole(part.out_features)} {TIMES} {whole(part.in_features)}"]
    holder = picture.recipe.structure.holder_of(part.block) if part.block is not None else None
    if holder is not None:
        lines.append("holds the matrix that its group shares" if holder == part.block else f"uses the matrix of block {holder}")
    if part.name in picture.size.layer_bytes:
        lines.append(file_size(picture.size.layer_bytes[part.name]))
    if part.name in picture.errors:
        lines.append(f"relative error {amount(picture.errors[part.name])}")
    if part.name in picture.scores:
        lines.append(f"sensitivity {amount(picture.scores[part.name])}")
    return "\n".join((*lines, part.name))


Painted = tuple[float | None, str, float | None]


def _painter(picture: Picture, overlay: str, schemes: Mapping[str, Scheme]) -> Callable[[Part], Painted]:
    """The function from a part to (place on the scale, text, bar) for one overlay."""
    if overlay == "bits":
        return lambda part: bits_paint(bits_of(schemes.get(part.name)))
    if overlay == "sparsity":
        return lambda part: _share_paint(schemes.get(part.name))
    if overlay == "rank":
        return lambda part: _rank_paint(part, schemes.get(part.name))
    if overlay == "bytes":
        largest = _largest(picture)
        return lambda part: _bytes_paint(picture.size.layer_bytes.get(part.name), largest)
    values = picture.errors if overlay == "error" else picture.scores
    place = log_places(values)
    return lambda part: (place[part.name], amount(values[part.name], 2), place[part.name]) if part.name in place else (None, "", None)


def bits_of(scheme: Scheme | None) -> int:
    """Width under a scheme, 16 for dense."""
    return scheme.weights.bits if scheme and scheme.weights else DENSE_BITS


def bits_paint(bits: int) -> Painted:
    """Colour and number of a width; dense is the neutral grey."""
    return (None if bits >= DENSE_BITS else BIT_STEPS.index(bits) / (len(BIT_STEPS) - 1)), str(bits), None


def _share_paint(scheme: Scheme | None) -> Painted:
    zeros = scheme.sparsity.ratio if scheme and scheme.sparsity else 0.0
    return (zeros, f"{round(zeros * 100)}", zeros) if zeros else (None, "0", None)


def _rank_paint(part: Part, scheme: Scheme | None) -> Painted:
    """Share of the break-even rank as colour, the rank as number; a whole matrix is the neutral grey and says full."""
    rank = part_rank(part, scheme)
    share = min(1.0, rank / break_even(part.out_features, part.in_features))
    return (share, str(rank), share) if rank else (None, "full", None)


def _bytes_paint(size: int | None, largest: int) -> Painted:
    if size is None:
        return None, "", None
    share = size / largest
    return share, amount(size / 1e6 if largest >= 1e6 else size / 1e3, 2), share


def log_places(values: Mapping[str, float]) -> dict[str, float]:
    """Place of each value on a logarithmic scale from the least to the largest, 0..1; zeros stand at the beginning."""
    logs = {name: log10(value) for name, value in values.items() if value > 0}
    low, high = min(logs.values(), default=0.0), max(logs.values(), default=0.0)
    span = high - low or 1.0
    return {name: (logs[name] - low) / span if name in logs else 0.0 for name in values}


def _ends(picture: Picture, overlay: str) -> list[Cell]:
    """Embedding, head and KV cache: what is outside the blocks."""
    anatomy, recipe = picture.anatomy, picture.recipe
    cells = [_end(picture, overlay, anatomy.embedding, recipe.embedding.bits if recipe.embedding else DENSE_BITS)]
    if anatomy.head:
        cells.append(_end(picture, overlay, anatomy.head, recipe.head.bits if recipe.head else DENSE_BITS))
    else:
        cells.append(Cell(HEAD, "head", title="Head: tied to the embedding, stored once", text="tied"))
    cache = f"{file_size(round(cache_bytes(recipe, anatomy, anatomy.context) / anatomy.context))} a token"
    width = f"{recipe.kv_cache.keys.bits if recipe.kv_cache and recipe.kv_cache.keys else DENSE_BITS} bit"
    return [*cells, Cell(CACHE, "KV cache", title=f"KV cache: {describe_cache(recipe.kv_cache)}, {cache}", text=width if overlay == "bits" else cache)]


def _end(picture: Picture, overlay: str, part: Part, bits: int) -> Cell:
    size = picture.size.layer_bytes[part.name]
    width = "dense" if bits == DENSE_BITS else f"{bits} bit, one scale a row"
    title = "\n".join((part.role, width, f"{whole(part.out_features)} {TIMES} {whole(part.in_features)}", file_size(size), part.name))
    if overlay == "bits":
        return Cell(part.name, part.role, value=bits_paint(bits)[0], text=f"{bits} bit", title=title)
    if overlay == "bytes":
        share = min(1.0, size / _largest(picture))
        return Cell(part.name, part.role, value=share, text=file_size(size), title=title, level=share)
    return Cell(part.name, part.role, title=title)


def legend_of(picture: Picture, overlay: str) -> Legend:
    """The legend that belongs to `cells_of` of the same overlay."""
    structure = picture.recipe.structure
    units = bool(structure.shares or structure.remove_heads or structure.remove_neurons)
    smaller = [*(["more zeros"] if any(line.sparsity for line in picture.recipe.schemes) else []), *(["heads or neurons gone"] if units else [])]
    notes = [f"smaller square: {', '.join(smaller)}"] if smaller else []
    notes += ["outline: removed"] if picture.recipe.structure.drop_blocks else []
    notes += [f"blocks {' and '.join(map(str, group))} share their matrices" for group in structure.share_blocks]
    notes += ["faint: not done yet"] if picture.done is not None else []
    return Legend(legend_title(picture, overlay), _steps(picture, overlay), tuple(notes))


def legend_title(picture: Picture, overlay: str) -> str:
    """What the colour and the number in a square mean."""
    if overlay == "sensitivity":
        return f"Sensitivity ({picture.score_name})" if picture.score_name else "Sensitivity"
    if overlay == "bytes":
        return "Stored MB" if _largest(picture) >= 1e6 else "Stored kB"
    return {"bits": "Bits a weight", "sparsity": "Share of zeros, %", "rank": "Rank, of break-even", "error": "Relative error of the layer"}[overlay]


def _largest(picture: Picture) -> int:
    """Bytes of the largest linear: embeddings are so much larger that nothing else would show."""
    sizes = picture.size.layer_bytes
    return max((sizes[part.name] for part in picture.anatomy.linears if part.name in sizes), default=1)


def _steps(picture: Picture, overlay: str) -> tuple[tuple[str, float | None], ...]:
    if overlay == "bits":
        return (*((str(bits), bits_paint(bits)[0]) for bits in BIT_STEPS), ("16 dense", None))
    if overlay == "sparsity":
        return (("0", None), ("25", 0.25), ("50", 0.5), ("75", 0.75))
    if overlay == "rank":
        return (("whole", None), ("25 %", 0.25), ("50 %", 0.5), ("100 %", 1.0))
    if overlay == "bytes":
        largest = _largest(picture)
        return tuple((file_size(largest * share), share) for share in (0.1, 0.5, 1.0))
    values = [value for value in (picture.errors if overlay == "error" else picture.scores).values() if value > 0]
    if not values:
        return (("not measured yet", None),)
    low, high = min(values), max(values)
    return ((amount(low), 0.0), (amount((low * high) ** 0.5), 0.5), (amount(high), 1.0))


def missing_reason(picture: Picture, overlay: str) -> str:
    """Why an overlay has nothing to show, empty when it has."""
    if overlay == "error" and not picture.errors:
        return "Errors appear here as a run finishes its layers."
    if overlay == "sensitivity" and not picture.scores:
        return "Measure sensitivity on the sensitivity page to see it here."
    return ""


def selection_parts(ids: tuple[str, ...], anatomy: Anatomy) -> dict[str, Any]:
    """A selection in the recipe's words: its block linears, and whether embedding, head or cache are among them."""
    linears = [part.name for part in anatomy.linears if part.name in set(ids)]
    return {"linears": linears, "embedding": anatomy.embedding.name in ids, "head": bool(anatomy.head and anatomy.head.name in ids), "cache": CACHE in ids}
