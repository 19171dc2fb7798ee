"""SliceGPT: the residual stream keeps the directions in which most of it lies, and every matrix that reads or writes it gets smaller (METHODS 16.6).

The authors give every sublayer its own directions, and a matrix on every skip connection turns the stream from one to the
next. On a small model these matrices cost much of what the slicing saves, so that here a block has one, or all blocks share
theirs and none is needed. The tied embedding keeps its width. The directions are those of the dense model's stream.
"""

from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bitpress.engine.measure.logits import scorer_of
from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import MethodOptions, ShapeMethod
from bitpress.engine.model.anatomy import WRITERS
from bitpress.engine.model.links import links_of
from bitpress.engine.model.narrow import TURNS, check_turnable, final_norm, take_gain
from bitpress.engine.model.surgery import bias_of, get, linear_weight, twin
from bitpress.engine.scene import Scene
from bitpress.engine.structure import Stream

REMEDY = "Choose a Llama, Mistral or Qwen model, or remove heads and neurons instead."


class SliceOptions(MethodOptions):
    """How narrow the stream gets, and whose directions count."""

    remove: float = Field(
        default=0.2, gt=0.0, lt=1.0, title="Removed", description="Share of the residual stream's directions, and so of the block linears' weights, to remove."
    )
    directions: Literal["shared", "each block"] = Field(
        default="shared",
        title="Directions",
        description="The same for all blocks, or each block's own with one more matrix a block to turn the stream between them.",
    )
    multiple: int = Field(default=8, ge=1, le=256, title="Width in multiples of", description="Kernels run faster on widths that this divides.")


class SliceGpt(ShapeMethod):
    """Principal directions of the normed stream; what reads it is multiplied by them, what writes it by their transpose."""

    name = "slicegpt"
    title = "SliceGPT"
    family = "prune"
    summary = "Turns the hidden states into their principal directions and removes the least of them from every matrix. Needs one pass over some text."
    citation = "Ashkboos et al. 2024, SliceGPT: compress large language models by deleting rows and columns, arXiv 2401.15024."
    cost = "One pass over the text; each token then costs one or two small products more at the ends, in transformers' loop instead of our own."
    use_when = "For narrower matrices throughout, on models whose hidden states are wide."
    ability: ClassVar[Ability] = Ability(part="structure", units=("stream",))
    Options = SliceOptions

    def shape(self, scene: Scene, options: SliceOptions) -> None:
        """Find the directions, then slice. Raises InputError for a model that cannot be turned, or one that has lost other parts."""
        scene.must_be_whole()
        by_block = options.directions == "each block"
        whole = scene.anatomy.hidden
        width = min(whole, max(options.multiple, int((1 - options.remove) * whole) // options.multiple * options.multiple))
        model = twin(scene.loaded.model)
        check_turnable(model, scene.dense, links_of(model, scene.dense), "sliced", REMEDY)
        covariances = _covariances(scene)
        tops = [_top(covariance_dd, width) for covariance_dd in (covariances if by_block else [sum(covariances[1:], covariances[0])] * len(covariances))]
        scene.slim(Stream(width=width, by_block=by_block), sliced(model, scene, tops, by_block))


def sliced(model: nn.Module, scene: Scene, tops: list[Tensor], by_block: bool) -> dict[str, Tensor]:
    """Every new weight by the dense model's names, and the turns. model: changed here. tops: float64 [d, w] for each block."""
    for link in links_of(model, scene.dense):
        if link.kind == "norm":
            take_gain(model, link)
    made = {}
    for part in scene.dense.linears:
        module, top_dw = get(model, part.name), tops[part.block or 0]
        weight_NK, bias_N = linear_weight(module).double(), bias_of(module)
        made[f"{part.name}.weight"] = top_dw.t() @ weight_NK if part.role in WRITERS else weight_NK @ top_dw
        if bias_N is not None and part.role in WRITERS:
            made[f"{part.name}.bias"] = top_dw.t() @ bias_N.double()
    made[f"{TURNS}.enter.weight"] = tops[0].t()
    if by_block:
        made |= {f"{TURNS}.{number}.weight": new_dw.t() @ old_dw for number, (old_dw, new_dw) in enumerate(pairwise(tops), start=1)}
        made[f"{TURNS}.leave.weight"] = tops[-1].t()
    return made


def _top(covariance_dd: Tensor, width: int) -> Tensor:
    """The `width` directions of largest variance, [d, w]."""
    return torch.linalg.eigh(covariance_dd).eigenvectors.flip(1)[:, :width].contiguous()


@torch.no_grad()
def _covariances(scene: Scene) -> list[Tensor]:
    """For every block the sum over tokens of x x^T of the stream x as its norms see it, each token of length one; float64 [d, d].

    What the final norm sees counts for the last block.
    """
    anatomy, model = scene.anatomy, scene.model
    sums = [torch.zeros(anatomy.hidden, anatomy.hidden, dtype=torch.float64) for _ in range(anatomy.blocks)]
    norms = [(get(model, link.source), link.block) for link in links_of(model, anatomy) if link.kind == "norm"]
    norms.append((final_norm(model, anatomy, "sliced", REMEDY), anatomy.blocks - 1))
    handles = [norm.register_forward_pre_hook(_adder(sums[block])) for norm, block in norms]
    scorer = scorer_of(model)
    try:
        for sum_dd in sums:
            sum_dd.zero_()  # what the scorer tried itself on is no text
        for done, ids_BL in enumerate(scene.batches(), start=1):
            scorer.hidden(ids_BL)
            scene.tell(min(len(scene.ids_SL), done * len(ids_BL)), len(scene.ids_SL))
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _adder(sum_dd: Tensor) -> Any:
    def add(module: nn.Module, args: tuple[Any, ...]) -> None:
        x_Md = torch.nn.functional.normalize(args[0].flatten(0, 1).float(), dim=1)
        sum_dd.add_((x_Md.t() @ x_Md).double())

    return add
