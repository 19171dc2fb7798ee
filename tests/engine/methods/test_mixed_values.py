"""Latent values by what attention mixes: the loss that is foretold, full rank as nothing, ranks spread over blocks, a cache beside codes, bad input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitpress.engine import mixing
from bitpress.engine.accounting import cache_bytes, size_of
from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.compress import compress
from bitpress.engine.decode import Decoder
from bitpress.engine.errors import InputError
from bitpress.engine.kv_ranks import spread_ranks
from bitpress.engine.methods.lowrank.mixed_values import MixedValues
from bitpress.engine.methods.lowrank.pipeline import energies
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import RankScheme, Recipe, Scheme

Build = Callable[..., Loaded]
IDS = torch.randint(2, 320, (6, 40), generator=torch.Generator().manual_seed(0))
TOKENS = CalibrationSet("made up", 0, "sha", IDS)
KEYS = {"keys": {"bits": 4, "axis": "channel", "group_size": 8}, "residual_window": 8}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(size: int, seed: int) -> tuple[Tensor, Tensor]:
    x, w = random(4 * size, size, seed=seed) * torch.linspace(3, 0.1, size), random(2 * size, size, seed=seed + 1) * torch.linspace(0.2, 2, size)
    return (x.t() @ x).double(), (w.t() @ w).double()


def recipe(method: str = "mixed-values", **rank: Any) -> Recipe:
    cache = {"rank": {"sides": "values", "heads": "each", **rank}, **KEYS}
    return Recipe.from_dict({"model": "llama", "kv_cache": cache, "stages": [{"method": method}]})


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), rank=st.integers(1, 8))
def test_what_is_lost_is_what_is_left_away_and_no_projection_loses_less(seed: int, rank: int) -> None:
    (mixed, taken), weight_NK = moments(8, seed), random(8, 20, seed=seed)
    factors = MixedValues().factor(weight_NK, rank, {"mixed": mixed, "taken": taken}, None)
    projection = factors.left_NR.double() @ torch.linalg.lstsq(weight_NK.t().double(), factors.right_RK.t().double()).solution.t()
    gap = torch.eye(8, dtype=torch.float64) - projection
    lost, carried = float(torch.trace(taken @ gap @ mixed @ gap.t())), energies(mixed, taken)[2].square()
    assert lost == pytest.approx(float(carried[rank:].sum()), rel=1e-3, abs=1e-5 * float(carried.sum()))
    other = torch.linalg.qr(random(8, rank, seed=seed + 7).double())[0]
    gap = torch.eye(8, dtype=torch.float64) - other @ other.t()
    assert lost <= float(torch.trace(taken @ gap @ mixed @ gap.t())) + 1e-6 * float(carried.sum())


def made(in_memory: Build, plan: Recipe, family: str = "llama") -> Any:
    return compress(in_memory(family), plan, calibration=TOKENS).model


def hidden(model: Any) -> Tensor:
    """What the attention of the first block puts out, everything before it being dense."""
    heard: list[Tensor] = []
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda _, __, out: heard.append(out[0]))
    with torch.no_grad():
        model(input_ids=IDS)
    handle.remove()
    return heard[0]


def test_full_rank_is_exact_and_half_loses_less_than_whitening(in_memory: Build) -> None:
    dense = hidden(in_memory("llama").model)
    whole = hidden(made(in_memory, recipe(keep=1.0)))
    assert torch.allclose(dense, whole, atol=1e-4 * float(dense.abs().max()))
    gaps = [float((hidden(made(in_memory, recipe(method, keep=0.5))) - dense).norm()) for method in ("mixed-values", "svd-llm", "lorc")]
    assert gaps[0] < min(gaps[1:])


def test_beside_coded_keys_bytes_are_those_of_the_tensors(in_memory: Build) -> None:
    loaded = in_memory("llama")
    lost = mixing.value_losses(loaded, IDS)
    size = loaded.anatomy.head_dim
    assert len(lost) == loaded.anatomy.blocks and all(len(block) == size + 1 for block in lost)
    assert all(block[0] > 0 and block[-1] == 0 and sorted(block, reverse=True) == block for block in lost)
    plan = recipe(ranks=spread_ranks(lost, 0.7, loaded.anatomy.kv_heads))
    result = compress(loaded, plan, calibration=TOKENS)
    decoder = Decoder(result.model)
    decoder.prefill(IDS[0][:30])
    for token in IDS[0][30:]:
        decoder.step(int(token))
    assert decoder.cache_bytes == cache_bytes(plan, loaded.anatomy, 40) < cache_bytes(None, loaded.anatomy, 40)
    assert result.bytes == size_of(plan, loaded.anatomy).bytes


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), keep=st.floats(0.3, 1.0), blocks=st.integers(1, 5))
def test_ranks_are_spread_so_that_least_is_lost(seed: int, keep: float, blocks: int) -> None:
    steps = random(blocks, 6, seed=seed).abs().sort(descending=True).values
    lost = [[*row.flip(0).cumsum(0).flip(0).tolist(), 0.0] for row in steps]
    ranks = spread_ranks(lost, keep, 3)
    budget = int(keep * 6 * blocks + 1e-9)
    assert all(rank % 3 == 0 and 3 <= rank <= 18 for rank in ranks) and sum(ranks) == 3 * budget
    ours = sum(block[rank // 3] for block, rank in zip(lost, ranks, strict=True))
    even = sum(block[budget // blocks] for block in lost)
    assert ours <= even + 1e-6


def test_what_does_not_fit_is_named(in_memory: Build) -> None:
    with pytest.raises(InputError, match="latent is of all heads together"):
        made(in_memory, recipe(keep=0.5, heads="joint"))
    with pytest.raises(InputError, match="Only values are mixed by attention"):
        made(in_memory, recipe(keep=0.5, sides="both"))
    with pytest.raises(InputError, match=r"No ranks keep 1\.0% of the cache.*Keep 16\.7% or more"):
        spread_ranks([[1.0] * 6 + [0.0]], 0.01, 2)
    plain = MixedValues()
    with pytest.raises(ValueError, match="without rank"):
        plain.apply(random(4, 4), Scheme(), {}, plain.parse({}))
    both = Scheme(rank=RankScheme(rank=2, latent=2))
    with pytest.raises(InputError, match="latent is of all heads together"):
        plain.apply(random(4, 4), both, {"mixed": random(1, 2, 2), "taken": random(1, 2, 2)}, plain.parse({}))
