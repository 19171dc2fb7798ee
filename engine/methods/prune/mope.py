"""MoPE: a module is worth what the model loses without it, tried one by one (METHODS 10.1, on the loss of a language model).

The paper scores vision-language models by retrieval recall; here the performance is the negative log-likelihood on text. Blocks below the module at
hand are not run again.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from bitpress.engine.measure.logits import answers_once, scorer_of
from bitpress.engine.measure.perplexity import nll_of
from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.prune.greedy_depth import loss_without
from bitpress.engine.methods.prune.shortgpt import inner_blocks
from bitpress.engine.methods.structured import Scores, StructuredMethod, StructuredOptions, Units, per_cost
from bitpress.engine.scene import Scene
from bitpress.engine.structure import blocks_to_remove
from bitpress.engine.sublayers import Key, Stream, last_matrix, masking, skipping


class MopeOptions(StructuredOptions):
    """What is tried as one module, and whether blocks go too."""

    neuron_groups: int = Field(default=8, ge=1, le=512, title="Neuron groups", description="Neighbouring neurons are tried together, this many groups a block.")
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
    cost = "A pass over a little text for every head and every group of neurons."
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

    def score(self, scene: Scene, units: Units, options: MopeOptions) -> Scores:
        """The loss without a module minus the loss with all, over what the module costs; neurons of a group share theirs."""
        ids_SL = scene.ids_SL[: options.sequences]
        errors: Scores = {}
        trial = Trial(scene, ids_SL)
        for done, key in enumerate(units.keys, start=1):
            trial.stand_at(key.block)
            errors[key] = self._errors(trial, units, key, options.neuron_groups)
            scene.tell(done, len(units.keys))
        return per_cost(units, errors)

    def _errors(self, trial: "Trial", units: Units, key: Key, groups: int) -> Tensor:
        count = units.count(key)
        modules = [[unit] for unit in range(count)] if key.kind == "heads" else [part.tolist() for part in torch.arange(count).tensor_split(groups)]
        error_U = torch.zeros(count, dtype=torch.float64)
        for module in modules:
            if module:
                error_U[module] = trial.error_without(key, units.features(key, module)) / len(module)
        return error_U


class Trial:
    """The loss on a few sequences with some features at zero, run from the block at hand."""

    @torch.no_grad()
    def __init__(self, scene: Scene, ids_SL: Tensor) -> None:
        self.scene, self.scorer, self.ids_SL, self.block = scene, scorer_of(scene.model), ids_SL, 0
        self.stream = Stream(scene.model, scene, ids_SL)
        self.answers: list[Tensor] = []  # a classifier's own to each batch, which it is held to
        if answers_once(scene.model):
            self.answers = [self.scorer.hidden(ids_BL).argmax(1) for ids_BL in ids_SL.split(self.stream.batch)]
        self.whole = self._loss({}, 0)

    def stand_at(self, block: int) -> None:
        """Run the text up to a block."""
        while self.block < block:
            self.stream.move(self.stream.through(self.block))
            self.block += 1

    def error_without(self, key: Key, features: Tensor) -> float:
        """What the loss rises by when these features are zero."""
        self.scene.check()
        mask_F = torch.ones(last_matrix(self.scene.anatomy, key).in_features)
        mask_F[features] = 0
        return self._loss({key: mask_F}, self.block) - self.whole

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
