"""Kwon et al.: masks chosen by Fisher information, rearranged within layers, and rescaled (METHODS 2.7 and E)."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from bitpress.engine.methods.repair import Repairing
from bitpress.engine.methods.structured import Kept, Scores, StructuredMethod, StructuredOptions, Units, budget_of
from bitpress.engine.scene import Scene
from bitpress.engine.sublayers import Key, mask_gradients, task_loss


class KwonOptions(StructuredOptions):
    """Kwon's own repair rescales units."""

    repair: Repairing = Field(default="rescale", title="Repair", description="Kwon gives each kept unit a scale; any other repair can follow the masks.")
    rearrange: bool = Field(default=True, title="Rearrange", description="Swap units within a layer so that the gradients of what goes cancel.")


class Kwon(StructuredMethod):
    """Sum over batches of the squared gradient of the loss in each unit's mask."""

    name = "kwon"
    title = "Kwon mask search"
    summary = "Chooses heads and neurons by the Fisher information of their masks and rescales what stays. Needs a forward and a backward pass over some text."
    citation = "Kwon et al. 2022, A fast post-training pruning framework for transformers, arXiv 2204.09656."
    cost = "A forward and a backward pass over the text and four passes for its scales."
    use_when = "For narrower blocks, when nothing can be trained."
    Options = KwonOptions

    def score(self, scene: Scene, units: Units, options: Any) -> Scores:
        """The diagonal Fisher information of each unit's mask; the gradients are kept for the rearrangement."""
        columns: dict[Key, list[Tensor]] = {key: [] for key in units.keys}
        for done, batch in enumerate(mask_gradients(scene, units.keys, lambda _, ids_BL: task_loss(scene.model, ids_BL)), start=1):
            for key, gradient_F in batch.items():
                columns[key].append(units.per_unit(key, gradient_F))
            scene.tell(done, -(-len(scene.ids_SL) // 4))
        units.gradients = {key: torch.stack(parts, dim=1).double() for key, parts in columns.items()}
        return {key: gradient_UB.square().sum(1) for key, gradient_UB in units.gradients.items()}

    def choose(self, units: Units, scores: Scores, options: KwonOptions) -> Kept:
        """For every count of heads fill up with neurons, and take the split with the largest sum; then rearrange."""
        if units.shares is not None or options.allocation == "uniform":
            kept = super().choose(units, scores, options)
        else:
            kept = split_search(units, scores, budget_of(units, options.remove))
        return {key: rearranged(stay, units.gradients[key]) for key, stay in kept.items()} if options.rearrange else kept


def split_search(units: Units, scores: Scores, budget: float) -> Kept:
    """The best split of a budget between heads and neurons, both ranked over all layers; every sublayer keeps its floor."""
    ranked = {kind: _ranked(units, scores, kind) for kind in ("heads", "neurons")}
    costs = {kind: units.cost(next(key for key in units.keys if key.kind == kind)) for kind in ranked if ranked[kind]}
    floors = {kind: sum(units.floor(key) for key in units.keys if key.kind == kind) for kind in ranked}
    sums = {kind: torch.tensor([0.0, *(value for value, *_ in ranked[kind])], dtype=torch.float64).cumsum(0) for kind in ranked}
    best, split = float("-inf"), (0, 0)
    for heads in range(floors["heads"], len(ranked["heads"]) + 1):
        left = budget - heads * costs.get("heads", 0.0)
        neurons = min(len(ranked["neurons"]), int(left // costs["neurons"])) if "neurons" in costs else 0
        if neurons < floors["neurons"] or left < 0:
            break
        total = float(sums["heads"][heads] + sums["neurons"][neurons])
        if total > best:
            best, split = total, (heads, neurons)
    return _taken(units, ranked, dict(zip(("heads", "neurons"), split, strict=True)))


def _ranked(units: Units, scores: Scores, kind: str) -> list[tuple[float, Key, int]]:
    """Units of a kind, the floors' first, then by score."""
    first, rest = [], []
    for key, score_U in scores.items():
        if key.kind == kind:
            order = score_U.argsort(descending=True).tolist()
            entries = [(float(score_U[unit]), key, unit) for unit in order]
            first += entries[: units.floor(key)]
            rest += entries[units.floor(key) :]
    return sorted(first, key=lambda entry: -entry[0]) + sorted(rest, key=lambda entry: -entry[0])


def _taken(units: Units, ranked: dict[str, list[tuple[float, Key, int]]], counts: dict[str, int]) -> Kept:
    kept: Kept = {key: [] for key in units.keys}
    for kind, count in counts.items():
        for _, key, unit in ranked[kind][:count]:
            kept[key].append(unit)
    for key, stay in kept.items():
        surplus = len(stay) % units.multiple if key.kind == "neurons" and len(stay) < units.count(key) else 0
        kept[key] = sorted(stay[: len(stay) - surplus] if len(stay) > surplus else stay)
    return kept


def rearranged(stay: list[int], gradient_UB: Tensor) -> list[int]:
    """The same number of units, swapped so that the summed gradient of those that go is small: in ascending order of Fisher
    information each kept unit is put among the gone, and the member goes back whose leaving makes the norm of the sum least."""
    square_U = gradient_UB.square().sum(1)
    gone_U = torch.ones(len(gradient_UB), dtype=torch.bool)
    gone_U[stay] = False
    if gone_U.all() or not gone_U.any():
        return sorted(stay)
    total_B = gradient_UB[gone_U].sum(0)
    for unit in sorted(stay, key=square_U.tolist().__getitem__):
        gone_U[unit] = True
        total_B = total_B + gradient_UB[unit]
        without_U = square_U - 2 * (gradient_UB @ total_B)  # ||total - g||^2 but for ||total||^2, which is the same for all
        leaving = int(without_U.masked_fill(~gone_U, float("inf")).argmin())
        gone_U[leaving] = False
        total_B = total_B - gradient_UB[leaving]
    return (~gone_U).nonzero()[:, 0].tolist()
