"""ShortGPT: the blocks that turn their input the least go (METHODS 16.5). The first and the last block always stay."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bitpress.engine.errors import InputError
from bitpress.engine.measure.logits import scorer_of
from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import ShapeMethod
from bitpress.engine.methods.prune.layerchop import DepthOptions
from bitpress.engine.model.surgery import get
from bitpress.engine.scene import Scene
from bitpress.engine.structure import blocks_to_remove


class ShortGPT(ShapeMethod):
    """One pass: block influence 1 - mean over tokens of cos(input, output)."""

    name = "shortgpt"
    title = "ShortGPT block influence"
    family = "prune"
    summary = "Removes the blocks whose outputs point most nearly the way of their inputs. Needs one pass over some text."
    citation = "Men et al. 2024, ShortGPT: layers in large language models are more redundant than you expect, arXiv 2403.03853."
    cost = "One pass over the text."
    use_when = "To drop a few blocks without training."
    ability: ClassVar[Ability] = Ability(part="structure", units=("blocks",))
    Options = DepthOptions

    def shape(self, scene: Scene, options: DepthOptions) -> None:
        """Drop the blocks of least influence among those the stage is pointed at."""
        count = blocks_to_remove(scene.anatomy.blocks, options.remove)
        influence = block_influence(scene)
        candidates = inner_blocks(scene, count)
        scene.cut(drop_blocks=sorted(sorted(candidates, key=lambda block: influence[block])[:count]))


def inner_blocks(scene: Scene, count: int) -> list[int]:
    """The blocks that may go: those the stage is pointed at but the first and the last. Raises InputError when they are fewer than `count`."""
    found = [block for block in scene.blocks if 0 < block < scene.anatomy.blocks - 1]
    if len(found) < count:
        why = f"The stage is pointed at {len(found)} blocks between the first and the last."
        raise InputError(f"{count} blocks cannot be removed.", why, "Remove fewer, or widen the stage's targets.")
    return found


@torch.inference_mode()
def block_influence(scene: Scene) -> list[float]:
    """1 - E cos(x, block(x)) of every block of the scene's model, over all tokens."""
    blocks = list(get(scene.model, scene.anatomy.block_prefix).children())
    total, tokens = [0.0] * len(blocks), 0
    handles = [block.register_forward_hook(_adder(total, index), with_kwargs=True) for index, block in enumerate(blocks)]
    try:
        scorer = scorer_of(scene.model)
        total[:] = [0.0] * len(blocks)  # the scorer tries itself on a few tokens of its own
        for ids_BL in scene.batches():
            scorer.hidden(ids_BL)
            tokens += ids_BL.numel()
            scene.tell(tokens // ids_BL.shape[1], len(scene.ids_SL))
    finally:
        for handle in handles:
            handle.remove()
    return [1 - cosine / tokens for cosine in total]


def _adder(total: list[float], index: int) -> Any:
    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        y: Tensor = output if isinstance(output, Tensor) else output[0]
        total[index] += float(torch.cosine_similarity(x.float(), y.float(), dim=-1).sum(dtype=torch.float64))

    return add
