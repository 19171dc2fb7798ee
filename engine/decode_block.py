"""One block of a Llama-like model as decoding runs it: matrices joined where they can be, norms, the gate. Knows modules; no cache and no positions."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bitpress.kernels import cpu_step
from bitpress.kernels.cpu_token import BlockParts
from bitpress.kernels.rows import join

SILU = ("silu", "swish")


class Block:
    """One block's parts, fused where they can be."""

    def __init__(self, block: Any, activation: str, dtype: torch.dtype) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.qkv = join([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
        self.out = join([attention.o_proj], dtype)
        self.gate_up = join([mlp.gate_proj, mlp.up_proj], dtype)
        self.down = join([mlp.down_proj], dtype)
        self.activation = F.silu if activation in SILU else mlp.act_fn
        self.attention_norm, self.mlp_norm = Norm(block.input_layernorm, dtype), Norm(block.post_attention_layernorm, dtype)
        self.head_norms = [Norm(norm, dtype) for norm in (attention.q_norm, attention.k_norm)] if hasattr(attention, "q_norm") else []
        self.heads, self.kv_heads = (linear.out_features // attention.head_dim for linear in (attention.q_proj, attention.k_proj))
        self.neurons = mlp.down_proj.in_features
        self.key_head_of: Tensor | None = getattr(attention, "key_head_of", None)  # where groups of query heads are of unlike size

    def normed_heads(self, qkv_THC: Tensor) -> Tensor:
        """Queries and keys normed head by head, where the model does that."""
        if not self.head_norms:
            return qkv_THC
        parts = qkv_THC.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        return torch.cat((*(norm(part) for norm, part in zip(self.head_norms, parts[:2], strict=True)), parts[2]), dim=1)

    def gated(self, gate_up: Tensor) -> Tensor:
        """[T, 2 F] to [T, F]: one half opens the other."""
        gate, up = gate_up.chunk(2, dim=-1)
        if self.activation is F.silu and cpu_step.takes(gate, up):
            return cpu_step.gated_silu(gate, up)
        return self.activation(gate) * up

    @property
    def parts(self) -> BlockParts:
        """What a step in C++ needs of it."""
        norms = (self.attention_norm.weight_D, self.attention_norm.epsilon), (self.mlp_norm.weight_D, self.mlp_norm.epsilon)
        return BlockParts(norms, (self.qkv, self.out, self.gate_up, self.down))


class Norm:
    """RMSNorm over the last axis, summed in float32.

    torch has no fused one for CPUs, but a fused LayerNorm: [x, -x] has mean 0 and the variance that RMSNorm divides by.
    """

    def __init__(self, norm: Any, dtype: torch.dtype) -> None:
        self.weight_D, self.epsilon, self.width = norm.weight.detach().to(dtype), norm.variance_epsilon, len(norm.weight)
        self.doubled = torch.cat((self.weight_D, self.weight_D))

    def __call__(self, x: Tensor) -> Tensor:
        if cpu_step.takes(x, self.weight_D):
            return cpu_step.rms_norm(x, self.weight_D, self.epsilon)
        if x.device.type != "cpu" or x.dtype != self.doubled.dtype:
            return F.rms_norm(x, (self.width,), self.weight_D.to(x.dtype), self.epsilon)
        return torch.layer_norm(torch.cat((x, -x), -1), (2 * self.width,), self.doubled, None, self.epsilon)[..., : self.width]
