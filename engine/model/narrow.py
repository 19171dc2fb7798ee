"""A residual stream that is narrower inside the blocks than at the ends. Knows modules; refuses to know which directions are worth keeping.

The embedding, its tied head and the final norm keep their width: the stream is turned into fewer directions behind the embedding
and back before the final norm, as it runs. Blocks may share their directions, or have their own, and then a small matrix
turns the stream between two of them. Shapes: d the whole width, w the narrow one.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.engine.errors import InputError
from bitpress.engine.model.anatomy import WRITERS, Anatomy
from bitpress.engine.model.links import Link, gain_offset, links_of
from bitpress.engine.model.slicing import keep_inputs, keep_outputs
from bitpress.engine.model.surgery import get, linear_weight, set_linear_weight

TURNS = "bitpress_turns"  # the module beside the blocks that holds the matrices


class Turn(nn.Module):
    """A matrix [rows, columns] that the stream is multiplied by on its way from one module to another.

    Its hooks are bound methods, so that a deep copy of the model turns by the copy's matrix.
    """

    def __init__(self, rows: int, columns: int, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(like.new_zeros(rows, columns), requires_grad=False)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook: [..., columns] -> [..., rows]."""
        return nn.functional.linear(output, self.weight.to(output.dtype))

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook: the first argument, [..., columns] -> [..., rows]."""
        return (nn.functional.linear(args[0], self.weight.to(args[0].dtype)), *args[1:])

    def back(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook: the first argument, [..., rows] -> [..., columns]."""
        return (args[0] @ self.weight.to(args[0].dtype), *args[1:])


def check_turnable(model: nn.Module, anatomy: Anatomy, links: list[Link], doing: str, remedy: str) -> None:
    """Refuse what turning the stream is not exact for: means that are taken out, linears that read it without a norm, norms behind writers."""
    norms = {link.source for link in links if link.kind == "norm"}
    heard = {name for link in links if link.kind == "norm" for name in link.readers}
    readers = {part.name for part in anatomy.linears if part.role not in WRITERS}
    inside = [name for name, module in model.named_modules() if name.startswith(anatomy.block_prefix) and "Norm" in type(module).__name__]
    after = [name for name in inside if name not in norms and len(get(model, name).weight) == anatomy.hidden]  # type: ignore[arg-type]
    centred = [name for name in norms if "RMS" not in type(get(model, name)).__name__]
    for found, why in (
        (centred, "is no RMSNorm: it takes out a mean, which a rotation does not keep"),
        (sorted(readers - heard), "does not read a norm"),
        (after, "scales what a layer writes"),
    ):
        if found:
            raise InputError(f"This model cannot be {doing}.", f"{found[0]} {why}.", remedy)
    final_norm(model, anatomy, doing, remedy)


def final_norm(model: nn.Module, anatomy: Anatomy, doing: str, remedy: str) -> nn.Module:
    """The one norm behind the blocks. Raises InputError when there is none, or more."""
    final = [module for name, module in model.named_modules() if "RMSNorm" in type(module).__name__ and not name.startswith(anatomy.block_prefix)]
    if len(final) != 1:
        raise InputError(f"This model cannot be {doing}.", f"It has {len(final)} norms outside its blocks.", remedy)
    return final[0]


def take_gain(model: nn.Module, link: Link) -> None:
    """Move a norm's gain into the linears that read it."""
    norm: Any = get(model, link.source)
    gain_K = norm.weight.double() + gain_offset(norm)
    for name in link.readers:
        set_linear_weight(get(model, name), linear_weight(get(model, name)).double() * gain_K)
    norm.weight = nn.Parameter(torch.full_like(norm.weight, 1 - gain_offset(norm)), requires_grad=False)


def narrow(model: nn.Module, anatomy: Anatomy, width: int, by_block: bool) -> None:
    """Bring a whole model's blocks to a narrow stream; the matrices inside are the first rows and columns, and the turns are zero, until given.

    Raises InputError for a model that cannot be turned.
    """
    remedy = "Leave out `structure.stream` and the stage that sets it."
    links = [link for link in links_of(model, anatomy) if link.kind == "norm"]
    check_turnable(model, anatomy, links, "sliced", remedy)
    first = torch.arange(width)
    for part in anatomy.linears:
        (keep_outputs if part.role in WRITERS else keep_inputs)(get(model, part.name), first)
    for link in links:
        _narrow_norm(get(model, link.source), anatomy.hidden, width)
    _add_turns(model, anatomy, width, by_block, final_norm(model, anatomy, "sliced", remedy))


def _narrow_norm(norm: Any, whole: int, width: int) -> None:
    """The gain of one is left to the linears; what the mean is taken over is fewer, and the stream's length is not what it was over all."""
    gain = math.sqrt(whole / width) - gain_offset(norm)
    norm.weight = nn.Parameter(norm.weight.new_full((width,), gain), requires_grad=False)
    for name in ("variance_epsilon", "eps"):
        if isinstance(getattr(norm, name, None), float):
            setattr(norm, name, getattr(norm, name) * whole / width)


def _add_turns(model: Any, anatomy: Anatomy, width: int, by_block: bool, final: nn.Module) -> None:
    embedding: Any = get(model, anatomy.embedding.name)
    like = next(model.parameters())
    enter = Turn(width, anatomy.hidden, like)
    turns = nn.ModuleDict({"enter": enter})
    embedding.register_forward_hook(enter.after)
    leave = enter
    if by_block:
        blocks = list(get(model, anatomy.block_prefix).children())
        for number, block in enumerate(blocks[1:], start=1):
            turns[str(number)] = Turn(width, width, like)
            block.register_forward_pre_hook(turns[str(number)].before)  # type: ignore[arg-type]
        leave = turns["leave"] = Turn(width, anatomy.hidden, like)
    final.register_forward_pre_hook(leave.back)
    setattr(model, TURNS, turns)
