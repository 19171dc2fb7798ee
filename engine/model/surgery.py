"""Read and change single parts of a model: one module, one matrix, whole blocks. Knows modules; refuses to know why.

Weights leave and enter as [N, K] (outputs, inputs), whichever way round the module stores them.
"""

import copy
from itertools import chain
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitpress.engine.errors import InputError
from bitpress.engine.model.anatomy import Anatomy
from bitpress.kernels.packed import PackedLinear


def get(model: nn.Module, name: str) -> nn.Module:
    """The module of that name. Raises InputError when there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise InputError(f"The model has no layer '{name}'.", "", "The model card lists the layers.") from None


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the module of that name was. What was done to the old one's inputs and outputs (a rotation) is done to the new one's."""
    old = get(model, name)
    module._forward_pre_hooks.update(old._forward_pre_hooks)
    module._forward_hooks.update(old._forward_hooks)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a linear as [N, K]: a view of the stored tensor. Raises TypeError for any other module."""
    weight = _weight(module)
    return weight.t() if isinstance(module, Conv1D) else weight


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of a linear, None where it has none."""
    return module.bias if isinstance(module.bias, Tensor) else None


def set_linear_weight(module: nn.Module, weight_NK: Tensor) -> None:
    """Give a linear a new weight in its own type and place. A twin that shares the old one keeps the old one."""
    old = _weight(module)
    stored = weight_NK.t() if isinstance(module, Conv1D) else weight_NK
    if stored.shape != old.shape:
        raise ValueError(f"a weight of shape {tuple(weight_NK.shape)} does not fit a module that stores {tuple(old.shape)}")
    module.weight = nn.Parameter(stored.to(device=old.device, dtype=old.dtype, copy=True).contiguous(), requires_grad=False)


def _weight(module: nn.Module) -> Tensor:
    if not isinstance(module, nn.Linear | Conv1D):
        raise TypeError(f"{type(module).__name__} is no linear")
    return module.weight


def twin(model: nn.Module) -> nn.Module:
    """A second model over the very same parameters and buffers: parts of one can be replaced without touching the other."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo=shared)


def unpack(model: nn.Module) -> None:
    """Put an ordinary float32 linear in the place of every packed one."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            replace(model, name, _dense(module))


def _dense(packed: PackedLinear) -> nn.Linear:
    rows, columns = packed.packed.shape
    linear = nn.utils.skip_init(nn.Linear, columns, rows, bias=False)
    linear.weight = nn.Parameter(packed.dequantize(), requires_grad=False)
    linear.bias = nn.Parameter(packed.bias.detach().float(), requires_grad=False) if isinstance(packed.bias, Tensor) else None
    return linear


def drop_blocks(model: nn.Module, anatomy: Anatomy, blocks: list[int]) -> dict[int, int]:
    """Take blocks out and number the rest anew; returns {old number: new number} of those that stay.

    The attention's `layer_idx` (its slot in the KV cache) and every entry of the config that speaks of single blocks follow.
    Raises InputError for a block that is not there or when none would stay.
    """
    gone = set(blocks)
    kept = [index for index in range(anatomy.blocks) if index not in gone]
    if not kept or not gone <= set(range(anatomy.blocks)):
        why = f"The model has blocks 0 to {anatomy.blocks - 1}."
        raise InputError(f"Blocks {sorted(gone)} cannot be dropped.", why, "Name blocks that are there and leave at least one.")
    old = get(model, anatomy.block_prefix)
    assert isinstance(old, nn.ModuleList)
    replace(model, anatomy.block_prefix, nn.ModuleList(old[index] for index in kept))
    for new, index in enumerate(kept):
        _renumber(old[index], new)
    if (config := getattr(model, "config", None)) is not None:
        _shorten(config.get_text_config(), anatomy.blocks, kept)
    return {index: new for new, index in enumerate(kept)}


def _renumber(block: nn.Module, index: int) -> None:
    for module in block.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx = index  # type: ignore[assignment]


def _shorten(config: Any, blocks: int, kept: list[int]) -> None:
    """Lists with one entry a block (`layer_types` and its like) lose the dropped ones; the count follows."""
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == blocks:
            setattr(config, key, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)
