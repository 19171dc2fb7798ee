"""OWL: blocks with more outliers keep more weights (METHODS 16.7). Sets ratios only; a pruning stage after it takes the weights out."""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bitpress.engine.calibrate import BlockStats, walk
from bitpress.engine.errors import InputError
from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import MethodOptions, ShapeMethod
from bitpress.engine.model.surgery import get, linear_weight
from bitpress.engine.scene import Scene

MOST = 0.99


class OwlOptions(MethodOptions):
    """What counts as an outlier, and how far ratios may spread."""

    threshold: float = Field(default=5.0, gt=1.0, le=100.0, title="Outlier threshold", description="A weight counts whose score is this many times the mean.")
    spread: float = Field(default=0.08, gt=0.0, le=0.4, title="Spread", description="Ratios differ from their mean by at most twice this.")


class Owl(ShapeMethod):
    """Outlier ratio of |w| * ||x|| per block."""

    name = "owl"
    title = "OWL ratios"
    family = "prune"
    summary = "Gives blocks with many outlying weights a lower share of zeros and others a higher one. Needs a pass over text and a pruning stage after it."
    citation = "Yin et al. 2024, Outlier weighed layerwise sparsity (OWL), arXiv 2310.05175."
    cost = "One pass over the text, before the pruning stage's own."
    use_when = "At 60% zeros and beyond, before Wanda or SparseGPT."
    ability: ClassVar[Ability] = Ability(part="ratios")
    Options = OwlOptions

    def shape(self, scene: Scene, options: OwlOptions) -> None:
        """Set the ratio of every layer whose zeros may be anywhere."""
        chosen = set(scene.blocks)
        schemes = {name: scheme.sparsity for name, scheme in scene.schemes().items()}
        free = {name: sparsity.ratio for name, sparsity in schemes.items() if sparsity and sparsity.ratio and sparsity.pattern == "unstructured"}
        parts = [part for part in scene.anatomy.linears if part.name in free and part.block in chosen]
        if not parts:
            raise InputError("OWL has nothing to do.", "No layer it is pointed at asks for zeros anywhere.", "Set sparsity: {ratio: …} in a scheme.")
        outliers = outlier_shares(scene, [part.name for part in parts], options.threshold)
        shift = ratio_shifts(outliers, options.spread)
        for part in parts:
            scene.ratios[scene.dense_name(part.name)] = min(MOST, max(0.0, free[part.name] + shift[part.block or 0]))


def outlier_shares(scene: Scene, layers: list[str], threshold: float) -> dict[int, float]:
    """The share of a block's scores |w_ij| * ||x_j|| above `threshold` times their mean, by block, on the model as it is."""
    found: dict[int, float] = {}

    def count(block: int, stats: BlockStats) -> None:
        if stats:
            scores = [_scores(linear_weight(get(scene.model, name)), stats[name]["second_moment"]) for name in stats]
            mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / sum(score.numel() for score in scores)
            above = sum(int((score > threshold * mean).sum()) for score in scores)
            found[block] = above / sum(score.numel() for score in scores)
            scene.tell(block + 1, scene.anatomy.blocks)

    requests = {name: {"second_moment"} for name in layers}
    walk(scene.model, scene.anatomy, scene.ids_SL, requests, count, sequential=False, should_stop=scene.should_stop)
    return found


def _scores(weight_NK: Tensor, moment_K: Tensor) -> Tensor:
    return weight_NK.float().abs() * moment_K.sqrt().float()


def ratio_shifts(outliers: dict[int, float], spread: float) -> dict[int, float]:
    """What each block's ratio is moved by: outlier shares scaled to [0, 2 * spread], their mean taken off, the sign turned."""
    low, high = min(outliers.values()), max(outliers.values())
    scaled = {block: (share - low) * (2 * spread / (high - low) if high > low else 0.0) for block, share in outliers.items()}
    mean = sum(scaled.values()) / len(scaled)
    return {block: mean - value for block, value in scaled.items()}
