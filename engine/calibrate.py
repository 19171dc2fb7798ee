"""The one walk over a model's blocks: what reaches each layer, block by block, in little memory. Knows blocks; refuses to know methods.

One copy of the hidden states is kept and overwritten batch by batch; statistics live for one block. Every forward runs
with `use_cache=False`: a block called twice with a cache would append to it, and edits of k and v would not show.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.engine.errors import Cancelled, InputError
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.model.load import compute_dtype
from bitpress.engine.model.surgery import get
from bitpress.engine.statistics import STATISTICS, WEIGHTED, Statistic

Requests = dict[str, set[str]]  # layer name -> names of statistics
BlockStats = dict[str, dict[str, Tensor]]  # layer name -> statistic name -> its result
OnBlock = Callable[[int, BlockStats], None]
OnInputs = Callable[[int, list[Tensor]], None]
CACHES = ("past_key_values", "past_key_value", "layer_past", "cache")
RUN_TOGETHER = (("q", "k", "v", "qkv"), ("o",), ("gate", "up", "gate_up", "fc1"), ("down", "fc2"))  # roles, in the order in which a block runs them
BATCH = 4


@torch.no_grad()
def walk(
    model: nn.Module,
    anatomy: Anatomy,
    ids_SL: Tensor,
    requests: Requests,
    on_block: OnBlock,
    *,
    sequential: bool = True,
    within_block: bool = False,
    batch: int = BATCH,
    dtype: torch.dtype | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_inputs: OnInputs | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Visit the blocks in order and call `on_block(index, stats)` after each, stats being those asked for of its layers.

    Before that, `on_inputs(index, hidden)` shows what enters the block, a tensor [B, L, d] a batch; they are overwritten later.

    ids_SL: int64 [S, L], S sequences of L tokens. `on_block` may change the block's weights or replace its layers; with
    `sequential` the next block sees what the changed block puts out, otherwise what the original did. With `within_block`
    too, `on_block` is called once for each group of a block's layers that run together, and the statistics of a group are
    of what the changed groups before it put out. A layer that no row reached has no statistics. Forwards run in
    `dtype` (None: `compute_dtype` of the model's device); weights of another type are cast for a block's time and put
    back before `on_block`. `weights`: float32 [S, L] for each layer whose statistics weigh tokens (statistics.WEIGHTED).
    Raises InputError for an unknown layer or statistic, Cancelled when told to stop.
    """
    _check(requests, anatomy, ids_SL)
    device = next(model.parameters()).device
    dtype = dtype or compute_dtype(device.type)
    blocks = list(get(model, anatomy.block_prefix).children())
    hidden, calls = enter(model, anatomy, blocks, [part.to(device) for part in ids_SL.split(batch)], dtype)
    for index, block in enumerate(blocks):
        if on_inputs:
            on_inputs(index, hidden)
        for group in _groups(anatomy, index, within_block and sequential):
            names = {name: get(model, name) for name in group if requests.get(name)}
            listener = _Listener({name: requests[name] for name in names}, weights or {})
            if names or not sequential:
                with listener.listening(block, names, stop=sequential):
                    _advance(block, hidden, calls[index], dtype, should_stop, keep=not sequential)
            on_block(index, listener.results())
        if sequential and index + 1 < len(blocks):
            _advance(block, hidden, calls[index], dtype, should_stop, keep=True)


def _check(requests: Requests, anatomy: Anatomy, ids_SL: Tensor) -> None:
    if ids_SL.shape[1] > anatomy.context:
        why = f"They have {ids_SL.shape[1]:,} tokens; the model's context is {anatomy.context:,}."
        raise InputError("The calibration sequences are too long.", why, "Shorten them.")
    known = {part.name for part in anatomy.linears}
    if unknown := sorted(set(requests) - known):
        raise InputError(f"The model has no layer '{unknown[0]}'.", "", "The model card lists the layers.")
    if strange := sorted(set(chain.from_iterable(requests.values())) - set(STATISTICS)):
        raise InputError(f"There is no statistic '{strange[0]}'.", "", f"Known statistics: {', '.join(STATISTICS)}.")


def _groups(anatomy: Anatomy, index: int, apart: bool) -> list[list[str]]:
    """The layers of a block in the groups in which they run, or all as one group."""
    parts = list(anatomy.of_block(index))
    if not apart:
        return [[part.name for part in parts]]
    known = list(chain.from_iterable(RUN_TOGETHER))
    roles = [*RUN_TOGETHER, tuple({part.role for part in parts} - set(known))]
    groups = [[part.name for part in parts if part.role in together] for together in roles]
    return [group for group in groups if group]


@contextmanager
def computing_in(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> Iterator[None]:
    """Cast floating parameters to `dtype` for the block's time; the stored tensors are put back untouched."""
    changed = [(weight, weight.data) for weight in parameters if weight.is_floating_point() and weight.dtype != dtype]
    try:
        for weight, stored in changed:
            weight.data = stored.to(dtype)
        yield
    finally:
        for weight, stored in changed:
            weight.data = stored


# Entering the first block ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """What a block is called with beside the hidden states: masks, rotary tables, positions. The same for every batch of one size."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Entered(Exception):
    """Not an error: every block has been reached, and the rest of the forward is not needed."""


def enter(model: nn.Module, anatomy: Anatomy, blocks: list[nn.Module], ids: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[dict[int, Call]]]:
    """The hidden states [B, L, d] that enter block 0, a tensor a batch, and for every block its call by batch size.

    The model's own forward runs with stand-ins for the blocks, so whatever it prepares for each block (masks of
    sliding and full layers differ in Gemma) is caught while only the first block computes, once.
    """
    hidden: list[Tensor] = []
    calls: list[dict[int, Call]] = [{} for _ in blocks]
    with ExitStack() as stack:
        stack.enter_context(computing_in(_outside(model, anatomy, blocks), dtype))
        form: list[Any] = []
        stand_ins = [stack.enter_context(_standing_in(_StandIn(block, form, dtype, last=block is blocks[-1]))) for block in blocks]
        for part in ids:
            _run_to_the_last(model, part)
            hidden.append(stand_ins[0].hidden)
            for known, stand_in in zip(calls, stand_ins, strict=True):
                _check_same(known.setdefault(len(part), stand_in.call), stand_in.call)
    return hidden, calls


def _outside(model: nn.Module, anatomy: Anatomy, blocks: list[nn.Module]) -> list[nn.Parameter]:
    """The parameters that run before the first block; an untied head runs after the last and is left alone."""
    later = [*blocks, *([get(model, anatomy.head.name)] if anatomy.head else [])]
    passed = {id(weight) for module in later for weight in module.parameters()}
    return [weight for weight in model.parameters() if id(weight) not in passed]


def _run_to_the_last(model: nn.Module, ids: Tensor) -> None:
    try:
        model(input_ids=ids, **_no_cache(model))
    except _Entered:
        return
    raise InputError("This model cannot be walked.", "Its forward does not run all of its blocks.", "Choose a transformer.")


def _no_cache(model: nn.Module) -> dict[str, bool]:
    names = inspect.signature(model.forward).parameters
    takes_any = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in names.values())
    return {"use_cache": False} if "use_cache" in names or takes_any else {}


class _StandIn:
    """Takes a block's place: notes what it is called with, hands the hidden states on in the form a block would."""

    def __init__(self, block: nn.Module, form: list[Any], dtype: torch.dtype, last: bool) -> None:
        self.block, self.original, self.dtype, self.last = block, block.forward, dtype, last
        self.form = form  # one real output, from whichever block ran first; shared by all stand-ins

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.hidden, self.call = _parted(args, kwargs)
        if self.last:
            raise _Entered
        if not self.form:
            with computing_in(self.block.parameters(), self.dtype):
                self.form.append(self.original(self.hidden, *self.call.args, **self.call.kwargs))
        return self.hidden if isinstance(self.form[0], Tensor) else (self.hidden, *self.form[0][1:])


@contextmanager
def _standing_in(stand_in: _StandIn) -> Iterator[_StandIn]:
    own = vars(stand_in.block).get("forward")
    stand_in.block.forward = stand_in  # an instance attribute hides the class's method
    try:
        yield stand_in
    finally:
        del stand_in.block.forward
        if own is not None:
            stand_in.block.forward = own


def _parted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """(hidden states, the rest with every cache left out)."""
    rest = {key: None if key in CACHES else value for key, value in kwargs.items() if key != "hidden_states"}
    if "use_cache" in rest:
        rest["use_cache"] = False
    return (args[0], Call(args[1:], rest)) if args else (kwargs["hidden_states"], Call((), rest))


def _check_same(first: Call, other: Call) -> None:
    """Raise InputError when what a block is given depends on the text: replaying the first batch's would then be wrong."""
    if first is other:
        return
    for one, two in zip(_tensors(first), _tensors(other), strict=True):
        if one is not two and not torch.equal(one, two):
            raise InputError("This model cannot be walked.", "Its blocks read the text itself, not only hidden states.", "Choose another model.")


def _tensors(call: Call) -> list[Tensor]:
    values = chain(call.args, call.kwargs.values())
    flat = chain.from_iterable(value if isinstance(value, tuple | list) else (value,) for value in values)
    return [value for value in flat if isinstance(value, Tensor)]


# Through one block -----------------------------------------------------------------------------------------------


def _advance(block: nn.Module, hidden: list[Tensor], calls: dict[int, Call], dtype: torch.dtype, should_stop: Callable[[], bool], keep: bool) -> None:
    """Run a block on every batch; with `keep` its outputs take the place of its inputs."""
    with computing_in(block.parameters(), dtype):
        for index, x_BLd in enumerate(hidden):
            if should_stop():
                raise Cancelled
            call = calls[len(x_BLd)]
            try:
                output = block(x_BLd, *call.args, **call.kwargs)
            except _Heard:
                continue
            if keep:
                hidden[index] = output if isinstance(output, Tensor) else output[0]


class Stream:
    """A model's hidden states on their way through its blocks, held between two blocks; any block can be run on them."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, ids_SL: Tensor, dtype: torch.dtype | None = None) -> None:
        """ids_SL: int64 [S, L]. dtype: of the hidden states; None: `compute_dtype` of the model's device."""
        self.model, self.anatomy = model, anatomy
        device = next(model.parameters()).device
        self.ids_SL, self.dtype = ids_SL.to(device), dtype or compute_dtype(device.type)
        self.blocks = list(get(model, anatomy.block_prefix).children())
        self.calls: dict[int, list[dict[int, Call]]] = {}
        self.hidden_SLd = torch.cat(self._entered(BATCH)[0])

    def _entered(self, size: int, sequences: int | None = None) -> tuple[list[Tensor], list[dict[int, Call]]]:
        with torch.no_grad():
            return enter(self.model, self.anatomy, self.blocks, list(self.ids_SL[:sequences].split(size)), self.dtype)

    def run(self, index: int, block: nn.Module, x_BLd: Tensor) -> Tensor:
        """What `block` puts out in the place of block `index` for B sequences, with the residual in the type of `x_BLd`.

        Where the fast type is bfloat16, products are taken in it and sums stay float32 for a float32 `x_BLd`.
        """
        size = len(x_BLd)
        if size not in self.calls:
            self.calls[size] = self._entered(size, size)[1]
        call = self.calls[size][index][size]
        with torch.autocast(x_BLd.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            output = block(x_BLd, *call.args, **call.kwargs)
        return output if isinstance(output, Tensor) else output[0]


class _Heard(Exception):
    """Not an error: every layer that is listened to has been heard, and the rest of the block's forward is not needed."""


class _Listener:
    """Feeds statistics from the inputs of one block's layers. Layers that read the same tensor (q, k and v) share each statistic."""

    def __init__(self, wanted: Requests, weights: Mapping[str, Tensor]) -> None:
        self.wanted, self.weights = wanted, weights
        self.sequences = range(0)  # of the forward under way
        self.leader: dict[str, str] = {}  # layer -> the first layer that reads the same tensor
        self.kept: dict[tuple[str, str], Statistic] = {}  # (leader, statistic's name)
        self.inputs: dict[int, tuple[Tensor, str]] = {}  # of the forward under way; the tensor is held so that its id stays its own
        self.fed: set[tuple[str, str]] = set()
        self.heard: list[str] = []  # of the forward under way, in order
        self.once = False  # whether the first forward came by each layer exactly once, so that no other will come by one again

    @contextmanager
    def listening(self, block: nn.Module, layers: dict[str, nn.Module], stop: bool) -> Iterator[None]:
        """Hear the inputs of these layers of the block; with `stop` a forward ends in `_Heard` when it has come by all of them."""
        self.stop = stop
        handles = [block.register_forward_pre_hook(lambda module, args: self._begin(len(args[0])))]
        handles += [module.register_forward_pre_hook(self._hook(name)) for name, module in layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._begin(0)

    def results(self) -> BlockStats:
        """Every statistic by layer; layers that share one get the same tensor. A layer that no row reached has none."""
        done = {key: statistic.result() for key, statistic in self.kept.items()}
        return {name: {kind: done[self._owner(name, kind), kind] for kind in kinds} if name in self.leader else {} for name, kinds in self.wanted.items()}

    def _owner(self, name: str, kind: str) -> str:
        """Who keeps a layer's statistic: the first that reads the same tensor, but the layer itself where its tokens have weights of their own."""
        return name if kind in WEIGHTED else self.leader[name]

    def _begin(self, sequences: int) -> None:
        """A new batch enters the block."""
        if self.heard and self.sequences.start == 0:
            self.once = sorted(self.heard) == sorted(self.wanted)
        self.sequences = range(self.sequences.stop, self.sequences.stop + sequences)
        self.heard.clear()
        self.inputs.clear()
        self.fed.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hear(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._hear(name, args[0])
            self.heard.append(name)
            if self.stop and self.once and len(self.heard) == len(self.wanted):
                raise _Heard

        return hear

    def _hear(self, name: str, x: Tensor) -> None:
        _, leader = self.inputs.setdefault(id(x), (x, name))
        self.leader[name] = leader
        for kind in self.wanted[name]:
            key = self._owner(name, kind), kind
            if key not in self.fed:
                self.fed.add(key)
                self.kept.setdefault(key, STATISTICS[kind]()).add(self._rows(name, kind, x))

    def _rows(self, name: str, kind: str, x: Tensor) -> Tensor:
        """The tokens of a batch, [M, K]; each times the root of its weight where the statistic weighs them."""
        rows_MK = x.reshape(-1, x.shape[-1])
        if kind not in WEIGHTED:
            return rows_MK
        weights_M = self.weights[name][self.sequences.start : self.sequences.stop].flatten()
        return rows_MK.float() * weights_M.sqrt()[:, None]
