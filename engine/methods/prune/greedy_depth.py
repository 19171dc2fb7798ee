"""Greedy depth: again and again the block goes without which the text is least surprising (METHODS 16.5). The first and the last always stay."""

from typing import ClassVar

import torch
from pydantic import Field

from bitpress.engine.measure.logits import scorer_of
from bitpress.engine.measure.perplexity import nll_of
from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import ShapeMethod
from bitpress.engine.methods.prune.layerchop import DepthOptions
from bitpress.engine.methods.prune.shortgpt import inner_blocks
from bitpress.engine.model.surgery import drop_blocks, twin
from bitpress.engine.scene import Scene
from bitpress.engine.structure import blocks_to_remove


class GreedyDepthOptions(DepthOptions):
    """How much text every candidate is tried on."""

    sequences: int = Field(default=4, ge=1, le=256, title="Sequences", description="Sequences of the calibration text that each candidate is tried on.")


class GreedyDepth(ShapeMethod):
    """Removes one block at a time, each time trying all that are left."""

    name = "greedy-depth"
    title = "Greedy depth by perplexity"
    family = "prune"
    summary = "Removes one block at a time, each time the one whose absence raises the perplexity least. Needs a pass over some text for every candidate."
    citation = "Baseline of Song et al. 2024, SLEB: streamlining LLMs through redundancy verification, arXiv 2402.09025."
    cost = "A pass over a little text for every block still there, again for every block removed."
    use_when = "To drop a few blocks at the least loss that one step at a time can find."
    ability: ClassVar[Ability] = Ability(part="structure", units=("blocks",))
    Options = GreedyDepthOptions

    def shape(self, scene: Scene, options: GreedyDepthOptions) -> None:
        """Drop blocks one by one."""
        count = blocks_to_remove(scene.anatomy.blocks, options.remove)
        inner_blocks(scene, count)
        rounds = [len(scene.blocks) - step for step in range(count)]
        done = 0
        for _ in range(count):
            losses = {}
            for block in inner_blocks(scene, 1):
                losses[block] = loss_without(scene, block, options.sequences)
                done += 1
                scene.tell(done, max(done, sum(rounds)))
            scene.cut(drop_blocks=[min(losses, key=losses.__getitem__)])


@torch.inference_mode()
def loss_without(scene: Scene, block: int, sequences: int) -> float:
    """Mean NLL of the first sequences without one block."""
    scene.check()
    model = twin(scene.model)
    drop_blocks(model, scene.anatomy, [block])
    scorer = scorer_of(model)
    return float(torch.cat([nll_of(scorer, ids_BL).flatten() for ids_BL in scene.ids_SL[:sequences].split(4)]).double().mean())
