"""Round to nearest: golden vectors of METHODS 0.6, error bounds, edge groups, clip search, against a plain loop."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.engine.methods import registry
from bitpress.engine.methods.quantize.pipeline import (
    ClipSearch,
    Codes,
    decode,
    dequantize_groups,
    encode,
    group_range,
    make_grid,
    quantize_groups,
    to_groups,
)  # fmt: skip
from bitpress.engine.recipe import BITS, Scheme, WeightScheme
from bitpress.kernels import formats, reference
from bitpress.kernels.layout import UniformLayout

GOLDEN = [0.9, -0.3, 0.1, -1.2, 0.45, 0, -0.05, 0.7]
SCHEMES = st.builds(
    WeightScheme, bits=st.sampled_from(BITS), group_size=st.sampled_from((0, 8, 16, 24)), symmetric=st.booleans()
)  # fmt: skip


def random_matrix(seed: int, rows: int = 5, width: int = 40, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale


def per_weight(values_NG: torch.Tensor, scheme: WeightScheme, width: int) -> torch.Tensor:
    return values_NG.float().repeat_interleave(scheme.group_size or width, dim=1)[:, :width]


@pytest.mark.parametrize(
    ("bits", "symmetric", "scale", "zero", "levels", "mse"),
    [
        (2, False, 0.7, 2, [0.7, 0, 0, -1.4, 0.7, 0, 0, 0.7], 0.030625),
        (3, False, 0.3, 4, [0.9, -0.3, 0, -1.2, 0.6, 0, 0, 0.6], 0.005625),
        (4, False, 0.14, 9, [0.84, -0.28, 0.14, -1.26, 0.42, 0, 0, 0.7], 0.001575),
        (3, True, 0.4, 4, [0.8, -0.4, 0, -1.2, 0.4, 0, 0, 0.8], 0.005625),
        (4, True, 1.2 / 7, 8, [0.857143, -0.342857, 0.171429, -1.2, 0.514286, 0, 0, 0.685714], 0.0019515),
    ],
)
def test_golden_vectors_on_the_unrounded_grid(bits: int, symmetric: bool, scale: float, zero: int, levels: list[float], mse: float) -> None:
    weights = torch.tensor([GOLDEN], dtype=torch.float64)
    grid = make_grid(*group_range(weights), WeightScheme(bits=bits, group_size=0, symmetric=symmetric), scale_dtype=None)
    made = decode(encode(weights, grid), grid)
    assert grid.scale.item() == pytest.approx(scale, abs=1e-12)
    assert grid.zero.item() == zero
    assert made[0].tolist() == pytest.approx(levels, abs=1e-6)
    assert ((made - weights) ** 2).mean().item() == pytest.approx(mse, abs=1e-7)


def plain_loop(weights: np.ndarray, scheme: WeightScheme) -> np.ndarray:
    """Codes by the definition, one weight at a time."""
    width, codes = weights.shape[1], np.zeros(weights.shape, dtype=np.uint8)
    size, top, middle = scheme.group_size or width, 2**scheme.bits - 1, 2 ** (scheme.bits - 1)
    for row in range(weights.shape[0]):
        for start in range(0, width, size):
            group = weights[row, start : start + size]
            low, high = min(group.min(), np.float32(0)), max(group.max(), np.float32(0))
            exact = max(high, -low) / np.float32(middle - 1) if scheme.symmetric else (high - low) / np.float32(top)
            scale = np.float32(torch.tensor(exact).to(torch.bfloat16).item())
            zero = np.float32(middle) if scheme.symmetric else np.clip(np.round(-low / scale), 0, top)
            codes[row, start : start + size] = np.clip(np.round(group / scale) + zero, 0, top)
    return codes


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [0, 8, 24])
@pytest.mark.parametrize("bits", BITS)
def test_codes_are_those_of_a_plain_loop(bits: int, group_size: int, symmetric: bool) -> None:
    scheme, weights = WeightScheme(bits=bits, group_size=group_size, symmetric=symmetric), random_matrix(bits)
    assert np.array_equal(quantize_groups(weights, scheme).codes_NK.numpy(), plain_loop(weights.numpy(), scheme))


@settings(max_examples=80, deadline=None)
@given(scheme=SCHEMES, seed=st.integers(0, 10_000), width=st.integers(1, 50), scale=st.sampled_from((1e-6, 0.02, 1.0, 300.0)))
def test_error_is_at_most_half_a_step_and_little_more_at_the_ends(scheme: WeightScheme, seed: int, width: int, scale: float) -> None:
    weights = random_matrix(seed, 3, width, scale)
    codes = quantize_groups(weights, scheme)
    step = per_weight(codes.scales_NG, scheme, width)
    # A scale rounded down to bfloat16 is up to 2**-8 too small, which clips the ends by that share of the range; an
    # asymmetric zero is itself rounded by up to half a step, which clips the upper end by as much.
    clipped = weights.abs().max() * 2**-7 + (0.0 if scheme.symmetric else 0.5) * step
    assert ((dequantize_groups(codes, scheme) - weights).abs() <= (0.5 + 1e-5) * step + clipped).all()


@settings(max_examples=50, deadline=None)
@given(bits=st.sampled_from(BITS), seed=st.integers(0, 10_000))
def test_error_well_inside_the_range_is_at_most_half_a_step(bits: int, seed: int) -> None:
    scheme, weights = WeightScheme(bits=bits, group_size=8), random_matrix(seed)
    codes = quantize_groups(weights, scheme)
    step = per_weight(codes.scales_NG, scheme, weights.shape[1])
    inside = (codes.codes_NK > 0) & (codes.codes_NK < 2**bits - 1)
    assert inside.any()
    assert ((dequantize_groups(codes, scheme) - weights).abs() <= (0.5 + 1e-5) * step)[inside].all()


@settings(max_examples=50, deadline=None)
@given(scheme=SCHEMES, seed=st.integers(0, 10_000))
def test_what_is_on_the_grid_stays(scheme: WeightScheme, seed: int) -> None:
    weights = random_matrix(seed)
    groups = to_groups(weights, scheme.group_size)
    grid = make_grid(*group_range(groups), scheme)
    once = decode(encode(groups, grid), grid)
    assert torch.equal(decode(encode(once, grid), grid), once)


@settings(max_examples=50, deadline=None)
@given(bits=st.sampled_from(BITS), seed=st.integers(0, 10_000))
def test_symmetric_grid_mirrors(bits: int, seed: int) -> None:
    scheme, weights = WeightScheme(bits=bits, group_size=8, symmetric=True), random_matrix(seed)
    assert torch.equal(dequantize_groups(quantize_groups(-weights, scheme), scheme), -dequantize_groups(quantize_groups(weights, scheme), scheme))


@settings(max_examples=50, deadline=None)
@given(scheme=SCHEMES, seed=st.integers(0, 10_000), clip=st.sampled_from((None, ClipSearch(10))))
def test_zeros_survive_exactly(scheme: WeightScheme, seed: int, clip: ClipSearch | None) -> None:
    weights = random_matrix(seed)
    weights[weights.abs() < 0.7] = 0
    made = dequantize_groups(quantize_groups(weights, scheme, clip), scheme)
    assert (made[weights == 0] == 0).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-39, 3.3e38])
def test_constant_groups_are_kept_and_finite(value: float, symmetric: bool) -> None:
    scheme = WeightScheme(bits=4, group_size=8, symmetric=symmetric)
    codes = quantize_groups(torch.full((2, 20), value), scheme)
    made = dequantize_groups(codes, scheme)
    assert (codes.scales_NG > 0).all()
    assert made.flatten().tolist() == pytest.approx([0.0 if abs(value) < 1e-38 else value] * 40, rel=0.01)


def test_a_short_last_group_has_its_own_scale() -> None:
    weights = torch.cat([torch.ones(1, 8), torch.full((1, 3), 100.0)], dim=1)
    codes = quantize_groups(weights, WeightScheme(bits=4, group_size=8))
    assert codes.scales_NG.shape == (1, 2)
    assert codes.codes_NK.shape == (1, 11)
    assert codes.scales_NG[0, 1] > 50 * codes.scales_NG[0, 0]


def test_the_matrix_is_the_same_whether_in_one_chunk_or_many(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, scheme = random_matrix(0, 33, 40), WeightScheme(bits=3, group_size=16)
    whole = quantize_groups(weights, scheme)
    monkeypatch.setattr("bitpress.engine.methods.quantize.pipeline.CHUNK_WEIGHTS", 100)
    assert all(torch.equal(one, other) for one, other in zip(whole, quantize_groups(weights, scheme), strict=True))


def test_what_is_packed_dequantises_to_what_was_measured() -> None:
    for bits in BITS:
        for symmetric in (False, True):
            scheme = WeightScheme(bits=bits, group_size=16, symmetric=symmetric)
            codes: Codes = quantize_groups(random_matrix(bits), scheme)
            packed = formats.pack(*codes, UniformLayout(bits, 16, symmetric))
            assert torch.equal(reference.dequantize(packed, torch.float32), dequantize_groups(codes, scheme))


def test_clip_search_never_raises_the_error_it_searches_by() -> None:
    weights = torch.from_numpy(np.random.default_rng(0).standard_t(3, (16, 64))).float()
    scheme = WeightScheme(bits=3, group_size=32)
    plain, searched = quantize_groups(weights, scheme), quantize_groups(weights, scheme, ClipSearch(80, 2.4))
    before, after = ((dequantize_groups(codes, scheme) - weights).abs().pow(2.4).view(16, 2, 32).sum(-1) for codes in (plain, searched))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.9 * before.sum()
    assert (searched.scales_NG <= plain.scales_NG).all()


def test_method_uses_its_options() -> None:
    method, weights, scheme = registry.get("rtn"), random_matrix(3), Scheme(weights=WeightScheme(bits=2, group_size=8))
    plain, searched = (method.apply(weights, scheme, {}, method.parse({"clip_search": search})) for search in (False, True))
    assert torch.equal(plain.weight_NK, dequantize_groups(plain.codes, scheme.weights))
    assert not torch.equal(plain.weight_NK, searched.weight_NK)
