"""Take heads and neurons out of a model for good: the tensors get smaller, and the config says how many are left. Knows modules; refuses to know why.

A model whose blocks all keep the same counts gets an ordinary config and loads in transformers as it is saved. Where counts differ,
`config.bitpress_units` holds (heads, key-value heads, neurons) a block, and only Bitpress rebuilds it.
"""

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from bitpress.engine.errors import InputError
from bitpress.engine.model.anatomy import Anatomy, Units
from bitpress.engine.model.surgery import get, linear_weight

UNEVEN = "bitpress_uneven"  # attention of query heads that share key heads in groups of unlike size
COUNTS = {"num_heads": "heads", "num_attention_heads": "heads", "num_key_value_heads": "kv_heads"}


def keep_heads(model: nn.Module, anatomy: Anatomy, block: int, heads: Sequence[int]) -> None:
    """Keep these query heads of a block, and the key-value heads that one of them reads. Anatomy: of the model as it is, whole blocks.

    Raises InputError for a model whose attention is fused, or when no head would stay.
    """
    parts = {part.role: part.name for part in anatomy.of_block(block)}
    if not {"q", "k", "v", "o"} <= set(parts) or not heads:
        why = "Its attention matrices are fused." if heads else "No head would stay."
        raise InputError(f"The heads of block {block} cannot be removed.", why, "Remove neurons or blocks instead.")
    sharing = key_head_of(anatomy, block, model)
    read = [sharing[head] for head in heads]
    groups = sorted(set(read))
    queries, keys = _channels(heads, anatomy.head_dim), _channels(groups, anatomy.head_dim)
    for role, rows in (("q", queries), ("k", keys), ("v", keys)):
        keep_outputs(get(model, parts[role]), rows)
    keep_inputs(get(model, parts["o"]), queries)
    attention = get(model, parts["q"].rpartition(".")[0])
    _tell(attention, [groups.index(group) for group in read], len(groups))


def keep_neurons(model: nn.Module, anatomy: Anatomy, block: int, neurons: Sequence[int]) -> None:
    """Keep these MLP neurons of a block. Raises InputError for a model without an MLP, or when no neuron would stay."""
    parts = {part.role: part.name for part in anatomy.of_block(block)}
    last = parts.get("down") or parts.get("fc2")
    if last is None or not neurons:
        why = "It has no MLP." if neurons else "No neuron would stay."
        raise InputError(f"The neurons of block {block} cannot be removed.", why, "Leave at least one, or drop the block.")
    kept = torch.tensor(list(neurons))
    for role in ("gate", "up", "fc1"):
        if role in parts:
            keep_outputs(get(model, parts[role]), kept)
    if "gate_up" in parts:
        half = anatomy.units_of(block).neurons
        keep_outputs(get(model, parts["gate_up"]), torch.cat((kept, half + kept)))
    keep_inputs(get(model, last), kept)


def key_head_of(anatomy: Anatomy, block: int, model: nn.Module | None = None) -> list[int]:
    """For every query head of a block the key-value head that it reads."""
    units = anatomy.units_of(block)
    if model is not None:
        name = next(part.name for part in anatomy.of_block(block) if part.role == "q")
        uneven = getattr(get(model, name.rpartition(".")[0]), "key_head_of", None)
        if isinstance(uneven, Tensor):
            return uneven.tolist()
    return [head * units.kv_heads // units.heads for head in range(units.heads)]


def keep_outputs(module: nn.Module, rows: Tensor) -> None:
    """Keep these outputs of a linear, and of its bias. A twin that shares the old weight keeps the old one."""
    weight_NK, linear = linear_weight(module), _linear(module)
    _put(linear, weight_NK[rows.to(weight_NK.device)])
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[rows.to(linear.bias.device)].clone(), requires_grad=False)


def keep_inputs(module: nn.Module, columns: Tensor) -> None:
    """Keep these inputs of a linear."""
    weight_NK = linear_weight(module)
    _put(_linear(module), weight_NK[:, columns.to(weight_NK.device)])


def describe_units(model: nn.Module, units: Sequence[Units]) -> None:
    """Write what every block has into the config: plainly where all are alike, else block by block."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    fixed_size = getattr(config, "head_dim", None) is None  # such a config gives a head hidden_size / heads channels
    if len(set(units)) > 1 or (fixed_size and units[0].heads != config.num_attention_heads):
        config.bitpress_units = [list(counts) for counts in units]
        return
    changes = {"num_attention_heads": units[0].heads, "num_key_value_heads": units[0].kv_heads}
    changes |= dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), units[0].neurons)
    for name, value in changes.items():
        if hasattr(config, name):
            setattr(config, name, value)


def _channels(heads: Sequence[int], size: int) -> Tensor:
    return (torch.tensor(list(heads))[:, None] * size + torch.arange(size)).flatten()


def _linear(module: nn.Module) -> Any:
    assert isinstance(module, nn.Linear | Conv1D)
    return module


def _put(module: Any, weight_NK: Tensor) -> None:
    rows, columns = weight_NK.shape
    stored = weight_NK.t() if isinstance(module, Conv1D) else weight_NK
    module.weight = nn.Parameter(stored.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
    if isinstance(module, Conv1D):
        module.nx, module.nf = columns, rows
    else:
        module.in_features, module.out_features = columns, rows


def _tell(attention: nn.Module, sharing: list[int], groups: int) -> None:
    """Tell an attention module how many heads it has and which key head each of them reads."""
    counts = {"heads": len(sharing), "kv_heads": groups}
    for name, kind in COUNTS.items():
        if isinstance(getattr(attention, name, None), int):
            setattr(attention, name, counts[kind])
    even = sharing == [head * groups // len(sharing) for head in range(len(sharing))] and len(sharing) % groups == 0
    attention.num_key_value_groups = len(sharing) // groups if even else 1  # type: ignore[assignment]
    if even:
        if hasattr(attention, "key_head_of"):
            del attention.key_head_of
        return
    own: Any = attention
    own.register_buffer("key_head_of", torch.tensor(sharing), persistent=False)
    if own.config._attn_implementation != UNEVEN:
        own.even_attention = own.config._attn_implementation
        own.config = copy.copy(own.config)
        own.config._attn_implementation = UNEVEN


def _uneven_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any) -> Any:
    """The attention that the model had, on keys and values repeated for every query head of their group."""
    index = module.key_head_of.to(key.device)
    inner = ALL_ATTENTION_FUNCTIONS.get(module.even_attention) or sys.modules[type(module).__module__].eager_attention_forward
    return inner(module, query, key.index_select(1, index), value.index_select(1, index), mask, **more)


ALL_ATTENTION_FUNCTIONS.register(UNEVEN, _uneven_attention)
