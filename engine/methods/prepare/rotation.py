"""Rotation: the hidden states are turned by a random Hadamard matrix, which spreads outliers over all channels (METHODS 15.9).

Everything that writes to the residual stream writes turned values, everything that reads it turns back, so the model
computes what it did. The embedding, its tied head and the final norm stay as they are: the stream is turned behind the
embedding and back before the final norm, as it runs, so that nothing is untied and nothing grows.
"""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from bitpress.engine.methods.base import MethodOptions, TurningMethod
from bitpress.engine.methods.hadamard import Rotation
from bitpress.engine.model.anatomy import WRITERS, Anatomy
from bitpress.engine.model.links import Link, links_of
from bitpress.engine.model.narrow import check_turnable, final_norm, take_gain
from bitpress.engine.model.surgery import get, linear_weight, set_linear_weight

REMEDY = "Leave the stage `rotation` out."


class RotateOptions(MethodOptions):
    """What is turned beside the residual stream."""

    heads: bool = Field(default=True, title="Turn values within heads", description="Also turn what v hands to o, within each head. Costs nothing as it runs.")
    down: bool = Field(
        default=True, title="Turn the inputs of down",
        description="Also turn what down reads, where the largest outliers are. One small product a token more as it runs.",
    )  # fmt: skip


class Rotate(TurningMethod):
    """Randomised Hadamard rotations, fused where that is possible."""

    name = "rotation"
    title = "Rotation (QuaRot)"
    family = "prepare"
    summary = "Prepares for 4-bit activations: a random rotation spreads outliers over all channels and leaves the model's outputs alone. Looks at no text."
    citation = "Ashkboos et al. 2024, QuaRot: outlier-free 4-bit inference in rotated LLMs, arXiv 2404.00456."
    cost = "Seconds; each token then costs two small products more at the ends and one in every block, in transformers' loop instead of our own."
    use_when = "Choose it with `activations: {bits: 4}`, before rounding to nearest or GPTQ; weight-only it helps GPTQ at 2 and 3 bits."
    Options = RotateOptions

    def turn(self, model: nn.Module, anatomy: Anatomy, seed: int, options: RotateOptions) -> tuple[str, ...]:
        """Turn a model of the Llama kind in place. Raises InputError for a model whose norms or blocks do not allow it."""
        links = links_of(model, anatomy)
        check_turnable(model, anatomy, links, "rotated", REMEDY)
        draw = torch.Generator().manual_seed(seed)
        stream = Rotation(anatomy.hidden, draw)
        for link in links:
            if link.kind == "norm":
                take_gain(model, link)
        for part in anatomy.linears:
            module = get(model, part.name)
            _turn_writer(module, stream) if part.role in WRITERS else _turn_reader(module, stream)
        _turn_ends(model, anatomy, stream)
        if options.heads:
            _turn_heads(model, anatomy, [link for link in links if link.kind == "v"], Rotation(anatomy.head_dim, draw))
        if options.down:
            _turn_down(model, anatomy, draw)
        return ()


def _turn_reader(module: nn.Module, rotation: Rotation) -> None:
    set_linear_weight(module, rotation(linear_weight(module).double()))


def _turn_writer(module: Any, rotation: Rotation) -> None:
    set_linear_weight(module, rotation(linear_weight(module).double().t().contiguous()).t())
    if isinstance(module.bias, Tensor):
        module.bias = nn.Parameter(rotation(module.bias.double()).to(module.bias.dtype), requires_grad=False)


def _turn_ends(model: Any, anatomy: Anatomy, rotation: Rotation) -> None:
    get(model, anatomy.embedding.name).register_forward_hook(_turning_output(rotation))
    final_norm(model, anatomy, "rotated", REMEDY).register_forward_pre_hook(_turning_input(rotation.back))


def _turning_output(turn: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda module, args, output: turn(output)


def _turning_input(turn: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda module, args: (turn(args[0]), *args[1:])


def _turn_heads(model: nn.Module, anatomy: Anatomy, links: list[Link], rotation: Rotation) -> None:
    channels = anatomy.head_dim
    for link in links:
        v: Any = get(model, link.source)
        by_channel = linear_weight(v).double().t().unflatten(1, (-1, channels))  # [K, heads, channels]
        set_linear_weight(v, rotation(by_channel.contiguous()).flatten(1).t())
        if isinstance(v.bias, Tensor):
            v.bias = nn.Parameter(rotation(v.bias.double().view(-1, channels)).flatten().to(v.bias.dtype), requires_grad=False)
        o = get(model, link.readers[0])
        set_linear_weight(o, rotation(linear_weight(o).double().unflatten(1, (-1, channels))).flatten(1))


def _turn_down(model: nn.Module, anatomy: Anatomy, draw: torch.Generator) -> None:
    rotations: dict[int, Rotation] = {}  # one for each width
    for part in anatomy.linears:
        if part.role == "down":
            rotation = rotations.setdefault(part.in_features, Rotation(part.in_features, draw))
            module = get(model, part.name)
            set_linear_weight(module, rotation(linear_weight(module).double()))
            module.register_forward_pre_hook(_turning_input(rotation))
