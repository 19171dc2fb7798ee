"""LayerChop: half the blocks go at once, by their place alone (METHODS 3). The first and the last block always stay."""

from typing import ClassVar

from pydantic import Field

from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import MethodOptions, ShapeMethod
from bitpress.engine.scene import Scene
from bitpress.engine.structure import Place, blocks_to_remove, chopped


class DepthOptions(MethodOptions):
    """How many blocks go."""

    remove: float = Field(
        default=0.5, gt=0.0, lt=1.0, title="Blocks removed", description="Share of the blocks to remove. The first and the last are never among them."
    )


class LayerChopOptions(DepthOptions):
    """Where the blocks that go are."""

    choice: Place = Field(
        default="max-gap",
        title="Which blocks",
        description="max-gap leaves evenly spaced ones; input, output and middle remove a run there; both removes one run at each end.",
    )


class LayerChop(ShapeMethod):
    """Chooses by place; meant to be followed by further training."""

    name = "layerchop"
    title = "LayerChop"
    family = "prune"
    summary = "Removes a share of the blocks at once, by their place alone. Looks at no text and takes no time; the authors train the rest further."
    citation = "Jha et al. 2023, Just CHOP: embarrassingly simple LLM compression, arXiv 2305.14864."
    cost = "No time and no text."
    use_when = "When speed matters most and the model can be trained further."
    ability: ClassVar[Ability] = Ability(part="structure", units=("blocks",))
    needs: ClassVar[frozenset[str]] = frozenset()
    Options = LayerChopOptions

    def shape(self, scene: Scene, options: LayerChopOptions) -> None:
        """Drop the blocks of the chosen place."""
        blocks = scene.anatomy.blocks
        scene.cut(drop_blocks=chopped(blocks, blocks_to_remove(blocks, options.remove), options.choice))
