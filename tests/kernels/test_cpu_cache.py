"""Attention over a compressed cache in C++ against torch's over what the rows' own `read` gives, and what is appended against what torch codes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitpress.engine.kv_cache import CodedRows, DenseRows
from bitpress.engine.recipe import CacheSide
from bitpress.kernels import cpu_build, cpu_cache

pytestmark = pytest.mark.skipif(cpu_build.library() is None, reason=f"no compiled library: {cpu_build.why_not()}")
CHANNELS, KV_HEADS, HEADS, BASE = 16, 2, 6, 1e4
NEAR = 2**-6  # bfloat16 keys and latents, relative


def angles(positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [P, C], the sine's first half negated."""
    turn = torch.arange(positions)[:, None] / BASE ** (torch.arange(CHANNELS // 2) / (CHANNELS // 2))
    return torch.cat((turn.cos(), turn.cos()), 1), torch.cat((-turn.sin(), turn.sin()), 1)


def turned(x_SGC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
    return x_SGC * cos_SC[:, None] + x_SGC.roll(CHANNELS // 2, -1) * sin_SC[:, None]


def rows_of(scheme: dict[str, Any] | None, width: int, length: int, window: int) -> DenseRows | CodedRows:
    device = torch.device("cpu")
    if scheme is None:
        return DenseRows(length, width, torch.bfloat16, device)
    return CodedRows(CacheSide.model_validate(scheme), window, length, width, torch.bfloat16, device)


def factor(rank: int, each: bool) -> Tensor:
    """[KV heads * C, rank], bfloat16; with `each` a run of the rank belongs to each head."""
    made = torch.randn(KV_HEADS * CHANNELS, rank) / rank**0.5
    return (torch.block_diag(*(made[i * CHANNELS : (i + 1) * CHANNELS, : rank // KV_HEADS] for i in range(KV_HEADS))) if each else made).bfloat16()


BY_CHANNEL = [{"bits": bits, "axis": "channel", "group_size": 32} for bits in (2, 4)]
BY_TOKEN = [{"bits": 4, "axis": "token", "group_size": 32}, {"bits": 3, "axis": "token", "group_size": 24}, {"bits": 8, "axis": "token", "group_size": "row"}]
SIDES = [
    (None, None, 0, 0, False),
    (BY_CHANNEL[1], BY_TOKEN[0], 0, 0, False),
    (BY_CHANNEL[0], BY_TOKEN[1], 0, 0, False),
    (BY_TOKEN[2], None, 0, 0, False),
    (None, None, 19, 20, False),
    (None, None, 18, 20, True),
    (None, None, 6, 22, True),
    (BY_CHANNEL[1], BY_TOKEN[0], 19, 24, False),
    (BY_TOKEN[1], BY_TOKEN[2], 22, 0, False),
    (None, BY_TOKEN[0], 0, 12, False),
]


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("tokens", [1, 33, 70])
def test_one_token_over_any_form(sides: tuple[Any, ...], tokens: int) -> None:
    key_scheme, value_scheme, key_rank, value_rank, each = sides
    torch.manual_seed(tokens)
    window, full = 5, KV_HEADS * CHANNELS
    widths = (key_rank or full, value_rank or full)
    ups = tuple(factor(rank, each) if rank else None for rank in (key_rank, value_rank))
    pair = [[rows_of(scheme, width, tokens + 40, window) for scheme, width in zip((key_scheme, value_scheme), widths, strict=True)] for _ in range(2)]
    places = [rows.in_place(up, each) for rows, up in zip(pair[0], ups, strict=True)]
    assert cpu_cache.fits(*places)
    cos, sin = angles(tokens + 1)
    turns = cpu_cache.turns_of(cos, sin)
    for position in range(tokens):
        qkv = torch.randn(1, HEADS * CHANNELS + sum(widths)).bfloat16()
        query, key, value = qkv[0].split((HEADS * CHANNELS, *widths))
        found = cpu_cache.attend(qkv, cos[position], sin[position], turns, *places, HEADS, KV_HEADS, CHANNELS**-0.5)
        pair[1][0].append(key[None] if key_rank else turned(key.float().view(1, KV_HEADS, -1), cos[position, None], sin[position, None]).flatten(1))
        pair[1][1].append(value[None])
    for rows, place in zip(pair[0], places, strict=True):
        rows.counts = place.count, place.filled
    for ours, theirs in zip(*pair, strict=True):
        assert ours.counts == theirs.counts and ours.nbytes == theirs.nbytes
        assert torch.allclose(ours.read().float(), theirs.read().float(), atol=0.02), "what was appended"
    held = [rows.read().float() if up is None else rows.read().float() @ up.float().t() for rows, up in zip(pair[0], ups, strict=True)]
    keys, values = (rows.view(tokens, KV_HEADS, CHANNELS) for rows in held)
    keys = turned(keys, cos[:tokens], sin[:tokens]) if key_rank else keys
    queries = turned(query.float().view(1, HEADS, CHANNELS), cos[-2:-1], sin[-2:-1])[0]
    repeated = (side.repeat_interleave(HEADS // KV_HEADS, 1).transpose(0, 1) for side in (keys, values))
    wanted = F.scaled_dot_product_attention(queries[:, None], *repeated)[:, 0]
    assert float((found.view(HEADS, -1).float() - wanted).norm() / wanted.norm()) < NEAR


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(("heads", "kv_heads", "channels", "group"), [(9, 3, 64, 32), (8, 1, 32, 64), (5, 5, 48, 32), (4, 2, 64, "row")])
def test_codes_are_multiplied_as_what_they_stand_for(bits: int, heads: int, kv_heads: int, channels: int, group: int | str) -> None:
    torch.manual_seed(bits)
    tokens, width, flat = 107, kv_heads * channels, (torch.ones(channels), torch.zeros(channels))
    keys = rows_of({"bits": bits, "axis": "channel", "group_size": 32}, width, tokens + 40, 7)
    values = rows_of({"bits": bits, "axis": "token", "group_size": group}, width, tokens + 40, 7)
    places = [rows.in_place(None, False) for rows in (keys, values)]
    loud = torch.linspace(0.1, 3, width)  # channels of unlike size, as keys have
    for rows, place in zip((keys, values), places, strict=True):
        rows.append((torch.randn(tokens - 1, width) * loud + 1).bfloat16())
        place.count, place.filled = rows.counts
    qkv = torch.randn(1, heads * channels + 2 * width).bfloat16()
    found = cpu_cache.attend(qkv, *flat, torch.zeros(4, 2, channels // 2, 32), *places, heads, kv_heads, channels**-0.5)
    for rows, place in zip((keys, values), places, strict=True):
        rows.counts = place.count, place.filled
    held = (rows.read().float().view(tokens, kv_heads, channels).repeat_interleave(heads // kv_heads, 1).transpose(0, 1) for rows in (keys, values))
    wanted = F.scaled_dot_product_attention(qkv[0, : heads * channels].float().view(heads, 1, channels), *held)[:, 0]
    assert float((found.view(heads, -1).float() - wanted).norm() / wanted.norm()) < NEAR / 2


def test_codes_are_those_of_torch_to_the_bit() -> None:
    torch.manual_seed(0)
    for scheme, width in ((BY_CHANNEL[0], 24), (BY_TOKEN[1], 32), (BY_TOKEN[0], 40)):
        ours, theirs = (rows_of(scheme, width, 200, 3) for _ in range(2))
        dense = rows_of(None, width, 200, 0)
        place, plain = ours.in_place(None, False), dense.in_place(None, False)
        keys, values = (place, plain) if scheme["axis"] == "channel" else (plain, place)
        flat = torch.ones(width), torch.zeros(width)
        for _ in range(70):
            row = torch.randn(1, width).bfloat16()
            cpu_cache.attend(torch.cat((row, row, row), 1), *flat, torch.zeros(7, 2, width // 2, 32), keys, values, 1, 1, 1.0)
            theirs.append(row)
        ours.counts = place.count, place.filled
        assert ours.counts == theirs.counts and torch.equal(ours.read(), theirs.read())


def test_forms_without_a_kernel_are_not_taken() -> None:
    keys = rows_of({"bits": 4, "axis": "channel", "group_size": 16}, 32, 64, 0).in_place(None, False)
    plain = rows_of(None, 32, 64, 0).in_place(None, False)
    by_channel = rows_of(BY_CHANNEL[0], 32, 64, 0).in_place(None, False)
    assert not cpu_cache.fits(keys, plain) and not cpu_cache.fits(plain, by_channel) and cpu_cache.fits(by_channel, plain)
