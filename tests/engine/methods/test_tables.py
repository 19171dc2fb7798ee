"""NF4 and FP4: the golden block of METHODS 0.6, nearest levels against a plain search, double quantisation, and what is stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitpress.engine.accounting import layout_of
from bitpress.engine.methods import registry
from bitpress.engine.methods.ability import Ability
from bitpress.engine.recipe import Scheme, WeightScheme
from bitpress.kernels.reference import dequantize
from bitpress.kernels.tables import LEVELS, unpack_table

GOLDEN = [0.9, -0.3, 0.1, -1.2, 0.45, 0, -0.05, 0.7]


def scheme_of(table: str, group: int = 0, double: bool = False) -> Scheme:
    return Scheme(weights=WeightScheme(bits=4, group_size=group, format=table, double_quant=double))  # type: ignore[arg-type]


def rounded(weight_NK: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """(codes, weights) of a matrix."""
    method = registry.linear(scheme.weights.format)
    outcome = method.apply(weight_NK, scheme, {}, method.parse({}))
    assert outcome.packed.layout == layout_of(scheme)
    assert torch.equal(outcome.weight_NK, dequantize(outcome.packed))
    return unpack_table(outcome.packed)[0], outcome.weight_NK


def test_golden_block_of_nf4() -> None:
    codes, made = rounded(torch.tensor([GOLDEN]), scheme_of("nf4"))
    assert codes[0].tolist() == [14, 4, 8, 0, 11, 7, 7, 13]
    # The scale 1.2 is stored as bfloat16, 1.203125.
    expected = [0.867548, -0.34133, 0.095496, -1.2, 0.405498, 0, 0, 0.67514]
    assert made[0].tolist() == pytest.approx([value * 1.203125 / 1.2 for value in expected], abs=2e-6)


@pytest.mark.parametrize("table", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.integers(1, 80), group=st.sampled_from((0, 8, 64)), size=st.sampled_from((1e-4, 1.0, 50.0)))
def test_every_weight_goes_to_the_nearest_level_of_its_stored_scale(table: str, double: bool, seed: int, width: int, group: int, size: float) -> None:
    weights = torch.randn(3, width, generator=torch.Generator().manual_seed(seed)) * size
    scheme = scheme_of(table, group, double)
    method = registry.linear(table)
    outcome = method.apply(weights, scheme, {}, method.parse({}))
    scales = unpack_table(outcome.packed)[1].float().repeat_interleave(group or width, dim=1)[:, :width]
    every = torch.tensor(LEVELS[table]) * scales.unsqueeze(-1)
    least = (every - weights.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((outcome.weight_NK - weights).abs(), least, rtol=1e-4, atol=1e-6 * size)


def test_zeros_stay_zero_and_groups_of_zeros_are_kept() -> None:
    weights = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
    weights[:, :16] = 0.0
    weights[:, 20] = 0.0
    for table in ("nf4", "fp4"):
        for double in (False, True):
            _, made = rounded(weights, scheme_of(table, 16, double))
            assert (made[weights == 0] == 0).all()
            assert made.isfinite().all()


def test_double_quantisation_costs_a_little_error_and_saves_bytes() -> None:
    weights = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    plain, double = scheme_of("nf4", 64), scheme_of("nf4", 64, True)
    once, twice = ((rounded(weights, scheme)[1] - weights).square().mean() for scheme in (plain, double))
    assert 0.97 * once < twice < 1.03 * once
    assert layout_of(double).nbytes(64, 512) < layout_of(plain).nbytes(64, 512)


def test_nf4_is_closer_than_fp4_and_uniform_levels_on_normal_weights() -> None:
    weights = torch.randn(64, 512, generator=torch.Generator().manual_seed(2))
    errors = {table: float((rounded(weights, scheme_of(table, 64))[1] - weights).square().mean()) for table in ("nf4", "fp4")}
    rtn = registry.linear("rtn")
    errors["rtn"] = float((rtn.apply(weights, Scheme(weights=WeightScheme(bits=4, symmetric=True)), {}, rtn.parse({})).weight_NK - weights).square().mean())
    assert errors["nf4"] < errors["rtn"] < errors["fp4"]


def test_each_satisfies_its_own_format_only() -> None:
    abilities: dict[str, Ability] = {name: registry.get(name).ability for name in ("nf4", "fp4", "rtn")}
    able = {form: [name for name, ability in abilities.items() if ability.satisfies(scheme_of(form))] for form in ("nf4", "fp4", "uniform")}
    assert able == {"nf4": ["nf4"], "fp4": ["fp4"], "uniform": ["rtn"]}
