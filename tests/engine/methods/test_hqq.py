"""HQQ: against a plain loop of the published steps, never worse than its start, float and integer zeros, edge groups."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitpress.engine.accounting import layout_of
from bitpress.engine.methods import registry
from bitpress.engine.methods.quantize.hqq import HqqOptions, nearest, solve, start_grid
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


def published(group: np.ndarray, bits: int, steps: int) -> tuple[float, np.ndarray]:
    """Zero and codes of one group after some steps of METHODS 15.6, the best by mean |error|, in float64."""
    top = 2**bits - 1
    scale = float(torch.tensor((group.max() - group.min()) / top).to(torch.bfloat16))
    zero, beta, best = float(torch.tensor(-group.min() / scale).to(torch.bfloat16)), 10.0, (np.inf, 0.0, group)
    for _ in range(steps + 1):
        codes = np.clip(np.round(group / scale + zero), 0, top)
        error = group - (codes - zero) * scale
        if abs(error).mean() < best[0]:
            best = (abs(error).mean(), zero, codes)
        with np.errstate(divide="ignore"):
            kept = np.sign(error) * np.maximum(abs(error) - abs(error) ** -0.3 / beta, 0)
        zero = float(torch.tensor((codes - (group - kept) / scale).mean()).to(torch.bfloat16))
        beta *= 1.01
    return best[1], best[2]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_is_the_published_solver_with_the_best_step_kept(bits: int) -> None:
    weights, scheme = outlying(bits, rows=8), scheme_of(bits)
    made = solved(weights, scheme, iterations=5)
    same = 0
    for row in range(8):
        for group in range(4):
            zero, codes = published(weights[row, group * 16 : group * 16 + 16].double().numpy(), bits, 5)
            same += made.codes.zeros_NG[row, group].item() == zero and made.codes.codes_NK[row, group * 16 : group * 16 + 16].tolist() == codes.tolist()
    assert same >= 30, "float32 may round one of 32 zeros the other way"


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.sampled_from(BITS), group=st.sampled_from((0, 8, 24)), zero=st.sampled_from(("integer", "float")))
def test_no_group_ends_worse_than_it_started(seed: int, bits: int, group: int, zero: str) -> None:
    weights, scheme = outlying(seed), WeightScheme(bits=bits, group_size=group, zero=zero)  # type: ignore[arg-type]
    padded = torch.nn.functional.pad(weights, (0, -64 % (group or 64))).view(4, -1, group or 64)
    real = torch.nn.functional.pad(torch.ones(1, 64), (0, -64 % (group or 64))).view(1, -1, group or 64)
    grid = start_grid(padded, real, scheme)
    before = ((nearest(padded, grid) - grid.zero) * grid.scale - padded).abs().mul(real).sum(-1)
    best = solve(padded, real, grid, scheme, HqqOptions())
    after = ((best.codes - best.zero) * grid.scale - padded).abs().mul(real).sum(-1)
    assert (after <= before * (1 + 1e-5)).all()


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
