"""MoPE: a module is worth what the model loses without it, tried one by one (METHODS 10.1, on the loss of a language model).

The paper scores vision-language models by retrieval recall; here the performance is the negative log-likelihood on text. Blocks below the module at
hand are not run again. Two parts that can stand in for each other are both missed little while either is there: so after every share of the weights
that has gone, what is left is tried anew.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from bitpress.engine.measure.logits import answers_once, scorer_of
from bitpress.engine.measure.perplexity import nll_of
from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.prune.greedy_depth import loss_without
from bitpress.engine.methods.prune.shortgpt import inner_blocks
from bitpress.engine.methods.structured import Kept, Scores, StructuredMethod, StructuredOptions, Units, budget_of, per_cost
from bitpress.engine.scene import Scene
from bitpress.engine.structure import blocks_to_remove
from bitpress.engine.sublayers import Key, Stream, last_matrix, masking, sizes_in_stream, skipping


class MopeOptions(StructuredOptions):
    """What is tried as one module, and whether blocks go too."""

    neuron_groups: int = Field(default=8, ge=1, le=512, title="Neuron groups", description="Neurons are tried together, in this many groups a block.")
    grouping: Literal["size", "place"] = Field(
        default="size", title="Neurons grouped by", description="What they add to the hidden states, so that a group's worth is that of each, or their place."
    )
    rescore: float = Field(
        default=0.1, gt=0.0, le=1.0, title="Tried anew after", description="Share of the block linears' weights that goes between two trials of what is left."
    )
    sequences: int = Field(default=4, ge=1, le=256, title="Sequences", description="Sequences of the calibration text that every module is tried on.")
    drop: float = Field(default=0.0, ge=0.0, lt=1.0, title="Blocks dropped", description="Share of the blocks to drop as well; the ends always stay.")
    order: Literal["width first", "depth first"] = Field(
        default="width first", title="Order", description="Heads and neurons first and then blocks, as the authors found better, or the other way round."
    )


class Mope(StructuredMethod):
    """Module-wise pruning error Z[f] - Z[f without the module]."""

    name = "mope"
    title = "MoPE module-wise error"
    summary = "Tries the model without each head, each group of neurons and each block, and removes what is missed least. Needs a pass over some text for each."
    citation = "Lin et al. 2024, MoPE-CLIP: structured pruning with module-wise pruning error, arXiv 2403.07839."
    cost = "A pass over a little text for every head and every group of neurons, again for every tenth of the weights that goes."
    use_when = "To see what each part is worth, and to prune width and depth by it."
    ability = Ability(part="structure", units=("blocks", "heads", "neurons"))
    Options = MopeOptions

    def shape(self, scene: Scene, options: Any) -> None:
        """Width by module-wise error, and depth before or after it."""
        if options.order == "depth first":
            _drop(scene, options)
        super().shape(scene, options)
        if options.order == "width first":
            _drop(scene, options)

    def decide(self, scene: Scene, units: Units, options: MopeOptions) -> Kept:
        """Try every module that is left, let a part of the budget go, and begin again."""
        rounds = [options.remove]
        if units.shares is None:
            budget_of(units, options.remove)  # what cannot be met is told before anything is tried
            rounds = rounds_of(options.remove, options.rescore)
        kept, sizes = everything(units), sizes_by(scene, units, options)
        for number, remove in enumerate(rounds):
            scores = self._errors(scene, units, options, kept, sizes, (number, len(rounds)))
            chosen = self.choose(units, scores, options.model_copy(update={"remove": remove}))
            kept = {key: [unit for unit in chosen[key] if unit in set(stay)] for key, stay in kept.items()}
        return kept

    def score(self, scene: Scene, units: Units, options: MopeOptions) -> Scores:
        """The loss without a module minus the loss with all, over what the module costs; neurons of a group share theirs."""
        return self._errors(scene, units, options, everything(units), sizes_by(scene, units, options), (0, 1))

    def _errors(self, scene: Scene, units: Units, options: MopeOptions, kept: Kept, sizes: dict[Key, Tensor] | None, turn: tuple[int, int]) -> Scores:
        """Errors over costs with only these units there; the others are worth nothing at all."""
        trial, errors = Trial(scene, scene.ids_SL[: options.sequences], masks_of(units, kept)), Scores()
        for done, (key, stay) in enumerate(kept.items(), start=1):
            trial.stand_at(key.block)
            errors[key] = torch.full((units.count(key),), float("-inf"), dtype=torch.float64)
            for module in modules_of(key, stay, sizes, options.neuron_groups):
                errors[key][module] = trial.error_without(key, units.features(key, module)) / len(module)
            scene.tell(turn[0] * len(kept) + done, turn[1] * len(kept))
        return per_cost(units, errors)


def everything(units: Units) -> Kept:
    """All units."""
    return {key: list(range(units.count(key))) for key in units.keys}


def sizes_by(scene: Scene, units: Units, options: MopeOptions) -> dict[Key, Tensor] | None:
    """What neurons are grouped by; None for their place."""
    return sizes_in_stream(scene, units.keys) if options.grouping == "size" else None


def rounds_of(remove: float, step: float) -> list[float]:
    """The shares removed after each round."""
    whole = math.ceil(round(remove / step, 9))
    return [*(step * number for number in range(1, whole)), remove]


def modules_of(key: Key, stay: list[int], sizes: dict[Key, Tensor] | None, groups: int) -> list[list[int]]:
    """Every head, or the neurons of a sublayer in so many groups: neighbours by size, or by place where there are none."""
    if key.kind == "heads":
        return [[unit] for unit in stay]
    ordered = sorted(stay, key=sizes[key].tolist().__getitem__) if sizes else stay
    return [part.tolist() for part in torch.tensor(ordered).tensor_split(groups) if len(part)]


def masks_of(units: Units, kept: Kept) -> dict[Key, Tensor]:
    """1 for each feature of these units and 0 for the others, [F], where there are others."""
    masks = {}
    for key, stay in kept.items():
        if len(stay) < units.count(key):
            masks[key] = torch.zeros(last_matrix(units.anatomy, key).in_features)
            masks[key][units.features(key, stay)] = 1
    return masks


class Trial:
    """The loss on a few sequences with some features at zero, run from the block at hand. masks: of what has gone before, and stays gone."""

    @torch.no_grad()
    def __init__(self, scene: Scene, ids_SL: Tensor, masks: Mapping[Key, Tensor] | None = None) -> None:
        self.scene, self.scorer, self.ids_SL, self.block, self.masks = scene, scorer_of(scene.model), ids_SL, 0, dict(masks or {})
        self.stream = Stream(scene.model, scene, ids_SL)
        self.answers: list[Tensor] = []  # a classifier's own to each batch, which it is held to
        if answers_once(scene.model):
            self.answers = [self.scorer.hidden(ids_BL).argmax(1) for ids_BL in ids_SL.split(self.stream.batch)]
        self.whole = self._loss(self.masks, 0)

    def stand_at(self, block: int) -> None:
        """Run the text up to a block."""
        while self.block < block:
            with masking(self.scene.model, self.scene.anatomy, self.masks):
                self.stream.move(self.stream.through(self.block))
            self.block += 1

    def error_without(self, key: Key, features: Tensor) -> float:
        """What the loss rises by when these features are zero."""
        self.scene.check()
        mask_F = self.masks[key].clone() if key in self.masks else torch.ones(last_matrix(self.scene.anatomy, key).in_features)
        mask_F[features] = 0
        return self._loss({**self.masks, key: mask_F}, self.block) - self.whole

    def _losses(self, number: int, ids_BL: Tensor) -> Tensor:
        if self.answers:
            return torch.nn.functional.cross_entropy(self.scorer.hidden(ids_BL).float(), self.answers[number], reduction="none")
        return nll_of(self.scorer, ids_BL)

    @torch.no_grad()
    def _loss(self, masks: dict[Key, Tensor], block: int) -> float:
        losses = []
        for number, (ids_BL, x_BLd) in enumerate(zip(self.ids_SL.split(self.stream.batch), self.stream.hidden, strict=True)):
            with masking(self.scene.model, self.scene.anatomy, masks), skipping(self.scene.model, self.scene.anatomy, block, x_BLd):
                losses.append(self._losses(number, ids_BL).double().flatten())
        return float(torch.cat(losses).mean())


def _drop(scene: Scene, options: MopeOptions) -> None:
    if options.drop:
        count = blocks_to_remove(scene.anatomy.blocks, options.drop)
        errors = {block: loss_without(scene, block, options.sequences) for block in inner_blocks(scene, count)}
        scene.cut(drop_blocks=sorted(sorted(errors, key=errors.__getitem__)[:count]))
