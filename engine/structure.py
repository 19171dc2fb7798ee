"""What of a model's shape goes: blocks, heads, neurons, width of the hidden states. Knows numbers and names; no weights, and no torch.

A structure names its parts by number (`drop_blocks`, `remove_heads`, `remove_neurons`) or gives shares (`heads`, `neurons`)
that a stage turns into numbers. The first and the last block may be dropped by number, though no method does that.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from pydantic import Field

from bitpress.engine.errors import InputError
from bitpress.engine.fields import Keep, Rank, Strict, Whole
from bitpress.engine.model.anatomy import Anatomy, Units
from bitpress.engine.targets import chosen_blocks, matches

NEURONS_IN = 8  # a width that this divides is fast to multiply by
Place = Literal["max-gap", "input", "output", "middle", "both"]  # of blocks that go


class UnitShare(Strict):
    """Share of the MLP neurons, or of the heads, that the matching blocks keep."""

    match: str = "*"
    keep: Keep


class Stream(Strict):
    """The hidden states inside the blocks have `width` channels; by_block: every block its own, with a matrix between two of them."""

    width: Whole
    by_block: bool = False

    def turns(self, hidden: int, blocks: int) -> int:
        """Weights of the matrices that turn the hidden states on their way; one shared by all blocks is there once and used twice."""
        return (2 * hidden + (blocks - 1) * self.width) * self.width if self.by_block else hidden * self.width


class Structure(Strict):
    """What changes the model's shape.

    drop_blocks: block numbers or a selector such as "odd" or "last4". remove_heads, remove_neurons: block -> numbers of query
    heads or neurons; a key-value head goes with the last of its query heads. heads, neurons: shares, later lines win. share_blocks: groups
    of blocks that hold one set of matrices together; share_rank: rank of the product that each of them has of its own beside each, none without it.
    """

    drop_blocks: list[Whole] | str = Field(default_factory=list)
    remove_heads: dict[int, list[Whole]] = Field(default_factory=dict)
    remove_neurons: dict[int, list[Whole]] | None = None
    heads: UnitShare | list[UnitShare] | None = None
    neurons: UnitShare | list[UnitShare] | None = None
    share_blocks: list[list[Whole]] = Field(default_factory=list)
    share_rank: Rank | None = None
    stream: Stream | None = None  # as a stage has chosen it, which keeps the directions with the run
    added_biases: list[str] | None = None  # layers to which a repair gave a bias, by the dense model's names

    @property
    def shares(self) -> bool:
        """True while heads or neurons are given as shares, which a stage has to turn into numbers."""
        return bool(self.heads or self.neurons)

    def dropped(self, blocks: int) -> list[int]:
        """The numbers of the dropped blocks of a model of `blocks` blocks, sorted. Raises InputError for a selector that is not understood."""
        wanted = self.drop_blocks
        return sorted(set(wanted)) if isinstance(wanted, list) else sorted(chosen_blocks(wanted, blocks))

    def kept_heads(self, anatomy: Anatomy, block: int) -> list[int]:
        """The query heads that stay, in order."""
        gone = set(self.remove_heads.get(block, ()))
        return [head for head in range(anatomy.heads) if head not in gone]

    def kept_neurons(self, anatomy: Anatomy, block: int) -> list[int]:
        """The neurons that stay, in order."""
        gone = set((self.remove_neurons or {}).get(block, ()))
        return [neuron for neuron in range(anatomy.ffn) if neuron not in gone]

    def holder_of(self, block: int) -> int | None:
        """The block whose matrices this block uses, itself the first of a group; None for a block that shares nothing."""
        return next((group[0] for group in self.share_blocks if block in group), None)

    def share_of(self, kind: str, anatomy: Anatomy, block: int) -> float:
        """The share of `heads` or `neurons` that a block keeps; 1 where no line speaks of it."""
        lines = getattr(self, kind) or []
        wanted = 1.0
        for line in lines if isinstance(lines, list) else [lines]:
            if any(matches(line.match, part, anatomy.blocks) for part in anatomy.of_block(block)):
                wanted = line.keep
        return wanted

    def units(self, anatomy: Anatomy) -> dict[int, Units]:
        """What the changed blocks keep, by number; blocks that keep everything are absent. Shares count as what a stage will keep."""
        found = {}
        for block in range(anatomy.blocks):
            units = self._units_of(anatomy, block)
            if units != anatomy.units:
                found[block] = units
        return found

    def _units_of(self, anatomy: Anatomy, block: int) -> Units:
        heads = self.kept_heads(anatomy, block) if self.remove_heads else range(anatomy.heads)
        groups = {head // anatomy.group for head in heads} if anatomy.heads else ()
        neurons = anatomy.ffn - len(set((self.remove_neurons or {}).get(block, ())))
        kv_heads = count_kept(len(groups), self.share_of("heads", anatomy, block)) if self.heads else len(groups)
        each = len(heads) if kv_heads == len(groups) else kv_heads * anatomy.group
        return Units(each, kv_heads, neurons_kept(neurons, self.share_of("neurons", anatomy, block)) if self.neurons else neurons)


def count_kept(units: int, share: float) -> int:
    """How many of `units` a share keeps: at least one."""
    return max(1, round(share * units))


def neurons_kept(neurons: int, share: float) -> int:
    """How many neurons a share keeps: a multiple of 8 where all of them are one, for kernels and patterns such as 2:4 need widths that divide."""
    count = count_kept(neurons, share)
    return count if neurons % NEURONS_IN else max(NEURONS_IN, NEURONS_IN * round(count / NEURONS_IN))


Problems = list[tuple[str, str, str]]  # (field, what is wrong, what would be right)


def structure_problems(structure: Structure, anatomy: Anatomy) -> Problems:
    """What of a structure does not fit a model."""
    of_units = [*_head_problems(structure, anatomy), *_neuron_problems(structure, anatomy)]
    found = [*_block_problems(structure, anatomy), *of_units, *_stream_problems(structure, anatomy)]
    return found or _sharing_problems(structure, anatomy)


def _stream_problems(structure: Structure, anatomy: Anatomy) -> Problems:
    if structure.stream is None:
        return []
    if not 0 < structure.stream.width <= anatomy.hidden:
        return [("structure.stream.width", f"The hidden states have {anatomy.hidden} channels.", f"Keep 1 to {anatomy.hidden} of them.")]
    if structure.drop_blocks or structure.remove_heads or structure.remove_neurons or structure.shares:
        return [("structure.stream", "Narrower hidden states do not go with removed blocks, heads or neurons.", "Leave out one of the two.")]
    return []


def _block_problems(structure: Structure, anatomy: Anatomy) -> Problems:
    field = "structure.drop_blocks"
    try:
        gone = structure.dropped(anatomy.blocks)
    except InputError as error:
        return [(field, error.what, error.remedy)]
    outside = [block for block in gone if not 0 <= block < anatomy.blocks]
    if outside:
        return [(field, f"The model has no block {outside[0]}.", f"Blocks are 0 to {anatomy.blocks - 1}.")]
    return [(field, "Every block would be dropped.", "Leave at least one.")] if len(gone) == anatomy.blocks else []


def _head_problems(structure: Structure, anatomy: Anatomy) -> Problems:
    field = "structure.remove_heads" if structure.remove_heads else "structure.heads"
    if not (structure.remove_heads or structure.heads):
        return []
    if not {"q", "k", "v", "o"} <= set(anatomy.roles) or not anatomy.heads:
        return [(field, "This model's attention matrices are fused, so that no head can be taken out.", "Remove neurons or blocks instead.")]
    return _number_problems(field, "head", structure.remove_heads, anatomy.heads, anatomy)


def _neuron_problems(structure: Structure, anatomy: Anatomy) -> Problems:
    field = "structure.remove_neurons" if structure.remove_neurons else "structure.neurons"
    if not (structure.remove_neurons or structure.neurons):
        return []
    if not {"down", "fc2"} & set(anatomy.roles):
        return [(field, "This model has no MLP whose neurons can be told apart.", "Remove the field.")]
    return _number_problems(field, "neuron", structure.remove_neurons or {}, anatomy.ffn, anatomy)


def _sharing_problems(structure: Structure, anatomy: Anatomy) -> Problems:
    field, groups = "structure.share_blocks", structure.share_blocks
    members = [block for group in groups for block in group]
    if outside := [block for block in members if not 0 <= block < anatomy.blocks]:
        return [(field, f"The model has no block {outside[0]}.", f"Blocks are 0 to {anatomy.blocks - 1}.")]
    if any(len(group) < 2 for group in groups):
        return [(field, "A block cannot share with none.", "Name at least two blocks a group, such as [14, 15].")]
    if twice := [block for block in members if members.count(block) > 1]:
        return [(field, f"Block {twice[0]} is named twice.", "Put every block in one group at most.")]
    if gone := sorted(set(members) & set(structure.dropped(anatomy.blocks))):
        return [(field, f"Block {gone[0]} is dropped.", "Leave it in drop_blocks or in share_blocks.")]
    if groups and (structure.remove_heads or structure.remove_neurons or structure.shares or structure.stream):
        return [(field, "Blocks that lose heads, neurons or channels have matrices of unlike shapes.", "Share blocks, or remove those.")]
    least = min((min(part.out_features, part.in_features) for block in members for part in anatomy.of_block(block)), default=0)
    if structure.share_rank and groups and structure.share_rank > least:
        return [("structure.share_rank", f"Rank {structure.share_rank} is past the {least} that the smallest matrix can have.", f"Use at most {least}.")]
    return []


def _number_problems(field: str, word: str, gone: Mapping[int, list[int]], count: int, anatomy: Anatomy) -> Problems:
    for block, numbers in gone.items():
        if not 0 <= block < anatomy.blocks:
            return [(field, f"The model has no block {block}.", f"Blocks are 0 to {anatomy.blocks - 1}.")]
        if outside := [number for number in numbers if not 0 <= number < count]:
            return [(field, f"Block {block} has no {word} {outside[0]}.", f"Its {word}s are 0 to {count - 1}.")]
        if len(set(numbers)) == count:
            return [(field, f"Every {word} of block {block} would be removed.", f"Leave at least one, or drop the block: drop_blocks: [{block}].")]
    return []


def merge(first: Structure, second: Structure, anatomy: Anatomy, kept_of: Callable[[Structure, Anatomy, int], list[int]]) -> dict[int, list[int]]:
    """Numbers that go after two structures, the second one counting only what the first has left of its blocks."""
    survivors = [block for block in range(anatomy.blocks) if block not in set(first.dropped(anatomy.blocks))]
    everything = kept_of(Structure(), anatomy, 0)
    gone = {}
    for new, block in enumerate(survivors):
        left = kept_of(first, anatomy, block)
        later = set(second.remove_heads.get(new, ()) if kept_of is Structure.kept_heads else (second.remove_neurons or {}).get(new, ()))
        stay = {number for index, number in enumerate(left) if index not in later}
        if removed := [number for number in everything if number not in stay]:
            gone[block] = removed
    return gone


def then(first: Structure, second: Structure, anatomy: Anatomy) -> Structure:
    """The structure that is first `first` and then `second`, whose numbers are those of the model that `first` leaves."""
    dropped = set(first.dropped(anatomy.blocks))
    survivors = [block for block in range(anatomy.blocks) if block not in dropped]
    heads = merge(first, second, anatomy, Structure.kept_heads)
    neurons = merge(first, second, anatomy, Structure.kept_neurons)
    both = sorted(dropped | {survivors[block] for block in second.dropped(len(survivors))})
    biases = [name for name in first.added_biases or () if anatomy.by_name[name].block not in both] or None
    made = Structure(drop_blocks=both, remove_heads=heads, remove_neurons=neurons or None, added_biases=biases)
    return made.model_copy(update={"share_blocks": first.share_blocks, "share_rank": first.share_rank})


def ends_warning(gone: Iterable[int], blocks: int) -> str:
    """What to know where the first or the last block goes, and the remedy; empty where neither does."""
    ends = sorted({0, blocks - 1} & set(gone))
    words = " and ".join("the first block" if block == 0 else "the last block" for block in ends)
    out = " and ".join(map(str, ends))
    return f"{words.capitalize()} of the model goes. Models mostly fail without it: take {out} out of `structure.drop_blocks`." if ends else ""


def blocks_to_remove(blocks: int, share: float) -> int:
    """How many blocks a share is. Raises InputError when the first or the last would have to go, or none would."""
    count = round(share * blocks)
    if not 0 < count <= blocks - 2:
        why = f"The model has {blocks} blocks; the first and the last always stay, and {share:g} of them are {count}."
        raise InputError(f"A share of {share:g} of the blocks cannot be removed.", why, f"Remove at least 1 block and at most {max(0, blocks - 2)}.")
    return count


def chopped(blocks: int, count: int, place: Place) -> list[int]:
    """The numbers of `count` blocks that go, 0 < count <= blocks - 2."""
    if place == "max-gap":
        stay = blocks - count
        kept = {round(index * (blocks - 1) / (stay - 1)) for index in range(stay)}
        return [block for block in range(blocks) if block not in kept]
    if place == "both":
        front = (count + 1) // 2
        return [*range(1, 1 + front), *range(blocks - 1 - (count - front), blocks - 1)]
    start = {"input": 1, "output": blocks - 1 - count, "middle": 1 + (blocks - 2 - count) // 2}[place]
    return list(range(start, start + count))
