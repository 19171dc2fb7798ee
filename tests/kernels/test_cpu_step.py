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
    assert near(cpu_step.gated_silu(*gate_up.chunk(2, -1)), F.silu(gate) * up)


@pytest.mark.parametrize("shape", [(7, 40), (2, 33, 576), (600, 96)])
def test_many_rows_are_rounded_where_torch_rounds(shape: tuple[int, ...]) -> None:
    chance = torch.Generator().manual_seed(len(shape))
    x, other, weight = torch.randn(shape, generator=chance).bfloat16(), torch.randn(shape, generator=chance).bfloat16(), torch.rand(shape[-1]).bfloat16()
    normed = weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16()
    assert (cpu_step.rms_norm(x, weight, 1e-5, rounded=True) == normed).double().mean() > 0.995
    assert (cpu_step.gated_silu(x, other, rounded=True) == F.silu(x) * other).double().mean() > 0.995
    once = F.silu(x.double()) * other.double()
    torch.testing.assert_close(cpu_step.gated_silu(x, other).double(), once, rtol=2**-8, atol=1e-30)


def test_halves_of_rows_are_gated_where_they_are() -> None:
    both = torch.randn(50, 2 * 40).bfloat16()
    gate, up = both.chunk(2, -1)
    assert torch.equal(cpu_step.gated_silu(gate, up), cpu_step.gated_silu(gate.contiguous(), up.contiguous()))


def test_gates_of_any_size_and_none() -> None:
    gate = torch.tensor([[-300.0, 300.0, -90.0, 0.0] * 5 + [float("inf"), float("nan")]]).bfloat16()
    found = cpu_step.gated_silu(gate, torch.ones_like(gate))[0]
    assert found[:4].tolist() == [0.0, 300.0, 0.0, 0.0]
    assert found[20] == float("inf")
    assert found[21].isnan()


def test_other_types_gradients_and_columns_are_not_taken() -> None:
    x = torch.randn(4, 8).bfloat16()
    assert cpu_step.takes(x, x[:, :4])
    assert not cpu_step.takes(x, x.float())
    assert not cpu_step.takes(x[:, ::2])
    assert not cpu_step.takes(x[:0])
    assert not cpu_step.takes(x.clone().requires_grad_())


@pytest.mark.parametrize(("rows", "heads", "kv_heads", "channels"), [(1, 3, 1, 8), (5, 9, 3, 64), (200, 4, 4, 20)])
def test_turn_of_many_positions(rows: int, heads: int, kv_heads: int, channels: int) -> None:
    qkv = torch.randn(rows, heads + 2 * kv_heads, channels).bfloat16()
    cos, sin = torch.randn(rows, channels), torch.randn(rows, channels)
    cache = torch.zeros(2 * kv_heads, rows + 3, channels).bfloat16()
    query, key, value = qkv.double().split((heads, kv_heads, kv_heads), dim=1)
    found = cpu_step.turn_rows(qkv, cos, sin, cache[:, 2:-1], heads)
    assert near(found, turned(query, cos.double()[:, None], sin.double()[:, None]))
    assert near(cache[:kv_heads, 2:-1].transpose(0, 1), turned(key, cos.double()[:, None], sin.double()[:, None]))
    assert torch.equal(cache[kv_heads:, 2:-1].transpose(0, 1).double(), value)
    assert cache[:, :2].count_nonzero() == cache[:, -1].count_nonzero() == 0


@pytest.mark.parametrize(("batch", "length", "heads", "channels"), [(1, 1, 1, 8), (2, 33, 9, 64), (3, 70, 2, 20)])
def test_turn_as_transformers_rounds_it(batch: int, length: int, heads: int, channels: int) -> None:
    x = torch.randn(batch, length, heads, channels).bfloat16()
    cos, sin = torch.randn(length, channels).bfloat16(), torch.randn(length, channels).bfloat16()
    low, high = x.chunk(2, -1)
    wanted = x * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]
    assert torch.equal(cpu_step.turn_rounded(x, cos, sin), wanted)
    assert torch.equal(cpu_step.turn_rounded(x.transpose(1, 2).contiguous().transpose(1, 2), cos, sin), wanted), "wherever the heads lie"
    with pytest.raises(ValueError, match="bfloat16 only"):
        cpu_step.turn_rounded(x.float(), cos, sin)


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
