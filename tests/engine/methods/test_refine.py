"""Mending codes and grids after a rounding: it never loses, it finds what a search of all codes finds, and zeros that are pruned stay."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitpress.engine.methods import registry
from bitpress.engine.methods.quantize.pipeline import Codes, dequantize_groups, quantize_groups
from bitpress.engine.methods.quantize.refine import Target, descend, errors, refine, refit
from bitpress.engine.recipe import BITS, Scheme, SparsityScheme, WeightScheme

METHOD = registry.linear("gptq")
SCHEMES = st.builds(
    WeightScheme, bits=st.sampled_from(BITS), group_size=st.sampled_from((0, 8, 24)), symmetric=st.booleans(), zero=st.just("integer")
) | st.builds(WeightScheme, bits=st.sampled_from(BITS), group_size=st.sampled_from((0, 8, 24)), zero=st.just("float"))  # fmt: skip


def problem(seed: int, rows: int = 5, width: int = 40) -> Target:
    """Weights, and second moments of inputs that depend on each other and differ in size."""
    chance = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=chance) * torch.rand(width, generator=chance).mul(2).exp()
    inputs_MK = torch.randn(4 * width, width, generator=chance) @ mixing
    gram_KK = inputs_MK.t() @ inputs_MK / len(inputs_MK)
    return Target(torch.randn(rows, width, generator=chance), gram_KK / gram_KK.diagonal().mean())


def nearest(target: Target, scheme: WeightScheme) -> Codes:
    codes = quantize_groups(target.weight_NK, scheme.model_copy(update={"zero": "integer"}))
    return codes._replace(zeros_NG=codes.zeros_NG.bfloat16()) if scheme.zero == "float" else codes


@settings(max_examples=25, deadline=None)
@given(scheme=SCHEMES, seed=st.integers(0, 10_000))
def test_neither_half_makes_the_error_larger(scheme: WeightScheme, seed: int) -> None:
    target = problem(seed)
    codes = nearest(target, scheme)
    for half in (descend, refit, descend, refit):
        better = half(codes, target, scheme)
        assert (errors(better, target, scheme) <= errors(codes, target, scheme) * (1 + 1e-4) + 1e-6).all()
        assert int(better.codes_NK.max()) < 2**scheme.bits
        assert better.scales_NG.dtype == torch.bfloat16 and (better.scales_NG > 0).all()
        codes = better


def test_a_pass_ends_where_no_single_code_can_gain() -> None:
    target, scheme = problem(3, rows=2, width=6), WeightScheme(bits=2, group_size=0)
    codes = nearest(target, scheme)
    for _ in range(10):
        codes = descend(codes, target, scheme)
    least = errors(codes, target, scheme)
    for column, code in product(range(6), range(4)):
        other = codes.codes_NK.clone()
        other[:, column] = code
        assert (errors(codes._replace(codes_NK=other), target, scheme) >= least * (1 - 1e-5)).all()


def test_scales_are_the_least_squares_solution() -> None:
    """Every row alone, by torch's own solver on the square root of the second moments."""
    target, scheme = problem(5, width=48), WeightScheme(bits=3, group_size=8)
    codes = nearest(target, scheme)
    root_KK = torch.linalg.cholesky(target.gram_KK.double()).t()
    steps_NK = codes.codes_NK.double() - codes.zeros_NG.double().repeat_interleave(8, dim=1)
    for row, made in enumerate(refit(codes, target, scheme).scales_NG):
        basis_KG = torch.block_diag(*steps_NK[row].view(6, 8, 1))
        expected = torch.linalg.lstsq(root_KK @ basis_KG, root_KK @ target.weight_NK[row].double()[:, None]).solution[:, 0]
        torch.testing.assert_close(made.double(), expected, rtol=5e-3, atol=1e-3)


def test_with_equal_inputs_the_nearest_codes_stay() -> None:
    target = problem(1)._replace(gram_KK=torch.eye(40))
    scheme = WeightScheme(bits=4, group_size=8)
    codes = nearest(target, scheme)
    assert torch.equal(descend(codes, target, scheme).codes_NK, codes.codes_NK)


def test_float_zeros_gain_on_whole_ones() -> None:
    target = problem(2, rows=32)
    whole, floats = (WeightScheme(bits=2, group_size=8, zero=zero) for zero in ("integer", "float"))
    left = [float(errors(refine(nearest(target, scheme), target, scheme, 3), target, scheme).sum()) for scheme in (whole, floats)]
    assert left[1] < left[0]


@pytest.mark.parametrize("zero", ["integer", "float"])
def test_rounds_of_gptq_lower_the_error_of_its_outputs(zero: str) -> None:
    target, scheme = problem(4, rows=16), Scheme(weights=WeightScheme(bits=3, group_size=8, zero=zero))
    made = [METHOD.apply(target.weight_NK, scheme, {"gram": target.gram_KK.double()}, METHOD.parse({"rounds": rounds})) for rounds in (0, 1, 3)]
    gaps = [(outcome.weight_NK - target.weight_NK).double() for outcome in made]
    left = [float((gap @ target.gram_KK.double() * gap).sum()) for gap in gaps]
    assert left[2] < left[1] < left[0]
    assert all(torch.equal(outcome.weight_NK, dequantize_groups(outcome.codes, scheme.weights)) for outcome in made)


def test_pruned_weights_stay_zero() -> None:
    target = problem(6)
    pruned_NK: Tensor = torch.where(target.weight_NK.abs() < 0.5, 0.0, target.weight_NK)
    scheme = Scheme(weights=WeightScheme(bits=3, group_size=8), sparsity=SparsityScheme(ratio=0.4))
    made = METHOD.apply(pruned_NK, scheme, {"gram": target.gram_KK.double()}, METHOD.parse({"rounds": 2}))
    assert (made.weight_NK[pruned_NK == 0] == 0).all()


def test_an_input_that_is_always_zero_harms_nothing() -> None:
    target, scheme = problem(7), WeightScheme(bits=3, group_size=8)
    target.gram_KK[4], target.gram_KK[:, 4] = 0.0, 0.0
    made = refine(nearest(target, scheme), target, scheme, 2)
    assert dequantize_groups(made, scheme).isfinite().all()
