"""Block sharing: several blocks hold one set of matrices, each with a low-rank product of its own beside it (METHODS 14)."""

from collections.abc import Mapping
from itertools import pairwise
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bitpress.engine.calibrate import walk
from bitpress.engine.errors import InputError
from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import MethodOptions, ShapeMethod
from bitpress.engine.methods.lowrank.pipeline import root_of, truncate
from bitpress.engine.model import sharing
from bitpress.engine.model.anatomy import Anatomy, Part
from bitpress.engine.model.surgery import get, linear_weight
from bitpress.engine.scene import Scene


class SharingOptions(MethodOptions):
    """Which blocks share, where the recipe does not name them, and what is called near."""

    pairs: int = Field(
        default=0, ge=0, le=64, title="Pairs to choose",
        description="Neighbouring blocks whose matrices are nearest to each other share, so many pairs of them. 0: those that the recipe names.",
    )  # fmt: skip
    by_inputs: bool = Field(
        default=True, title="Weigh errors by inputs",
        description="The common matrix and the products beside it lose least on the inputs that each block sees. Off: all inputs count alike.",
    )  # fmt: skip


class BlockSharing(ShapeMethod):
    """One matrix for all blocks of a group, the nearest to theirs; what each block loses by it is made up for at `structure.share_rank`."""

    name = "block-sharing"
    title = "Block sharing"
    family = "share"
    summary = "Stores one set of matrices for several blocks, and for each block a thin product that makes up for a part of what it loses. No training."
    citation = "Lan et al. 2020, ALBERT: a lite BERT for self-supervised learning of language representations, arXiv 1909.11942; the products beside are ours."
    cost = "One pass over the text, and seconds a block."
    use_when = "To see how alike neighbouring blocks are. Compare it with dropping blocks at the same size: nothing is trained afterwards."
    ability: ClassVar[Ability] = Ability(part="structure", units=("sharing",))
    Options = SharingOptions

    def reads_text(self, options: SharingOptions) -> bool:
        """Only where inputs weigh the errors."""
        return options.by_inputs

    def shape(self, scene: Scene, options: SharingOptions) -> None:
        """Give the groups of the recipe, or the pairs found, their common matrices."""
        if options.pairs:
            scene.structure = scene.structure.model_copy(update={"share_blocks": nearest_pairs(scene, options.pairs)})
        groups = scene.structure.share_blocks
        if not groups:
            raise InputError("No blocks are to share.", "", "Name them in structure.share_blocks, or set the option pairs.")
        numbers = {block: new for new, block in enumerate(scene.survivors)}
        together = sharing.layers_together(scene.anatomy, [[numbers[block] for block in group] for group in groups])
        moments = self._moments(scene, together) if options.by_inputs else {}
        for done, parts in enumerate(together):
            scene.check()
            made_common(scene, parts, moments)
            scene.tell(done + 1, len(together))
        sharing.share(scene.model, together, {part.name: part.name for part in scene.anatomy.linears})

    def _moments(self, scene: Scene, together: list[list[Part]]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def keep(_: int, stats: Mapping[str, Mapping[str, Tensor]]) -> None:
            found.update({name: known["gram"] for name, known in stats.items()})

        requests = {part.name: {"gram"} for parts in together for part in parts}
        walk(scene.model, scene.anatomy, scene.ids_SL, requests, keep, sequential=False, should_stop=scene.should_stop)
        return found


def made_common(scene: Scene, parts: list[Part], moments: Mapping[str, Tensor]) -> None:
    """Give layers one matrix, held by the first, and each the factors of what it loses by it."""
    weights = [linear_weight(get(scene.model, part.name)).detach().float() for part in parts]
    plain = [torch.eye(weights[0].shape[1], dtype=torch.float64) for _ in parts]
    seen = [moments[part.name] for part in parts] if moments else plain
    common_NK = sharing.common_matrix(weights, seen).to(next(get(scene.model, parts[0].name).parameters()))
    scene.set_weight(parts[0].name, common_NK)
    if rank := scene.structure.share_rank:
        for part, weight_NK, moment_KK in zip(parts, weights, seen, strict=True):
            factors = truncate(weight_NK - common_NK.float(), root_of(moment_KK) if moments else None, rank)
            scene.set_factors(part.name, factors.left_NR, factors.right_RK)


def nearest_pairs(scene: Scene, count: int) -> list[list[int]]:
    """Disjoint pairs of neighbours whose matrices differ least, by the dense model's numbers. Raises InputError when there are fewer."""
    anatomy, blocks = scene.anatomy, scene.blocks
    gaps = sorted((distance(scene, anatomy, one, other), one, other) for one, other in pairwise(blocks) if other == one + 1)
    found: list[list[int]] = []
    for _, one, other in gaps:
        if len(found) < count and not {one, other} & {block for pair in found for block in pair}:
            found.append([one, other])
    if len(found) < count:
        raise InputError(f"{count} pairs of blocks cannot share.", f"Only {len(found)} pairs of neighbours were found.", "Ask for fewer pairs.")
    return sorted([scene.survivors[one], scene.survivors[other]] for one, other in found)


def distance(scene: Scene, anatomy: Anatomy, one: int, other: int) -> float:
    """Squared difference of two blocks' matrices over the sum of their squares."""
    apart = size = 0.0
    for first, second in zip(anatomy.of_block(one), anatomy.of_block(other), strict=True):
        a, b = (linear_weight(get(scene.model, part.name)).float() for part in (first, second))
        apart, size = apart + float((a - b).square().sum()), size + float(a.square().sum() + b.square().sum())
    return apart / size
