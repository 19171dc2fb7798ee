"""HQQ: against a plain loop of the published steps, errors without a mean, float and integer zeros, edge groups."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitpress.engine.accounting import layout_of
from bitpress.engine.methods import registry
from bitpress.engine.methods.quantize.pipeline import dequantize_groups, quantize_groups
from bitpress.engine.recipe import BITS, Scheme, SparsityScheme, WeightScheme
from bitpress.kernels.formats import pack
from bitpress.kernels.reference import dequantize

METHOD = registry.linear("hqq")


def outlying(seed: int, rows: int = 4, width: int = 64) -> Tensor:
    """Weights with the heavy tails that the method is for."""
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, (rows, width))).float() * 0.05


def scheme_of(bits: int = 4, group: int = 16, zero: str = "float") -> Scheme:
    return Scheme(weights=WeightScheme(bits=bits, group_size=group, zero=zero))  # type: ignore[arg-type]


def solved(weight_NK: Tensor, scheme: Scheme, **options: Any) -> Any:
    return METHOD.apply(weight_NK, scheme, {}, METHOD.parse(options))


def published(weights: np.ndarray, bits: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Zeros and codes of rows of groups by METHODS 15.6, in float64: stops when the mean |error| of them all grows."""
    top = 2**bits - 1
    exact = (weights.max(-1, keepdims=True) - weights.min(-1, keepdims=True)) / top
    scale = torch.from_numpy(exact).to(torch.bfloat16).double().numpy()
    zero, beta, least = -weights.min(-1, keepdims=True) / scale, 10.0, np.inf
    for _ in range(steps):
        codes = np.clip(np.round(weights / scale + zero), 0, top)
        error = weights - (codes - zero) * scale
        with np.errstate(divide="ignore"):
            kept = np.sign(error) * np.maximum(abs(error) - abs(error) ** -0.3 / beta, 0)
        zero = (codes - (weights - kept) / scale).mean(-1, keepdims=True)
        if abs(error).mean() >= least:
            break
        least, beta = abs(error).mean(), beta * 1.01
    zero = torch.from_numpy(zero).to(torch.bfloat16).double().numpy()
    return zero[..., 0], np.clip(np.round(weights / scale + zero), 0, top)


@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_is_the_published_solver(bits: int, steps: int) -> None:
    weights = outlying(bits, rows=8)
    made = solved(weights, scheme_of(bits), iterations=steps)
    zeros, codes = published(weights.double().numpy().reshape(8, 4, 16), bits, steps)
    assert np.isclose(made.codes.zeros_NG.double().numpy(), zeros, atol=0.1).mean() > 0.9, "float32 may round a weight the other way"
    assert (made.codes.codes_NK.numpy() == codes.reshape(8, 64)).mean() > 0.97


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.sampled_from(BITS), group=st.sampled_from((0, 8, 24)))
def test_errors_of_a_group_have_a_mean_near_zero(seed: int, bits: int, group: int) -> None:
    weights, scheme = outlying(seed), scheme_of(bits, group)
    made = solved(weights, scheme)
    gaps = torch.nn.functional.pad(made.weight_NK - weights, (0, -64 % (group or 64))).view(4, -1, group or 64).mean(-1)
    assert gaps.square().mean().sqrt() < 0.25 * made.codes.scales_NG.float().square().mean().sqrt()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_heavy_tails_have_less_mean_error_than_after_round_to_nearest(bits: int) -> None:
    weights, scheme = outlying(7, rows=64), scheme_of(bits)
    nearest_NK = dequantize_groups(quantize_groups(weights, WeightScheme(bits=bits, group_size=16)), WeightScheme(bits=bits, group_size=16))
    assert (solved(weights, scheme).weight_NK - weights).abs().mean() < (nearest_NK - weights).abs().mean()


@pytest.mark.parametrize("zero", ["integer", "float"])
@pytest.mark.parametrize("group", [0, 16, 24])
def test_what_is_packed_is_what_was_measured(zero: str, group: int) -> None:
    scheme = scheme_of(3, group, zero)
    made = solved(outlying(1), scheme)
    packed = pack(*made.codes, layout_of(scheme))  # type: ignore[arg-type]
    assert torch.equal(dequantize(packed), made.weight_NK)


@pytest.mark.parametrize("zero", ["integer", "float"])
@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-39])
def test_constant_groups_are_kept(value: float, zero: str) -> None:
    made = solved(torch.full((2, 20), value), scheme_of(4, 8, zero)).weight_NK
    assert made.flatten().tolist() == pytest.approx([0.0 if abs(value) < 1e-38 else value] * 40, rel=0.01)


def test_float_zeros_need_not_have_0_in_range() -> None:
    weights = 5 + 0.1 * torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    # A float zero of 750 is stored to 8 bits: the grid lands within 2 of its steps of 0.0067.
    assert (solved(weights, scheme_of(4, 16)).weight_NK - weights).abs().max() < 0.05


def test_symmetric_grids_are_rounded_to_nearest_and_that_is_said() -> None:
    scheme = Scheme(weights=WeightScheme(bits=4, group_size=16, symmetric=True))
    made = solved(outlying(3), scheme)
    assert torch.equal(made.weight_NK, dequantize_groups(quantize_groups(outlying(3), scheme.weights), scheme.weights))
    assert "symmetric" in made.notes[0]


def test_pruned_weights_stay_zero_with_integer_zeros_and_a_note_tells_when_not() -> None:
    weights = outlying(4)
    weights[weights.abs() < 0.03] = 0.0
    pruned = SparsityScheme(ratio=0.4)
    whole = solved(weights, Scheme(weights=WeightScheme(bits=4, group_size=16), sparsity=pruned))
    assert (whole.weight_NK[weights == 0] == 0).all()
    assert whole.notes == ()
    assert "no longer exactly 0" in solved(weights, Scheme(weights=WeightScheme(bits=4, group_size=16, zero="float"), sparsity=pruned)).notes[0]
