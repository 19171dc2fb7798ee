"""Lets models do what lies between their products - norms, turns, gates - by the project's own kernels. Knows modules; refuses to know methods.

Attention itself is `attention.py`'s. Torch takes several passes over the states for each, which is a tenth of a block's time on a CPU. A
kind of module gets the kernel only when it answers a probe as the kernel does; its class is then one of ours on top of its own, which steps
aside for other types, other devices and gradients.
"""

import copy
import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from bitpress.engine.model import attention
from bitpress.kernels import cpu_step

PROBE_ROWS = 16
PROBE_LENGTH = 32  # positions of an attention's probe: as many as its kernel begins with
ALIKE = 0.98  # the share of a probe's answers that must be the same to the bit; sums in another order flip some roundings
GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
ATTENDING = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "config")
SAID = frozenset({"position_ids", "use_cache", "cache_position", "output_attentions"})  # to an attention, without meaning where there is no cache
Turning = tuple[Tensor, Tensor]


def use_own(model: nn.Module) -> None:
    """Give every RMSNorm, MLP gated by SiLU and attention that turns its heads the kernel, where its kind reproduces it.

    Nothing happens where there is no kernel. Comes behind `attention.use_own`.
    """
    if not cpu_step.available():
        return
    same: dict[tuple[type, type], bool] = {}
    for module in list(model.modules()):
        own = _own_of(module)
        if own is None:
            continue
        kind = type(module), type(getattr(module, "act_fn", None))
        if kind not in same:
            same[kind] = _reproduces(own, module)
        if same[kind]:
            cast(Any, module).__class__ = _joined(cast(Any, own), cast(Any, kind[0]))  # a class of modules does not look hashable to a type checker


def _reproduces(own: "type[OwnNorm | OwnGate | OwnAttention]", module: nn.Module) -> bool:
    try:
        return own.reproduces(module)
    except Exception:  # a family's own module may fail a made-up call in any way: then it is left as it is
        return False


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


class OwnAttention(nn.Module):
    """In front of an attention's own class: both turns by one call each, on heads that lie as the projections leave them."""

    def forward(
        self, hidden_states: Tensor, position_embeddings: Turning | None = None, attention_mask: Tensor | None = None, past_key_values: Any = None, **named: Any
    ) -> Any:
        """As the class behind this one."""
        x, me = hidden_states, cast(Any, self)
        if attention_mask is not None or past_key_values is not None or not named.keys() <= SAID or not _turns(me, x, position_embeddings):
            return super().forward(x, position_embeddings=position_embeddings, attention_mask=attention_mask, past_key_values=past_key_values, **named)
        heads = [side(x).unflatten(-1, (-1, me.head_dim)) for side in (me.q_proj, me.k_proj, me.v_proj)]
        cos_TC, sin_TC = (table[0] for table in cast(Turning, position_embeddings))
        query, key = (cpu_step.turn_rounded(side, cos_TC, sin_TC).transpose(1, 2) for side in heads[:2])
        mixed, shares = attention.attend(self, query, key, heads[2].transpose(1, 2), None, scaling=me.scaling)
        return me.o_proj(mixed.flatten(2)), shares

    @staticmethod
    @torch.no_grad()
    def reproduces(attending: nn.Module) -> bool:
        """Whether an attention does with what its matrices give what this one does."""
        me = cast(Any, attending)
        sides = [_drawn(width, PROBE_LENGTH)[None] for width in (4 * me.head_dim, 2 * me.head_dim, 2 * me.head_dim)]
        angles = _drawn(me.head_dim, PROBE_LENGTH).float()
        turning = angles.cos().bfloat16()[None], angles.sin().bfloat16()[None]
        answers = []
        for kind in (type(attending), _joined(cast(Any, OwnAttention), cast(Any, type(attending)))):
            bare = copy.copy(attending)
            given = dict(zip(ATTENDING, [_Gives(side) for side in sides], strict=False))
            bare._modules = {**attending._modules, **given, "o_proj": nn.Identity()}
            cast(Any, bare).__class__, bare.num_key_value_groups = kind, cast(Any, 2)
            answers.append(bare(hidden_states=sides[0], position_embeddings=turning, attention_mask=None)[0])
        return _alike(*answers)


def _turns(attending: Any, x: Tensor, turning: Turning | None) -> bool:
    """Whether the short way is for this attention, these states and these tables."""
    if turning is None or x.dtype != torch.bfloat16 or x.device.type != "cpu" or torch.is_grad_enabled() or hasattr(attending, "key_head_of"):
        return False
    fits = all(table.shape == (1, x.shape[1], attending.head_dim) and table.is_contiguous() and table.dtype == x.dtype for table in turning)
    return fits and attending.head_dim % 2 == 0 and attending.config._attn_implementation == attention.NAME


class _Gives(nn.Module):
    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, _: Tensor) -> Tensor:
        return self.answer


def _own_of(module: nn.Module) -> type[OwnNorm | OwnGate | OwnAttention] | None:
    if isinstance(module, OwnNorm | OwnGate | OwnAttention):
        return None
    if all(hasattr(module, name) for name in ATTENDING):
        return OwnAttention if cast(Any, module).config._attn_implementation == attention.NAME else None
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


def _drawn(width: int, rows: int = PROBE_ROWS) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).bfloat16()


def _alike(found: Any, own: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != own.shape:
        return False
    return bool((found == own).double().mean() >= ALIKE) and torch.allclose(found, own, rtol=2**-6, atol=0)
