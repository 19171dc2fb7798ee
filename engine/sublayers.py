"""The two sublayers of a block, attention and MLP, as what they add to the residual stream. Knows blocks and hooks; refuses to know methods.

A sublayer's *features* are the inputs of its last matrix (o, or down); a unit (head or neuron) is a run of them. Works on models in
which a block is x + attention + MLP, or in which each sum is normed at once, as in BERT; others are refused.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bitpress.engine.calibrate import Call, enter
from bitpress.engine.errors import InputError
from bitpress.engine.measure.logits import Scorer, answers_once, scorer_of, slices
from bitpress.engine.methods.repair import inverse_root
from bitpress.engine.model.anatomy import Anatomy, Part
from bitpress.engine.model.surgery import get, linear_weight
from bitpress.engine.scene import BATCH, LAYOUT, Scene

Kind = Literal["heads", "neurons"]
KINDS: tuple[Kind, Kind] = ("heads", "neurons")
FIRST = ("gate", "up", "gate_up", "fc1")  # roles of what reads the stream for the MLP
LAST = {"heads": ("o",), "neurons": ("down", "fc2")}


class Key(NamedTuple):
    """One sublayer: the block's number in the scene's model, and which of the two."""

    block: int
    kind: Kind


def last_matrix(anatomy: Anatomy, key: Key) -> Part:
    """The matrix that writes a sublayer's result to the residual stream. Raises InputError for a model that has none to be told apart."""
    found = next((part for part in anatomy.of_block(key.block) if part.role in LAST[key.kind]), None)
    if found is None:
        raise InputError(f"The {key.kind} of block {key.block} cannot be told apart.", "Its matrices have other roles.", LAYOUT)
    return found


class Caught(NamedTuple):
    """What one forward of a block did, batch by batch: features and results of both sublayers, the stream that each adds to, and the block's output."""

    features: dict[Kind, list[Tensor]]
    added: dict[Kind, list[Tensor]]
    base: dict[Kind, list[Tensor]]
    output: list[Tensor]


class Stream:
    """A text's hidden states on their way through a model, block by block; [B, L, d] a batch."""

    batch = BATCH  # sequences at a time

    @torch.no_grad()
    def __init__(self, model: nn.Module, scene: Scene, ids_SL: Tensor | None = None) -> None:
        self.model, self.scene = model, scene
        self.blocks = list(get(model, scene.anatomy.block_prefix).children())
        parts = list((scene.ids_SL if ids_SL is None else ids_SL).split(BATCH))
        self.hidden, self.calls = enter(model, scene.anatomy, self.blocks, parts, next(model.parameters()).dtype)

    @torch.no_grad()
    def through(self, block: int) -> list[Tensor]:
        """What a block makes of the stream where it stands."""
        return [run(self.blocks[block], x_BLd, self.calls[block][len(x_BLd)]) for x_BLd in self.hidden]

    @torch.no_grad()
    def catch(self, block: int) -> Caught:
        """Run a block on the stream where it stands, without moving on."""
        features: dict[Kind, list[Tensor]] = {kind: [] for kind in KINDS}
        added: dict[Kind, list[Tensor]] = {kind: [] for kind in KINDS}
        output: list[Tensor] = []
        read: list[Tensor] = []  # by the MLP
        with ExitStack() as stack:
            first = next(part for part in self.scene.anatomy.of_block(block) if part.role in FIRST)
            stack.callback(get(self.model, first.name).register_forward_pre_hook(lambda _, args: read.append(args[0])).remove)
            for kind in KINDS:
                module = get(self.model, last_matrix(self.scene.anatomy, Key(block, kind)).name)
                handle = module.register_forward_hook(_keeper(features[kind], added[kind]))
                stack.callback(handle.remove)
            for x_BLd in self.hidden:
                self.scene.check()
                output.append(run(self.blocks[block], x_BLd, self.calls[block][len(x_BLd)]))
        between = self._between(block, added, output, read)
        return Caught(features, added, {"heads": list(self.hidden), "neurons": between}, output)

    def _between(self, block: int, added: Mapping[Kind, list[Tensor]], output: list[Tensor], read: list[Tensor]) -> list[Tensor]:
        """The stream that the MLP adds to: input and attention summed, or that normed, which is then what the MLP reads."""
        summed = [x + y for x, y in zip(self.hidden, added["heads"], strict=True)]
        if _close(summed[0] + added["neurons"][0], output[0]):
            return summed
        norms = [module for module in self.blocks[block].modules() if "Norm" in type(module).__name__]
        if any(_close(norm(read[0] + added["neurons"][0]), output[0]) for norm in norms) and any(_close(norm(summed[0]), read[0]) for norm in norms):
            return read
        raise InputError("This model cannot be repaired.", f"Block {block} is not the sum of its input and two sublayers.", LAYOUT)

    def move(self, hidden: list[Tensor]) -> None:
        """Take these as the next block's input."""
        self.hidden = hidden


def _close(made: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(made.float(), wanted.float(), rtol=0.05, atol=0.05 * float(wanted.float().abs().max()))


def run(block: nn.Module, x_BLd: Tensor, call: Call) -> Tensor:
    """A block's hidden states."""
    output = block(x_BLd, *call.args, **call.kwargs)
    return output if isinstance(output, Tensor) else output[0]


def _keeper(features: list[Tensor], added: list[Tensor]) -> Callable[..., None]:
    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        features.append(args[0].detach())
        added.append(output.detach())

    return keep


@contextmanager
def skipping(model: nn.Module, anatomy: Anatomy, block: int, x_BLd: Tensor) -> Iterator[None]:
    """Blocks before `block` do nothing and hand on x_BLd, so that a forward of the model costs only the rest."""
    blocks = list(get(model, anatomy.block_prefix).children())[:block]
    tuples = _returns_tuples(model, anatomy)
    for module in blocks:
        module.forward = (lambda *_, **__: (x_BLd,)) if tuples else (lambda *_, **__: x_BLd)
    try:
        yield
    finally:
        for module in blocks:
            del module.forward


def _returns_tuples(model: nn.Module, anatomy: Anatomy) -> bool:
    """Whether this family's blocks return a tuple; found out once for a model."""
    known = getattr(model, "_bitpress_block_tuples", None)
    if known is None:
        heard: list[Any] = []
        first = next(iter(get(model, anatomy.block_prefix).children()))
        handle = first.register_forward_hook(lambda module, args, output: heard.append(output))
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device), use_cache=False)
        handle.remove()
        known = isinstance(heard[0], tuple)
        model._bitpress_block_tuples = known  # type: ignore[assignment]
    return bool(known)


@contextmanager
def masking(model: nn.Module, anatomy: Anatomy, masks: Mapping[Key, Tensor]) -> Iterator[None]:
    """Multiply each sublayer's features by its mask [F] during the forwards inside."""
    with ExitStack() as stack:
        for key, mask_F in masks.items():
            module = get(model, last_matrix(anatomy, key).name)
            handle = module.register_forward_pre_hook(lambda _, args, mask_F=mask_F: (args[0] * mask_F.to(args[0].dtype),))
            stack.callback(handle.remove)
        yield


# Losses through a model ------------------------------------------------------------------------------------------

Loss = Callable[[Tensor, slice], Tensor]  # (float32 logits [P, V] of a slice of all positions, the slice) -> a sum over the slice


def predicting(hidden: Tensor) -> Tensor:
    """What predictions are made of, [P, D]: all positions but the last of every sequence, or [B, C], the answer of a classifier to each."""
    return hidden[:, :-1].flatten(0, 1) if hidden.ndim == 3 else hidden


def backward(scorer: Scorer, ids_BL: Tensor, loss: Loss) -> None:
    """Backward of the mean over positions of a loss, its logits made slice by slice; gradients gather where they are asked for."""
    hidden_PD = predicting(scorer.hidden(ids_BL))
    leaf_PD = hidden_PD.detach().requires_grad_()
    for part in slices(len(leaf_PD), scorer.vocab):
        (loss(scorer.logits(leaf_PD[part]).float(), part) / len(leaf_PD)).backward()
    hidden_PD.backward(leaf_PD.grad)


def task_loss(model: nn.Module, ids_BL: Tensor) -> Loss:
    """Negative log-likelihood of the next token; of a classifier's own answer, since its text comes without labels."""
    if answers_once(model):
        return lambda logits_BC, part: torch.nn.functional.cross_entropy(logits_BC, logits_BC.detach().argmax(1), reduction="sum")
    targets_P = ids_BL[:, 1:].flatten()
    return lambda logits_PV, part: torch.nn.functional.cross_entropy(logits_PV, targets_P[part], reduction="sum")


def knowledge_loss(teacher: Scorer, teacher_PD: Tensor, temperature: float) -> Loss:
    """T^2 KL(teacher / T || student / T). teacher_PD: the teacher's hidden states of the positions."""

    def loss(logits_PV: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            wanted_PV = (teacher.logits(teacher_PD[part]).float() / temperature).log_softmax(-1)
        made_PV = (logits_PV / temperature).log_softmax(-1)
        return temperature**2 * torch.nn.functional.kl_div(made_PV, wanted_PV, reduction="sum", log_target=True)

    return loss


@torch.no_grad()
def drawn_from(teacher: Scorer, teacher_PD: Tensor, temperature: float, seed: int) -> Tensor:
    """A token for every position, int64 [P], drawn from the teacher's softened predictions."""
    luck = torch.Generator().manual_seed(seed)
    parts = [teacher_PD[part] for part in slices(len(teacher_PD), teacher.vocab)]
    return torch.cat([torch.multinomial((teacher.logits(part_PD).float() / temperature).softmax(-1), 1, generator=luck)[:, 0] for part_PD in parts])


def drawn_loss(drawn_P: Tensor, temperature: float) -> Loss:
    """T times the negative log-likelihood, softened by T, of tokens of `drawn_from`.

    At a student that equals its teacher its gradient is zero on average, and half its square is the second-order term of `knowledge_loss`.
    """
    return lambda logits_PV, part: temperature * torch.nn.functional.cross_entropy(logits_PV / temperature, drawn_P[part], reduction="sum")


def mask_gradients(scene: Scene, keys: list[Key], loss_of: Callable[[int, Tensor], Loss], student: Stream | None = None) -> Iterator[dict[Key, Tensor]]:
    """Batch by batch the gradient of the mean loss in the masks of some sublayers' features, [F] each, float32, at masks of one.

    loss_of: (number of the batch, its tokens) -> loss. student: a stream that stands at the first block of `keys`; the blocks before are not run again.
    """
    model, anatomy, scorer = scene.model, scene.anatomy, scorer_of(scene.model)
    first = min(key.block for key in keys)
    for number, ids_BL in enumerate(scene.batches(BATCH)):
        masks = {key: torch.ones(last_matrix(anatomy, key).in_features, requires_grad=True) for key in keys}
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(masking(model, anatomy, masks))
            if student is not None:
                stack.enter_context(skipping(model, anatomy, first, student.hidden[number]))
            backward(scorer, ids_BL, loss_of(number, ids_BL))
        yield {key: mask.grad for key, mask in masks.items() if mask.grad is not None}


class Moments(NamedTuple):
    """Mean and mean square of a sublayer's features over all tokens, float64 [F]."""

    mean_F: Tensor
    square_F: Tensor

    @property
    def variance_F(self) -> Tensor:
        """E[(x - E x)^2]."""
        return (self.square_F - self.mean_F.square()).clamp_min(0)


@torch.no_grad()
def feature_moments(scene: Scene, keys: list[Key], skip_first: bool = False, weigh: bool = False, student: Stream | None = None) -> dict[Key, Moments]:
    """The moments of several sublayers' features in one pass. skip_first: leave out the first token of every sequence.

    weigh: a token counts 1 over the mean square of what its block puts out, as it does for the norm that reads it. student: as for `mask_gradients`.
    """
    sums: dict[Key, list[Tensor]] = {}
    anatomy = scene.anatomy  # made anew at every look
    _returns_tuples(scene.model, anatomy)  # finds it out by a forward that is not to be heard
    with ExitStack() as stack:
        scorer = scorer_of(scene.model)
        blocks = list(get(scene.model, anatomy.block_prefix).children())
        held: dict[Key, Tensor] = {}
        for key in keys:
            module = get(scene.model, last_matrix(anatomy, key).name)
            stack.callback(module.register_forward_pre_hook(_holder(held, key)).remove)
        for block in {key.block for key in keys}:
            stack.callback(blocks[block].register_forward_hook(_summer(sums, held, int(skip_first), weigh)).remove)
        for number, ids_BL in enumerate(scene.batches(BATCH)):
            with skipping(scene.model, anatomy, min(keys).block, student.hidden[number]) if student else nullcontext():
                scorer.hidden(ids_BL)
    tokens = len(scene.ids_SL) * (scene.ids_SL.shape[1] - int(skip_first))
    return {key: Moments(total / tokens, squares / tokens) for key, (total, squares) in sums.items()}


def sizes_in_stream(scene: Scene, keys: list[Key], skip_first: bool = True, student: Stream | None = None) -> dict[Key, Tensor]:
    """Per feature: its mean square, over that of the residual stream token by token, times the mean square of its column of the last matrix."""
    moments, anatomy = feature_moments(scene, keys, skip_first, True, student), scene.anatomy

    def column_squares(key: Key) -> Tensor:
        return linear_weight(get(scene.model, last_matrix(anatomy, key).name)).double().square().mean(0)

    return {key: moments[key].square_F * column_squares(key) for key in keys}


def _holder(held: dict[Key, Tensor], key: Key) -> Callable[..., None]:
    def hold(module: nn.Module, args: tuple[Any, ...]) -> None:
        held[key] = args[0]

    return hold


def _summer(sums: dict[Key, list[Tensor]], held: dict[Key, Tensor], start: int, weigh: bool) -> Callable[..., None]:
    """At the end of a block: add what its sublayers hold."""

    def add(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stream_BLd = output if isinstance(output, Tensor) else output[0]
        root_BL1 = inverse_root(stream_BLd) if weigh else torch.ones(())
        for key in list(held):
            x_MF = (held.pop(key).float() * root_BL1)[:, start:].flatten(0, 1)
            new = [x_MF.sum(0, dtype=torch.float64), x_MF.square().sum(0, dtype=torch.float64)]
            sums[key] = [old + more for old, more in zip(sums[key], new, strict=True)] if key in sums else new

    return add
