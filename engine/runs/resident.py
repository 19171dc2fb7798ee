"""Models at hand: one dense model, and the compressed models that finished runs made of it, the longest unused dropped first."""

import os
from collections import OrderedDict

import torch
from torch import nn

from bitpress.engine.compress import load_compressed
from bitpress.engine.errors import InputError
from bitpress.engine.model import library, load
from bitpress.engine.runs import machine
from bitpress.engine.runs.store import Run, Store
from bitpress.kernels.packed import PackedEmbedding, PackedLinear

DENSE = "dense"


def compute_in(dtype: torch.dtype, *models: nn.Module) -> None:
    """Cast the weights of models, twins among them, to the type to compute in; buffers such as rotary tables keep theirs.

    Twins share their parameters: a shared one is cast once for all, so no memory is spent twice.
    """
    for model in models:
        for weight in model.parameters():
            if weight.is_floating_point():
                weight.data = weight.data.to(dtype)
        for module in model.modules():
            if isinstance(module, PackedEmbedding):
                module.dtype = dtype


def memory_limit() -> int:
    """Bytes that compressed models may take beside the dense one: `BITPRESS_DESK_BYTES`, else half of what is free."""
    return int(os.environ.get("BITPRESS_DESK_BYTES", machine.memory_available() // 2))


class Resident:
    """The sides of one model: `dense`, or the id of a finished compress run of it."""

    def __init__(self, model_id: str, limit: int | None = None) -> None:
        self.entry = library.find(model_id)
        self.loaded = load.load(model_id)
        self.limit = memory_limit() if limit is None else limit
        self._made: OrderedDict[str, nn.Module] = OrderedDict()

    def side(self, name: str) -> nn.Module:
        """The model of a side, loaded now if it is not at hand. Raises InputError for a run that is of another model or not finished."""
        if name == DENSE:
            return self.loaded.model
        if name not in self._made:
            self._made[name] = load_compressed(self._folder(name).path, self.loaded)
        self._made.move_to_end(name)
        self._make_room()
        return self._made[name]

    def sides(self) -> list[str]:
        """What is at hand, the longest unused first."""
        return [DENSE, *self._made]

    def _folder(self, name: str) -> Run:
        run = Store().get(name)
        status = run.status()
        if status.model != self.entry.id:
            raise InputError(f"The run {run.id} is of {status.model}.", f"This desk holds {self.entry.id}.", "Open a desk of its model.")
        if status.kind != "compress" or status.state != "finished":
            raise InputError(f"The run {run.id} holds no compressed model.", f"It is a run of kind {status.kind}, {status.state}.", "Choose a finished one.")
        return run

    def _make_room(self) -> None:
        """Drop the longest unused until the rest fits; the one just asked for stays."""
        while len(self._made) > 1 and sum(self._own_bytes(model) for model in self._made.values()) > self.limit:
            self._made.popitem(last=False)

    def _own_bytes(self, model: nn.Module) -> int:
        """Bytes that the dense model does not hold already."""
        shared = {weight.data_ptr() for weight in self.loaded.model.parameters()}
        packed = sum(module.resident_bytes for module in model.modules() if isinstance(module, PackedLinear | PackedEmbedding))
        return packed + sum(weight.nbytes for weight in model.parameters() if weight.data_ptr() not in shared)
