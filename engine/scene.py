"""What a shape method works on: a private copy of the model that gets smaller as it decides, and text. Knows models; refuses to know methods.

Blocks have the numbers of the scene's model, which close up when blocks are dropped; what is recorded has the dense model's.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from bitpress.engine.errors import BitpressError, Cancelled, InputError
from bitpress.engine.model import narrow, sharing, slicing, surgery
from bitpress.engine.model.anatomy import Anatomy, Part
from bitpress.engine.model.load import Loaded, compute_dtype
from bitpress.engine.recipe import Recipe, Scheme
from bitpress.engine.structure import Stream, Structure, then
from bitpress.engine.targets import matches

BATCH = 4
ONLY_ONE = "Leave out `slicegpt`, or what removes blocks, heads or neurons."
LAYOUT = "Choose a Llama, Mistral, Qwen, OPT or a similar model."


class Scene:
    """One model on its way to its shape.

    ids_SL: int64 [S, L], S sequences of L tokens; None when no stage reads text. tell: called with (done, total) of a method's own units.
    """

    def __init__(
        self,
        loaded: Loaded,
        recipe: Recipe,
        ids_SL: Tensor | None = None,
        tell: Callable[[int, int], None] = lambda done, total: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.loaded, self.recipe, self.ids, self.tell, self.should_stop = loaded, recipe, ids_SL, tell, should_stop
        self.dense = loaded.anatomy
        numbers = recipe.structure.model_dump() | {"heads": None, "neurons": None, "drop_blocks": recipe.dropped_blocks(loaded.anatomy)}
        self.structure = Structure(**numbers)  # what has gone so far, by the dense model's numbers
        self.ratios: dict[str, float] = {}  # share of zeros by the dense model's layer names, where a method has set it
        self.repaired: set[str] = set()  # weights and biases that a method has set, by the dense model's names
        self.sliced: dict[str, Tensor] = {}  # every weight of a model whose hidden states have been made narrower
        self.targets = "*"

    @cached_property
    def model(self) -> nn.Module:
        """The private copy, in the type to compute in, with all that has gone so far."""
        device = next(self.loaded.model.parameters()).device.type
        made = copy.deepcopy(self.loaded.model).to(compute_dtype(device))
        reshape(made, self.dense, self.structure)
        return made

    @property
    def ids_SL(self) -> Tensor:
        """The text. Raises InputError when there is none."""
        if self.ids is None:
            raise InputError("There is no text to look at.", "", "Choose a text for calibration.")
        return self.ids

    @property
    def anatomy(self) -> Anatomy:
        """The parts of `model`."""
        return moved(self.recipe.model_copy(update={"structure": self.structure}).reduced(self.dense), self.survivors)

    @property
    def survivors(self) -> list[int]:
        """The dense model's number of every block of `model`."""
        gone = set(self.structure.dropped(self.dense.blocks))
        return [block for block in range(self.dense.blocks) if block not in gone]

    @property
    def blocks(self) -> list[int]:
        """The blocks of `model` that the stage is pointed at."""
        chosen = {part.block for part in self.dense.linears if matches(self.targets, part, self.dense.blocks)}
        return [new for new, block in enumerate(self.survivors) if block in chosen]

    def batches(self, size: int = BATCH) -> Iterator[Tensor]:
        """The text, `size` sequences at a time. Raises Cancelled between two when told to stop."""
        for part in self.ids_SL.split(size):
            self.check()
            yield part

    def check(self) -> None:
        """Raise Cancelled when told to stop."""
        if self.should_stop():
            raise Cancelled()

    def shares(self, kind: str) -> dict[int, float] | None:
        """The share of `heads` or `neurons` that each block of `model` is to keep, where the recipe gives shares."""
        if not getattr(self.recipe.structure, kind):
            return None
        return {new: self.recipe.structure.share_of(kind, self.dense, block) for new, block in enumerate(self.survivors)}

    def schemes(self) -> dict[str, Scheme]:
        """The scheme of every linear of `model`."""
        plan = self.recipe.model_copy(update={"structure": self.structure})
        names = {self.dense_name(part.name): part.name for part in self.anatomy.linears}
        return {names[name]: scheme for name, scheme in plan.resolve(self.dense).items()}

    def cut(self, drop_blocks: list[int] | None = None, heads: Mapping[int, list[int]] | None = None, neurons: Mapping[int, list[int]] | None = None) -> None:
        """Take blocks, or heads and neurons of blocks, out of the model, by its own numbers."""
        if self.structure.stream:
            raise InputError("No more can be removed.", "The hidden states are sliced, which mixes heads, neurons and blocks' inputs.", ONLY_ONE)
        gone = Structure(drop_blocks=drop_blocks or [], remove_heads=dict(heads or {}), remove_neurons=dict(neurons or {}))
        anatomy = self.anatomy
        if "model" in vars(self):
            _cut_units(self.model, anatomy, gone)
            if drop_blocks:
                surgery.drop_blocks(self.model, anatomy, drop_blocks)
        self.structure = then(self.structure, gone, self.dense)

    def slim(self, stream: Stream, tensors: dict[str, Tensor]) -> None:
        """Make the hidden states inside the blocks narrower; tensors: all weights that change, and the turns."""
        self.structure, self.sliced = self.structure.model_copy(update={"stream": stream}), tensors

    def must_be_whole(self) -> None:
        """Raise InputError when parts are gone already."""
        if self.structure.dropped(self.dense.blocks) or self.structure.remove_heads or self.structure.remove_neurons:
            raise InputError("The hidden states cannot be sliced.", "Blocks, heads or neurons are gone already.", ONLY_ONE)

    def set_weight(self, name: str, weight_NK: Tensor) -> None:
        """Give a linear of the model new weights; they are kept with the run."""
        surgery.set_linear_weight(surgery.get(self.model, name), weight_NK)
        self.repaired.add(f"{self.dense_name(name)}.weight")

    def set_bias(self, name: str, bias_N: Tensor) -> None:
        """Give a linear of the model a new bias, also where it had none; it is kept with the run."""
        module = surgery.get(self.model, name)
        module.bias = nn.Parameter(bias_N.to(next(module.parameters())), requires_grad=False)
        dense_name = self.dense_name(name)
        self.repaired.add(f"{dense_name}.bias")
        added = self.structure.added_biases or []
        if not self.dense.by_name[dense_name].bias and dense_name not in added:
            self.structure = self.structure.model_copy(update={"added_biases": [*added, dense_name]})

    def set_factors(self, name: str, left_NR: Tensor, right_RK: Tensor) -> None:
        """Give a linear that will share its matrix the factors of its own; they are kept with the run."""
        module = surgery.get(self.model, name)
        for kind, factor in ((sharing.LEFT, left_NR), (sharing.RIGHT, right_RK)):
            setattr(module, kind, nn.Parameter(factor.to(next(module.parameters())), requires_grad=False))
            self.repaired.add(f"{self.dense_name(name)}.{kind}")

    def dense_name(self, name: str) -> str:
        """The dense model's name of a linear of the model."""
        prefix = self.dense.block_prefix
        block, _, rest = name.removeprefix(f"{prefix}.").partition(".")
        return f"{prefix}.{self.survivors[int(block)]}.{rest}"

    def tensors(self) -> dict[str, Tensor]:
        """What was repaired and is still there, by the dense model's names, in its type."""
        dtype = next(self.loaded.model.parameters()).dtype
        own = {self.dense_name(part.name): surgery.get(self.model, part.name) for part in self.anatomy.linears} if self.repaired else {}
        kept = [name for name in sorted(self.repaired) if name.rpartition(".")[0] in own]
        repaired = {name: getattr(own[name.rpartition(".")[0]], name.rpartition(".")[2]).detach().to(dtype) for name in kept}
        return repaired | {name: tensor.to(dtype).contiguous() for name, tensor in self.sliced.items()}


def moved(reduced: Anatomy, survivors: list[int]) -> Anatomy:
    """The anatomy of a model whose blocks have closed up, from that under the dense model's numbers."""
    numbers = {block: new for new, block in enumerate(survivors)}
    parts = tuple(moved_part(part, numbers, reduced.block_prefix) for part in reduced.linears)
    fields = {name: getattr(reduced, name) for name in Anatomy.model_fields}
    return Anatomy.model_construct(**{**fields, "blocks": len(survivors), "linears": parts})


def moved_part(part: Part, numbers: Mapping[int, int], prefix: str) -> Part:
    """A block linear under its new block number."""
    block = numbers[part.block or 0]
    return part.model_copy(update={"name": f"{prefix}.{block}{part.name.removeprefix(f'{prefix}.{part.block}')}", "block": block})


def reshape(model: nn.Module, anatomy: Anatomy, structure: Structure) -> dict[int, int]:
    """Bring a whole model to a structure without shares; returns {old block number: new} of those that stay."""
    if structure.shares:
        raise BitpressError("Shares of heads or neurons are no numbers yet.", "", "Add a stage that chooses them, such as method: magnitude-structured.")
    gone = structure.dropped(anatomy.blocks)
    _cut_units(model, anatomy, structure)
    places = surgery.drop_blocks(model, anatomy, gone) if gone else {block: block for block in range(anatomy.blocks)}
    if structure.stream:
        narrow.narrow(model, anatomy, structure.stream.width, structure.stream.by_block)
    if structure.remove_heads or structure.remove_neurons:
        reduced = anatomy.reduced(gone, structure.units(anatomy))
        slicing.describe_units(model, [reduced.units_of(block) for block in reduced.present])
    return places


def _cut_units(model: nn.Module, anatomy: Anatomy, structure: Structure) -> None:
    """Take heads and neurons out, by the numbers of a model of this anatomy."""
    for block, gone in structure.remove_heads.items():
        left = [head for head in range(anatomy.units_of(block).heads) if head not in set(gone)]
        slicing.keep_heads(model, anatomy, block, left)
    for block, gone in (structure.remove_neurons or {}).items():
        lost = set(gone)
        slicing.keep_neurons(model, anatomy, block, [neuron for neuron in range(anatomy.units_of(block).neurons) if neuron not in lost])


@torch.no_grad()
def load_repaired(model: nn.Module, tensors: Mapping[str, Tensor], places: Mapping[str, str]) -> None:
    """Put repaired weights and biases into a model; places: where each linear of the dense model is in it, others being where they are named."""
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        module = surgery.get(model, places.get(layer, layer))
        old = next(module.parameters())
        setattr(module, kind, nn.Parameter(tensor.to(old), requires_grad=False))
