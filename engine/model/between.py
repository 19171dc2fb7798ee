"""Lets models do what lies between their products, norms and gates, by the project's own kernels. Knows modules; refuses to know methods.

Torch takes several passes over the states for each, which is a tenth of a block's time on a CPU. A kind of module gets the kernel only
when it answers a probe as the kernel does; its class is then one of ours on top of its own, which steps aside for other types, other
devices and gradients.
"""

import copy
import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from bitpress.kernels import cpu_step

PROBE_ROWS = 16
ALIKE = 0.98  # the share of a probe's answers that must be the same to the bit; sums in another order flip some roundings
GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


def use_own(model: nn.Module) -> None:
    """Give every RMSNorm and every MLP gated by SiLU the kernel, where its kind reproduces it; nothing happens where there is no kernel."""
    if not cpu_step.available():
        return
    same: dict[tuple[type, type], bool] = {}
    for module in list(model.modules()):
        own = _own_of(module)
        if own is None:
            continue
        kind = type(module), type(getattr(module, "act_fn", None))
        if kind not in same:
            same[kind] = own.reproduces(module)
        if same[kind]:
            cast(Any, module).__class__ = _joined(cast(Any, own), cast(Any, kind[0]))  # a class of modules does not look hashable to a type checker


class OwnNorm(nn.Module):
    """In front of a norm's own class: its answer by one call."""

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Any:
        """As the class behind this one."""
        weight = cast(Tensor, self.weight)
        if more or named or x.shape[-1] != len(weight) or not cpu_step.takes(x, weight):
            return super().forward(x, *more, **named)
        return cpu_step.rms_norm(x, weight, _epsilon(self), rounded=True)

    @staticmethod
    @torch.no_grad()
    def reproduces(norm: nn.Module) -> bool:
        """Whether a norm answers as the kernel does."""
        twin = copy.deepcopy(norm).to("cpu", torch.bfloat16)
        weight = cast(Tensor, twin.weight)
        x = 3 * _drawn(len(weight))
        return _alike(twin(x), cpu_step.rms_norm(x, weight, _epsilon(norm), rounded=True))


class OwnGate(nn.Module):
    """In front of a gated MLP's own class."""

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Any:
        """As the class behind this one."""
        if more or named or x.dtype != torch.bfloat16 or x.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(x, *more, **named)
        mlp = cast(Any, self)
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        same = gate.shape == up.shape and cpu_step.takes(gate, up)
        return mlp.down_proj(cpu_step.gated_silu(gate, up, rounded=True) if same else mlp.act_fn(gate) * up)

    @staticmethod
    @torch.no_grad()
    def reproduces(mlp: nn.Module) -> bool:
        """Whether an MLP does with what its matrices give what the kernel does."""
        gate, up = 3 * _drawn(64), _drawn(64)
        bare = copy.copy(mlp)
        bare._modules = {**mlp._modules, "gate_proj": _Gives(gate), "up_proj": _Gives(up), "down_proj": nn.Identity()}
        return _alike(bare(gate), cpu_step.gated_silu(gate, up, rounded=True))


class _Gives(nn.Module):
    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, _: Tensor) -> Tensor:
        return self.answer


def _own_of(module: nn.Module) -> type[OwnNorm | OwnGate] | None:
    if isinstance(module, OwnNorm | OwnGate):
        return None
    if all(hasattr(module, name) for name in GATED):
        return OwnGate
    weight = getattr(module, "weight", None)
    is_norm = type(module).__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and weight.ndim == 1
    return OwnNorm if is_norm and hasattr(module, "variance_epsilon") else None


@functools.cache
def _joined(own: type, kind: type) -> type:
    """One of ours on top of a module's class, under that one's name."""
    return type(kind.__name__, (own, kind), {})


def _epsilon(norm: nn.Module) -> float:
    return float(cast(Any, norm).variance_epsilon)


def _drawn(width: int) -> Tensor:
    return torch.randn(PROBE_ROWS, width, generator=torch.Generator().manual_seed(0)).bfloat16()


def _alike(found: Any, own: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != own.shape:
        return False
    return bool((found == own).double().mean() >= ALIKE) and torch.allclose(found, own, rtol=2**-6, atol=0)
