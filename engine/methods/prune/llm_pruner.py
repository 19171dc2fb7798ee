"""LLM-Pruner: first-order Taylor importance of coupled groups (METHODS 16.4), without the fine-tuning that follows it in the paper."""

from typing import Any

from pydantic import Field
from torch import Tensor

from bitpress.engine.measure.logits import scorer_of
from bitpress.engine.methods.structured import EvenOptions, Scores, StructuredMethod, Units, per_cost, sum_over_units
from bitpress.engine.model.anatomy import Part
from bitpress.engine.model.surgery import get, linear_weight
from bitpress.engine.scene import Scene
from bitpress.engine.sublayers import backward, task_loss


class LlmPrunerOptions(EvenOptions):
    """How importance is compared."""

    per_weight: bool = Field(default=True, title="Per weight", description="Compare sums over what a unit costs. Off: compare the sums, as the authors do.")


class LlmPruner(StructuredMethod):
    """Sum over a unit's weights of |w * dL/dw|."""

    name = "llm-pruner"
    title = "LLM-Pruner Taylor"
    summary = "Removes the heads and neurons whose weights times the gradient of the loss are smallest. Needs a forward and a backward pass over some text."
    citation = "Ma et al. 2023, LLM-Pruner: on the structural pruning of large language models, arXiv 2305.11627."
    cost = "A forward and a backward pass over the text."
    use_when = "For narrower blocks that are trained further."
    Options = LlmPrunerOptions

    def score(self, scene: Scene, units: Units, options: LlmPrunerOptions) -> Scores:
        """Gradients are gathered over all batches first, then multiplied."""
        gather_gradients(scene)

        def value(part: Part) -> Tensor:
            module: Any = get(scene.model, part.name)
            gradient = module.weight.grad if module.weight.shape == (part.out_features, part.in_features) else module.weight.grad.t()
            return (linear_weight(module).detach().float() * gradient.float()).abs()

        scores = sum_over_units(units, value)
        for module in _linears(scene):
            module.weight.grad = None
            module.weight.requires_grad_(False)
        return per_cost(units, scores) if options.per_weight else scores


def gather_gradients(scene: Scene) -> None:
    """Leave in every block linear the gradient of the mean loss, summed over batches."""
    scorer = scorer_of(scene.model)
    for module in _linears(scene):
        module.weight.requires_grad_(True)
    for done, ids_BL in enumerate(scene.batches(), start=1):
        backward(scorer, ids_BL, task_loss(scene.model, ids_BL))
        scene.tell(min(len(scene.ids_SL), done * len(ids_BL)), len(scene.ids_SL))


def _linears(scene: Scene) -> list[Any]:
    return [get(scene.model, part.name) for part in scene.anatomy.linears]
