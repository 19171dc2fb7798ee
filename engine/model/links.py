"""Which module hands its output straight to which linears, and how a factor moves from one side to the other. Knows modules and names; refuses to know why.

A link is a norm and the linears that read it, `up` and `down` of a gated MLP, or `v` and `o`: dividing what the source
puts out by a scale and multiplying the readers' columns by it leaves what the model computes as it is. Shapes: N
outputs, K inputs of a reader.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitpress.engine.model.anatomy import Anatomy, Part
from bitpress.engine.model.surgery import get, linear_weight, set_linear_weight

Kind = Literal["norm", "v", "up"]
PROBE_TOKENS = 8


@dataclass(frozen=True)
class Link:
    """A source and the linears that read it, by name. block: its number."""

    kind: Kind
    block: int
    source: str
    readers: tuple[str, ...]

    @property
    def key(self) -> str:
        """A name for what belongs to this link; no other link has the same first reader."""
        return self.readers[0]


@torch.no_grad()
def links_of(model: nn.Module, anatomy: Anatomy) -> list[Link]:
    """Every link of a model, block by block in the order in which they run.

    A norm is found by what it hands over: its very output tensor is the input of the linears. A norm that a linear outside
    the anatomy reads too (a router) is left out.
    """
    heard = _listen(model, anatomy)
    links = []
    for block in range(anatomy.blocks):
        parts = list(anatomy.of_block(block))
        links += [Link("norm", block, norm, tuple(readers)) for norm, readers in heard.items() if readers[0] in {part.name for part in parts}]
        links += _inner_links(parts, anatomy)
    return links


def _listen(model: nn.Module, anatomy: Anatomy) -> dict[str, list[str]]:
    """Norms of the blocks -> the linears that are given their output, in the order in which they run."""
    made: dict[int, tuple[str, Any]] = {}  # id of an output -> its norm and the tensor itself, held so that the id stays its own
    readers: dict[str, list[str]] = {}
    handles = []
    for name, module in model.named_modules():
        if not name.startswith(anatomy.block_prefix):
            continue
        if isinstance(module, nn.Linear | Conv1D):
            handles.append(module.register_forward_pre_hook(_reading(name, made, readers)))
        elif "Norm" in type(module).__name__:
            handles.append(module.register_forward_hook(_making(name, made)))
    try:
        model(input_ids=torch.arange(1, PROBE_TOKENS + 1, device=next(model.parameters()).device)[None] % anatomy.vocab, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    known = {part.name for part in anatomy.linears}
    return {norm: names for norm, names in readers.items() if known.issuperset(names)}


def _making(name: str, made: dict[int, tuple[str, Any]]) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        made[id(output)] = (name, output)

    return note


def _reading(name: str, made: dict[int, tuple[str, Any]], readers: dict[str, list[str]]) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and id(args[0]) in made:
            readers.setdefault(made[id(args[0])][0], []).append(name)

    return note


def _inner_links(parts: list[Part], anatomy: Anatomy) -> list[Link]:
    roles = [part.role for part in parts]
    by_role = {part.role: part for part in parts if roles.count(part.role) == 1}
    links = []
    if {"v", "o"} <= by_role.keys():
        v, o = by_role["v"], by_role["o"]
        if v.out_features == anatomy.kv_heads * anatomy.head_dim and o.in_features == anatomy.heads * anatomy.head_dim:
            links.append(Link("v", v.block or 0, v.name, (o.name,)))
    if {"gate", "up", "down"} <= by_role.keys():
        up, down = by_role["up"], by_role["down"]
        links.append(Link("up", up.block or 0, up.name, (down.name,)))
    return links


def tie_heads(values_K: Tensor, anatomy: Anatomy) -> Tensor:
    """Values of `o`'s inputs made equal over the query heads that share a value head: their mean. values_K: [heads * channels]."""
    shared = values_K.view(anatomy.kv_heads, -1, anatomy.head_dim)
    return shared.mean(1, keepdim=True).expand_as(shared).reshape(-1)


def fold(model: nn.Module, anatomy: Anatomy, link: Link, scale_K: Tensor) -> None:
    """Multiply the readers' columns by a scale and divide the source's output by it. The parameters are new; a twin keeps its own."""
    scale_K = scale_K.double()
    for name in link.readers:
        module = get(model, name)
        set_linear_weight(module, linear_weight(module).double() * scale_K)
    source = get(model, link.source)
    if link.kind == "norm":
        _divide_norm(source, scale_K)
        return
    rows_N = scale_K.view(anatomy.kv_heads, -1, anatomy.head_dim)[:, 0].reshape(-1) if link.kind == "v" else scale_K
    set_linear_weight(source, linear_weight(source).double() / rows_N[:, None])
    _set(source, "bias", lambda bias_N: bias_N / rows_N)


def _divide_norm(norm: Any, scale_K: Tensor) -> None:
    offset = gain_offset(norm)
    _set(norm, "weight", lambda weight_K: (weight_K + offset) / scale_K - offset)
    _set(norm, "bias", lambda bias_K: bias_K / scale_K)


def gain_offset(norm: nn.Module) -> float:
    """What a norm adds to its weight to get its gain: 1 in Gemma's, 0 in others."""
    return 1.0 if type(norm).__name__.startswith("Gemma") else 0.0


def _set(module: Any, name: str, change: Any) -> None:
    """Give a module a changed copy of a 1-D parameter, where it has one."""
    old = getattr(module, name, None)
    if isinstance(old, Tensor):
        setattr(module, name, nn.Parameter(change(old.double()).to(old.dtype), requires_grad=False))
