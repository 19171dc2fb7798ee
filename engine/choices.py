"""What may become of each layer and what it costs: the table that allocation chooses from. Knows scores, shapes and locks; solves nothing, torch-free.

An item is a layer, or several that are tied and get the same option. `dense` is always an option and does no harm. Harms are
those of one kind of kept sensitivity, in nats of KL divergence a token where the kind says so, and are taken to add up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bitpress.engine.accounting import embedding_layout, layout_of
from bitpress.engine.errors import InputError
from bitpress.engine.model.anatomy import Anatomy, Part
from bitpress.engine.recipe import EmbeddingScheme, Scheme
from bitpress.engine.sensitivity_file import DROP, NATS, Option, SensitivityReport
from bitpress.engine.targets import covered, pattern_problem

DENSE = Option(id="dense", scheme=Scheme())
GONE = Option(id=DROP, scheme=Scheme())  # of layers in a dropped block; never chosen for a layer alone
DENSE_BITS = 16
HEAD_BITS = 8  # of an untied head where the embedding is an item
TIES = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Choices:
    """Items x options. harm_IJ: infinite where an option is not allowed. linear_bytes_IJ: of block linears alone. embedding_bits: None where it is an item.
    drop_harm: block -> harm of leaving it out. scores: option -> layer -> harm, of everything that was scored."""

    anatomy: Anatomy
    kind: str
    options: tuple[Option, ...]
    items: tuple[tuple[str, ...], ...]
    harm_IJ: Floats
    bytes_IJ: Floats
    linear_bytes_IJ: Floats
    rest_bytes: int
    embedding_bits: int | None = 8
    drop_harm: Mapping[int, float] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def in_nats(self) -> bool:
        """Whether harms are KL divergences, so that they foretell a perplexity."""
        return self.kind in NATS

    def item_of(self, layer: str) -> int:
        """The item that holds a layer. Raises InputError when none does."""
        for number, layers in enumerate(self.items):
            if layer in layers:
                return number
        raise InputError(f"'{layer}' is not among the layers that bits are given to.", "", "Choose a block linear or the embedding.")


def choices_of(
    anatomy: Anatomy,
    report: SensitivityReport,
    kind: str,
    ties: Sequence[str] = (),
    locks: Mapping[str, str] | None = None,
    embedding_bits: int | None = 8,
) -> Choices:
    """The table of a model.

    ties: names of `TIES`. locks: pattern -> option id, or a single layer's name. embedding_bits: fixed width of the
    embedding and head, 16 for dense; None lets the budget decide where the scores cover it. Raises InputError for unknown names and
    for locks that contradict each other.
    """
    if kind not in report.kinds:
        raise InputError(f"No sensitivity of kind '{kind}' is measured for {anatomy.model}.", f"There is {', '.join(report.kinds)}.", "Measure it first.")
    table = report.table(kind)
    options = (*(option for option in report.options if set(table[option.id]) & {part.name for part in anatomy.linears}), DENSE, GONE)
    items = _items(anatomy, ties)
    fixed = _fixed(anatomy, items, options, locks or {})
    free_embedding = embedding_bits is None
    if free_embedding:
        items = (*items, (anatomy.embedding.name,))
    harm_IJ = np.array([[_harm(table, layers, option) for option in options] for layers in items])
    for item, option in fixed.items():
        harm_IJ[item, np.arange(len(options)) != option] = np.inf
    if free_embedding:
        harm_IJ[-1] = [_embedding_harm(table, anatomy, option) for option in options]
    stored = np.array([[sum(_stored(anatomy, layer, option) for layer in layers) for option in options] for layers in items], dtype=float)
    linear = stored.copy()
    if free_embedding:
        linear[-1] = 0.0
    rest = _rest_bytes(anatomy, embedding_bits)
    return Choices(anatomy, kind, options, items, harm_IJ, stored, linear, rest, embedding_bits, _drop_harms(table, anatomy, items, fixed), table)


def _drop_harms(table: Mapping[str, Mapping[str, float]], anatomy: Anatomy, items: Sequence[Sequence[str]], fixed: Mapping[int, int]) -> dict[int, float]:
    """Block -> harm of leaving it out, of those that may go: scored, without a locked layer, and not the first, so that one is left."""
    held = {anatomy.by_name[items[item][0]].block for item in fixed}
    scored = {block: table.get(DROP, {}).get(f"{anatomy.block_prefix}.{block}") for block in range(1, anatomy.blocks)}
    return {block: harm for block, harm in scored.items() if harm is not None and block not in held}


def _items(anatomy: Anatomy, ties: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    if unknown := sorted(set(ties) - set(TIES)):
        raise InputError(f"There is no tie '{unknown[0]}'.", "", f"Ties are {', '.join(TIES)}.")
    tied = {role: tie for tie in ties for role in TIES[tie]}
    groups: dict[tuple[object, ...], list[str]] = {}
    for part in anatomy.linears:
        key = (part.block, tied[part.role]) if part.role in tied else (part.name,)
        groups.setdefault(key, []).append(part.name)
    return tuple(tuple(names) for names in groups.values())


def _fixed(anatomy: Anatomy, items: Sequence[tuple[str, ...]], options: Sequence[Option], locks: Mapping[str, str]) -> dict[int, int]:
    """Item -> the option that it is locked to."""
    known = {option.id: number for number, option in enumerate(options) if option is not GONE}
    place = {layer: number for number, layers in enumerate(items) for layer in layers}
    found: dict[int, tuple[str, str]] = {}
    for pattern, wanted in locks.items():
        if wanted not in known:
            raise InputError(f"'{pattern}' is locked to '{wanted}', which is no option.", "", f"Options are {', '.join(known)}.")
        if wrong := pattern_problem(pattern, anatomy):
            raise InputError(f"The lock '{pattern}' cannot be used.", wrong, "Use names, globs, role:… or blocks:….")
        for layer in covered(pattern, anatomy):
            before = found.setdefault(place[layer], (wanted, layer))
            if before[0] != wanted:
                raise _conflict(layer, wanted, *before)
    return {item: known[option] for item, (option, _) in found.items()}


def _conflict(layer: str, wanted: str, before: str, other: str) -> InputError:
    if layer == other:
        return InputError(f"{layer} is locked twice.", f"One lock asks for {before}, another for {wanted}.", f"Keep one of them: {before} or {wanted}.")
    why = f"They are tied and must get the same option, but are locked to {before} and {wanted}."
    return InputError(f"The locks of {other} and {layer} conflict.", why, f"Lock both to {before} or both to {wanted}, or untie them.")


def _harm(table: Mapping[str, Mapping[str, float]], layers: Sequence[str], option: Option) -> float:
    if option in (DENSE, GONE):
        return 0.0 if option is DENSE else np.inf
    found = [table[option.id].get(layer) for layer in layers]
    return float(sum(harm for harm in found if harm is not None)) if None not in found else np.inf


def _embedding_harm(table: Mapping[str, Mapping[str, float]], anatomy: Anatomy, option: Option) -> float:
    return 0.0 if option is DENSE else table.get(option.id, {}).get(anatomy.embedding.name, np.inf)


def _stored(anatomy: Anatomy, layer: str, option: Option) -> int:
    part = anatomy.by_name[layer]
    scheme = option.scheme
    if part.name == anatomy.embedding.name:
        return _embedding_bytes(part, scheme.weights.bits if scheme.weights else DENSE_BITS, anatomy.itemsize)
    return _matrix_bytes(part.out_features, part.in_features, scheme, anatomy.itemsize)


@lru_cache(maxsize=4096)
def _matrix_bytes(rows: int, columns: int, scheme: Scheme, itemsize: int) -> int:
    return layout_of(scheme, itemsize).nbytes(rows, columns)


def end_scheme(bits: int) -> EmbeddingScheme | None:
    """The scheme of an embedding or head at a width; None for 16, which is dense."""
    return EmbeddingScheme(bits=bits) if bits < DENSE_BITS else None


def _embedding_bytes(part: Part, bits: int, itemsize: int) -> int:
    return embedding_layout(end_scheme(bits), itemsize).nbytes(part.out_features, part.in_features)


def _rest_bytes(anatomy: Anatomy, embedding_bits: int | None) -> int:
    """Everything that no item holds: norms, biases, an untied head, and the embedding where its width is fixed."""
    ends = [anatomy.embedding, *([anatomy.head] if anatomy.head else [])]
    rest = (anatomy.params - anatomy.linear_params - sum(part.numel for part in ends)) * anatomy.itemsize
    if anatomy.head:
        rest += _embedding_bytes(anatomy.head, HEAD_BITS if embedding_bits is None else embedding_bits, anatomy.itemsize)
    return rest + (_embedding_bytes(anatomy.embedding, embedding_bits, anatomy.itemsize) if embedding_bits is not None else 0)
