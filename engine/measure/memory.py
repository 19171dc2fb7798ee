"""Bytes of a model that really lies in memory, and the peak of the process. Knows tensors and modules; no recipe.

Stored bytes are those of the canonical format on disk; resident bytes are those of the tensors as they lie in memory,
which a kernel may want laid out otherwise. A test holds the stored ones against `engine.accounting`.
"""

import math
import resource
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bitpress.kernels.packed import PackedEmbedding, PackedLinear

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Weights:
    """Bytes and counts of a model's weights; a matrix that two modules share counts once.

    linear_*: matrices inside the blocks, biases and norms not among them.
    """

    stored_bytes: int
    resident_bytes: int
    params: int
    linear_bytes: int
    linear_params: int

    @property
    def bits_per_weight_linears(self) -> float:
        """Stored bits of the block linears over their weights, scales and zeros counted."""
        return 8 * self.linear_bytes / self.linear_params

    @property
    def bits_per_weight_model(self) -> float:
        """Stored bits of the whole model over the weights it has."""
        return 8 * self.stored_bytes / self.params


def weights_of(model: nn.Module, block_prefix: str, itemsize: int) -> Weights:
    """Count a model's weights.

    block_prefix: name of the list of blocks, such as `model.layers`. itemsize: stored bytes of a dense number, which is
    that of the model's file and not of the type it is computed in.
    """
    packed, dense = _packed(model), _dense(model)
    linears = _linears(model, block_prefix)
    return Weights(
        stored_bytes=sum(layer.stored_bytes for _, layer in packed) + itemsize * sum(weight.numel() for _, weight in dense),
        resident_bytes=sum(layer.resident_bytes for _, layer in packed) + sum(weight.nbytes for _, weight in dense),
        params=sum(_numel(layer) for _, layer in packed) + sum(weight.numel() for _, weight in dense),
        linear_bytes=sum(layer.stored_bytes if isinstance(layer, PackedLinear) else itemsize * layer.numel() for layer in linears),
        linear_params=sum(_numel(layer) for layer in linears),
    )


def kernels_of(model: nn.Module, block_prefix: str) -> dict[str, int]:
    """How many of the block linears each kernel multiplies in decoding; `dense` for those that are not packed."""
    return dict(Counter(layer.kernel if isinstance(layer, PackedLinear) else "dense" for layer in _linears(model, block_prefix)))


def _linears(model: nn.Module, block_prefix: str) -> list[PackedLinear | torch.Tensor]:
    """Packed layers and dense matrices inside the blocks. Norms and biases are no matrices; an embedding is not in a block."""
    inside = f"{block_prefix}."
    packed = [layer for name, layer in _packed(model) if name.startswith(inside) and isinstance(layer, PackedLinear)]
    return [*packed, *(weight for name, weight in _dense(model) if name.startswith(inside) and weight.ndim == 2)]


def _packed(model: nn.Module) -> list[tuple[str, PackedLinear | PackedEmbedding]]:
    """Packed modules by name; of those that share their codes (an embedding and its tied head) the first."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear | PackedEmbedding)]
    return list({_first(module).data_ptr(): (name, module) for name, module in reversed(found)}.values())


def _first(module: PackedLinear | PackedEmbedding) -> torch.Tensor:
    return next(iter(module.packed.tensors.values()))


def _dense(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """What is stored as plain numbers, the biases of packed layers included. A shared one once."""
    return list({tensor.data_ptr(): (name, tensor) for name, tensor in model.named_parameters()}.values())


def _numel(layer: PackedLinear | PackedEmbedding | torch.Tensor) -> int:
    return math.prod(layer.shape)


def reset_peak() -> bool:
    """Start a new peak; False where the system cannot forget the old one, so that the peak is that of the whole process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    """Most memory taken since `reset_peak`: of the process on a CPU (weights, activations, Python and torch), of the device on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        lines = (line.split() for line in STATUS.read_text().splitlines())
        return next(int(words[1]) * 1024 for words in lines if words and words[0] == "VmHWM:")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
