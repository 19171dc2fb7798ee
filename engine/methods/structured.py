"""Structured pruning in steps that methods share: score of every unit, selection within a budget, removal. Knows scenes; no single criterion.

Units are key-value groups (key and value head with their query heads) or single query heads, and MLP neurons. The budget is a share of the
block linears' multiply-adds, that is of their weights. Every block keeps a head and some neurons; to lose a whole block, drop it.
Every repair is offered with every score; repairs run from the bottom up and see what the repaired blocks below put out.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from bitpress.engine.errors import InputError
from bitpress.engine.measure.logits import answers_once
from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import Family, MethodOptions, ShapeMethod
from bitpress.engine.methods.repair import FITS, Repairing, as_normed, judging, repaired, sums_of
from bitpress.engine.model.anatomy import Part
from bitpress.engine.model.slicing import key_head_of
from bitpress.engine.model.surgery import get, linear_weight, twin
from bitpress.engine.scene import BATCH, Scene
from bitpress.engine.structure import count_kept, neurons_kept
from bitpress.engine.sublayers import KINDS, Caught, Key, Kind, Stream, last_matrix
from bitpress.engine.token_weights import token_weights

Scores = dict[Key, Tensor]  # per sublayer one number a unit, higher is more important, comparable over all sublayers
Kept = dict[Key, list[int]]  # per sublayer the units that stay


class StructuredOptions(MethodOptions):
    """How much goes, in which units, and what is done for the rest."""

    remove: float = Field(
        default=0.2, gt=0.0, lt=1.0, title="Removed", description="Share of the block linears' multiply-adds to remove. Shares in `structure` take its place."
    )
    unit: Literal["group", "head"] = Field(
        default="group", title="Heads go as", description="Whole key-value groups, which also shrinks the KV cache, or single query heads."
    )
    allocation: Literal["global", "uniform"] = Field(
        default="global", title="Compare within", description="Compare units over the whole model, or take the same share from every block."
    )
    repair: Repairing = Field(
        default="none",
        title="Repair",
        description="What the last matrix of each sublayer does for what went: nothing, a bias, a scale for each unit, "
        "a least-squares fit to what the sublayer did before, or one that also tries to catch up with what was lost below.",
    )
    multiple: int = Field(default=8, ge=1, le=256, title="Neurons in multiples of", description="Kernels run faster on widths that this divides.")


class EvenOptions(StructuredOptions):
    """For scores that say nothing across blocks."""

    allocation: Literal["global", "uniform"] = Field(
        default="uniform", title="Compare within", description="Take the same share from every block, or compare units over the whole model."
    )


class Units:
    """The units of a scene's model as they are now: what each costs, and which features are its own."""

    def __init__(self, scene: Scene, options: StructuredOptions) -> None:
        self.scene, self.anatomy = scene, scene.anatomy
        by_share = {kind: scene.shares(kind) for kind in KINDS}
        self.shares = by_share if any(by_share.values()) else None
        self.unit = "group" if self.shares else options.unit
        self.multiple = 1 if self.shares else options.multiple
        kinds = [kind for kind in KINDS if self.shares is None or self.shares[kind]]
        self._check(kinds)
        self.keys = [Key(block, kind) for block in scene.blocks for kind in kinds]
        self.gradients: dict[Key, Tensor] = {}  # of every unit's mask, by batch, where a method has kept them
        self.heads = {key: self._heads(key.block) for key in self.keys if key.kind == "heads"}

    def _check(self, kinds: list[Kind]) -> None:
        if "heads" in kinds and not {"q", "k", "v", "o"} <= set(self.anatomy.roles):
            remedy = "Set `neurons` under `structure`: then only neurons go."
            raise InputError("The heads of this model cannot be removed.", "Its attention matrices are fused.", remedy)

    def _heads(self, block: int) -> list[list[int]]:
        """The query heads of every head unit of a block."""
        reads = key_head_of(self.anatomy, block, self.scene.model)
        if self.unit == "head":
            return [[head] for head in range(len(reads))]
        return [[head for head, group in enumerate(reads) if group == wanted] for wanted in sorted(set(reads))]

    def count(self, key: Key) -> int:
        """Units of a sublayer."""
        return len(self.heads[key]) if key.kind == "heads" else self.anatomy.units_of(key.block).neurons

    def cost(self, key: Key) -> float:
        """Multiply-adds a token of one unit of a sublayer; single heads carry their part of the keys and values."""
        parts = [part for part in self.anatomy.of_block(key.block) if (part.role in ("q", "k", "v", "o")) == (key.kind == "heads")]
        return sum(part.numel for part in parts) / self.count(key)

    def total(self) -> int:
        """Multiply-adds a token of all block linears."""
        return self.anatomy.linear_params

    def per_unit(self, key: Key, value_F: Tensor, how: Callable[..., Tensor] = torch.sum) -> Tensor:
        """One number a unit from one a feature."""
        if key.kind == "neurons":
            return value_F
        return torch.stack([how(value_F[self.features(key, [unit])]) for unit in range(self.count(key))])

    def features(self, key: Key, units: list[int]) -> Tensor:
        """The features of these units, in order."""
        if key.kind == "neurons":
            return torch.tensor(units, dtype=torch.long)
        size = self.anatomy.head_dim
        heads = sorted(head for unit in units for head in self.heads[key][unit])
        return (torch.tensor(heads)[:, None] * size + torch.arange(size)).flatten()

    def floor(self, key: Key) -> int:
        """Units of a sublayer that always stay."""
        return 1 if key.kind == "heads" else min(self.multiple, self.count(key))

    def cut(self, kept: Kept) -> None:
        """Take all but these units out of the scene's model."""
        heads, neurons = {}, {}
        for key, stay in kept.items():
            if len(stay) == self.count(key):
                continue
            if key.kind == "heads":
                held = {head for unit in stay for head in self.heads[key][unit]}
                heads[key.block] = [head for unit in self.heads[key] for head in unit if head not in held]
            else:
                held = set(stay)
                neurons[key.block] = [neuron for neuron in range(self.count(key)) if neuron not in held]
        if heads or neurons:
            self.scene.cut(heads=heads, neurons=neurons)


# Selection -------------------------------------------------------------------------------------------------------


def budget_of(units: Units, remove: float) -> float:
    """Multiply-adds a token that the chosen sublayers may keep. Raises InputError when what always stays already takes more."""
    everything = sum(units.cost(key) * units.count(key) for key in units.keys)
    budget = everything - remove * units.total()
    least = sum(units.cost(key) * units.floor(key) for key in units.keys)
    if budget < least:
        why = f"At most {(everything - least) / units.total():.0%} can go from the blocks that the stage is pointed at: each keeps a head and some neurons."
        raise InputError(f"{remove:.0%} of the block linears cannot be removed.", why, "Remove less, widen the targets, or drop whole blocks.")
    return budget


def select(units: Units, scores: Scores, budget: float) -> Kept:
    """The units of highest score whose cost fits into the budget, the best of every sublayer first; what no longer fits is passed over."""
    kept: Kept = {key: score.topk(units.floor(key)).indices.tolist() for key, score in scores.items()}
    left = budget - sum(units.cost(key) * len(stay) for key, stay in kept.items())
    costs = {key: units.cost(key) for key in scores}
    held = {key: set(stay) for key, stay in kept.items()}
    ranked = sorted(((value, -number, unit) for number, key in enumerate(scores) for unit, value in enumerate(scores[key].tolist())), reverse=True)
    keys = list(scores)
    for _, number, unit in ranked:
        key = keys[-number]
        if unit not in held[key] and costs[key] <= left:
            held[key].add(unit)
            left -= costs[key]
    return {key: _whole_multiples(units, key, scores[key], stay) for key, stay in held.items()}


def select_evenly(units: Units, scores: Scores, budget: float) -> Kept:
    """The same share of every sublayer's heads, rounded to whole ones, and of its neurons, whose share makes up for the rounding."""
    heads = [key for key in units.keys if key.kind == "heads"]
    share = budget / sum(units.cost(key) * units.count(key) for key in units.keys)
    counts = {key: count_kept(units.count(key), share) for key in heads}
    counts |= _neurons_for(units, budget - sum(units.cost(key) * counts[key] for key in heads))
    if sum(units.cost(key) * count for key, count in counts.items()) > budget + 0.5:  # whole heads left too little for the floors of neurons
        counts = {key: max(1, int(share * units.count(key))) for key in heads}
        counts |= _neurons_for(units, budget - sum(units.cost(key) * counts[key] for key in heads))
    return select_counts(units, scores, counts)


def _neurons_for(units: Units, budget: float) -> dict[Key, int]:
    """The same share of every block's neurons, within a budget where the floors allow it."""
    keys = [key for key in units.keys if key.kind == "neurons"]
    share = min(1.0, max(0.0, budget / max(1.0, sum(units.cost(key) * units.count(key) for key in keys))))
    return {key: max(units.floor(key), int(share * units.count(key))) for key in keys}


def select_counts(units: Units, scores: Scores, counts: Mapping[Key, int]) -> Kept:
    """The best so many units of every sublayer."""
    best = {key: set(score.topk(counts[key]).indices.tolist()) for key, score in scores.items()}
    return {key: _whole_multiples(units, key, scores[key], stay) for key, stay in best.items()}


def _whole_multiples(units: Units, key: Key, score_U: Tensor, stay: set[int]) -> list[int]:
    """Neurons rounded down to a multiple, the least important ones going; in order."""
    surplus = len(stay) % units.multiple if key.kind == "neurons" and len(stay) < units.count(key) else 0
    ranked = sorted(stay, key=lambda unit: float(score_U[unit]))
    return sorted(ranked[surplus:] if len(stay) > surplus else ranked)


# Removal ---------------------------------------------------------------------------------------------------------


Decide = Callable[[Key, Stream, Caught], list[int]]  # the units of a sublayer that stay, when the walk reaches it


class Aim(NamedTuple):
    """What a repair of a sublayer is held to: the stream that came out, [B, L, d] a batch, and how much each token counts, [B, L] a batch."""

    goal: list[Tensor]
    weights: list[Tensor]


def remove_bottom_up(scene: Scene, units: Units, decide: Decide, how: Repairing) -> None:
    """Sublayer by sublayer: decide what stays, repair the last matrix, cut, and go on with that.

    A `least_squares` fit aims at what the sublayer, on the stream as it now comes, did with all its units, at the tokens where that matters to the
    predictions. Every other repair aims at the stream of the model as it was, which has the sublayer make up for all that was lost below it.
    """
    teacher, student = Stream(twin(scene.model), scene), Stream(scene.model, scene)
    counts = counting(scene, units) if how == "least_squares" else {}
    for block in range(scene.anatomy.blocks):
        caught = teacher.catch(block)
        for kind in KINDS:
            key, goal = Key(block, kind), [x + y for x, y in zip(caught.base[kind], caught.added[kind], strict=True)]
            if key in units.keys:
                _remove_one(scene, units, student, key, Aim(goal, counts.get(key) or as_normed(goal)), decide, how)
        teacher.move(caught.output)
        student.move(student.through(block))
        scene.tell(block + 1, scene.anatomy.blocks)


def counting(scene: Scene, units: Units) -> dict[Key, list[Tensor]]:
    """How much each token counts for each sublayer, [B, L] a batch; nothing for models that answer a text once."""
    if answers_once(scene.model):
        return {}
    names = {last_matrix(scene.anatomy, key).name: key for key in units.keys}
    found = token_weights(scene.model, scene.anatomy, scene.ids_SL, names, scene.recipe.seed, scene.should_stop)
    return {names[name]: list(weight_SL.split(BATCH)) for name, weight_SL in found.items()}


def _remove_one(scene: Scene, units: Units, student: Stream, key: Key, aim: Aim, decide: Decide, how: Repairing) -> None:
    caught = student.catch(key.block)
    stay = decide(key, student, caught)
    if how == "none" or (how == "least_squares" and len(stay) == units.count(key)):
        units.cut({key: stay})
        return
    part = last_matrix(scene.anatomy, key)
    module: Any = get(scene.model, part.name)
    bias_d = module.bias
    lost = caught.added[key.kind] if how == "least_squares" else [g - b for g, b in zip(aim.goal, caught.base[key.kind], strict=True)]
    wanted = [y if bias_d is None else y - bias_d for y in lost]
    kept_F = units.features(key, stay)
    sizes = [len(units.features(key, [unit])) for unit in stay]
    groups_F = torch.repeat_interleave(torch.arange(len(stay)), torch.tensor(sizes))
    seen = caught.features[key.kind], wanted, aim.weights
    held = judging(*seen) if how in FITS else None
    made_dK, extra_d = repaired(how, linear_weight(module).float(), kept_F, groups_F, sums_of(*seen), held)
    units.cut({key: stay})
    if how != "bias":
        scene.set_weight(part.name, made_dK)
    if extra_d is not None:
        scene.set_bias(part.name, extra_d if bias_d is None else bias_d.float() + extra_d)


# Scores ----------------------------------------------------------------------------------------------------------


def per_cost(units: Units, scores: Mapping[Key, Tensor]) -> Scores:
    """Scores over what a unit costs."""
    return {key: score / units.cost(key) for key, score in scores.items()}


def sum_over_units(units: Units, value_of: Callable[[Part], Tensor]) -> Scores:
    """For every unit the sum of a value [N, K] over its weights: its rows of q, gate, up, its columns of o, down, its part of k and v."""
    return {key: (_head_sums if key.kind == "heads" else _neuron_sums)(units, key, value_of) for key in units.keys}


def _neuron_sums(units: Units, key: Key, value_of: Callable[[Part], Tensor]) -> Tensor:
    total, count = torch.zeros(units.count(key)), units.count(key)
    for part in units.anatomy.of_block(key.block):
        if part.role in ("gate", "up", "fc1"):
            total += value_of(part).float().sum(1)
        elif part.role == "gate_up":
            total += value_of(part).float().sum(1).view(2, count).sum(0)
        elif part.role in ("down", "fc2"):
            total += value_of(part).float().sum(0)
    return total


def _head_sums(units: Units, key: Key, value_of: Callable[[Part], Tensor]) -> Tensor:
    parts = {part.role: part for part in units.anatomy.of_block(key.block)}
    size, reads = units.anatomy.head_dim, key_head_of(units.anatomy, key.block, units.scene.model)
    own = value_of(parts["q"]).float().sum(1) + value_of(parts["o"]).float().sum(0)
    shared_G = sum(value_of(parts[role]).float().sum(1).view(-1, size).sum(1) for role in ("k", "v"))
    per_head = own.view(-1, size).sum(1) + torch.stack([shared_G[group] / reads.count(group) for group in reads])  # type: ignore[index]
    return torch.stack([per_head[heads].sum() for heads in units.heads[key]])


# Methods ---------------------------------------------------------------------------------------------------------


class StructuredMethod(ShapeMethod):
    """A method that differs from others in how it scores units, and at most in how it selects."""

    family: ClassVar[Family] = "prune"
    ability: ClassVar[Ability] = Ability(part="structure", units=("heads", "neurons"))
    Options = StructuredOptions

    @abstractmethod
    def score(self, scene: Scene, units: Units, options: Any) -> Scores:
        """How important every unit is; comparable over all sublayers, so mostly per multiply-add."""

    def choose(self, units: Units, scores: Scores, options: Any) -> Kept:
        """The units that stay."""
        if units.shares is not None:
            kept_of = {"heads": count_kept, "neurons": neurons_kept}
            counts = {key: kept_of[key.kind](units.count(key), (units.shares[key.kind] or {}).get(key.block, 1.0)) for key in units.keys}
            return select_counts(units, scores, counts)
        if options.allocation == "uniform":
            return select_evenly(units, scores, budget_of(units, options.remove))
        return select(units, scores, budget_of(units, options.remove))

    def decide(self, scene: Scene, units: Units, options: Any) -> Kept:
        """Score and select."""
        return self.choose(units, self.score(scene, units, options), options)

    def shape(self, scene: Scene, options: Any) -> None:
        """Decide, and remove with the repair that was asked for."""
        units = Units(scene, options)
        kept = self.decide(scene, units, options)
        if options.repair == "none":
            units.cut(kept)
        else:
            remove_bottom_up(scene, units, lambda key, *_: kept[key], options.repair)
