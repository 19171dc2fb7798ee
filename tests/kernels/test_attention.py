"""Attention that looks back, against torch's own in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitpress.kernels import cpu_build
from bitpress.kernels.attention import attend_back, attends

LIB = cpu_build.library()
needs_panels = pytest.mark.skipif(LIB is None or not LIB.bitpress_has_panels(), reason="no compiled bfloat16 kernels on this machine")


SIZES = [(24, 64, 64), (33, 16, 16), (48, 80, 80), (49, 40, 96), (256, 64, 64), (257, 128, 30), (600, 64, 64)]


def sides(batch: int, heads: int, groups: int, length: int, channels: int, mixed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; queries and values lie as a projection leaves them, keys head by head."""
    chance = torch.Generator().manual_seed(length + channels)
    shapes = (batch, length, heads, channels), (batch, groups, length, channels), (batch, length, groups, mixed)
    query, key, value = (torch.randn(shape, generator=chance).bfloat16() for shape in shapes)
    return query.transpose(1, 2), key, value.transpose(1, 2)


def oracle(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    mixed = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True, scale=scale, enable_gqa=True)
    return mixed.transpose(1, 2)


@needs_panels
@pytest.mark.parametrize(("batch", "heads", "groups"), [(1, 1, 1), (2, 9, 3), (3, 4, 4), (1, 6, 1)])
@pytest.mark.parametrize(("length", "channels", "mixed"), SIZES)
def test_it_is_as_near_the_truth_as_torch(batch: int, heads: int, groups: int, length: int, channels: int, mixed: int) -> None:
    query, key, value = sides(batch, heads, groups, length, channels, mixed)
    assert attends(query, key, value)
    wanted = oracle(query, key, value, 0.2)
    by_torch = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.2, enable_gqa=True).transpose(1, 2)
    found = attend_back(query, key, value, 0.2)
    assert found.shape == wanted.shape
    assert found.is_contiguous()
    assert (found - wanted).norm() <= 1.5 * (by_torch - wanted).norm()


@needs_panels
def test_scores_of_any_size_are_shared_out() -> None:
    query, key, value = sides(1, 2, 2, 300, 64, 64)
    found = attend_back(100 * query, key, value, 1.0)  # one key has it all
    torch.testing.assert_close(found.double(), oracle(100 * query, key, value, 1.0), rtol=0.02, atol=0.02)


@needs_panels
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_from_there_on_only(bad: float) -> None:
    query, key, value = sides(1, 2, 2, 70, 32, 32)
    key[0, 1, 50, 3] = bad
    found = attend_back(query, key, value, 0.2)
    assert found[0, :50].isfinite().all()
    assert found[0, :, 0].isfinite().all()
    assert not found[0, 50:, 1].isfinite().all()


@needs_panels
def test_it_steps_aside_for_what_it_is_not_made_for() -> None:
    query, key, value = sides(1, 2, 2, 64, 32, 32)
    assert attends(query, key, value)
    assert not attends(query.float(), key.float(), value.float())
    assert not attends(query[:, :, :1], key, value)
    assert not attends(query.requires_grad_(), key, value)
    odd = sides(1, 2, 2, 64, 33, 32)
    assert not attends(*odd)


def test_without_a_compiler_nothing_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_build, "library", lambda: None)
    assert not attends(*sides(1, 2, 2, 64, 32, 32))
