"""The fused pieces of a decoding step against a line or two of torch in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitpress.kernels import cpu_build, cpu_step

pytestmark = pytest.mark.skipif(cpu_build.library() is None, reason=f"no compiled library: {cpu_build.why_not()}")
ROUNDING = 2**-7  # of bfloat16, relative


def near(found: Tensor, wanted: Tensor) -> bool:
    return bool(((found.double() - wanted).norm() / wanted.norm()) < ROUNDING)


@pytest.mark.parametrize("width", [8, 192, 576])
def test_rms_norm(width: int) -> None:
    x, weight = torch.randn(1, width).bfloat16(), torch.rand(width).bfloat16()
    wanted = F.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    assert near(cpu_step.rms_norm(x, weight, 1e-5), wanted)


def test_gated_silu() -> None:
    gate_up = torch.randn(1, 2 * 96).bfloat16()
    gate, up = gate_up.double().chunk(2, -1)
    assert near(cpu_step.gated_silu(gate_up), F.silu(gate) * up)


def turned(x_HC: Tensor, cos_C: Tensor, sin_C: Tensor) -> Tensor:
    return x_HC * cos_C + x_HC.roll(x_HC.shape[-1] // 2, -1) * sin_C


@pytest.mark.parametrize(("heads", "kv_heads", "channels"), [(9, 3, 64), (3, 3, 64), (4, 1, 16), (6, 1, 20), (8, 2, 80)])
@pytest.mark.parametrize("position", [0, 5, 2000])
def test_attention_of_one_token(heads: int, kv_heads: int, channels: int, position: int) -> None:
    torch.manual_seed(position)
    cache = torch.randn(2 * kv_heads, position + 3, channels).bfloat16()
    before = cache.clone()
    qkv = torch.randn(1, (heads + 2 * kv_heads) * channels).bfloat16()
    cos, sin = torch.randn(channels), torch.randn(channels)
    found = cpu_step.attend_one(qkv, cos, sin, cache, position, heads, channels**-0.5)
    query, key, value = qkv.view(-1, channels).double().split((heads, kv_heads, kv_heads))
    assert near(cache[:kv_heads, position], turned(key, cos.double(), sin.double()))
    assert torch.equal(cache[kv_heads:, position].double(), value)
    untouched = torch.arange(cache.shape[1]) != position
    assert torch.equal(cache[:, untouched], before[:, untouched])
    keys, values = cache[:, : position + 1].double().repeat_interleave(heads // kv_heads, 0).chunk(2)
    wanted = F.scaled_dot_product_attention(turned(query, cos.double(), sin.double())[:, None], keys, values)
    assert near(found.view(heads, channels), wanted[:, 0])
