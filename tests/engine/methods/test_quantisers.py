"""Quantisers of training: golden levels, their straight-through gradients against the definitions and against finite differences, starts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitpress.engine.methods.distill.quantisers import (
    QUANTISERS,
    at_least,
    factor_of,
    least_error_step,
    levels_of,
    rounded,
    start_step,
    step_of,
    stored,
)  # fmt: skip

W = torch.tensor([[0.9, -0.3, 0.1, -1.2, 0.45, 0.0, -0.05, 0.7]])  # METHODS 0.6; mean of the absolute values .4625


def made(quantiser: str, w_Rg: Tensor, factor: Tensor, bits: int) -> Tensor:
    levels = levels_of(quantiser, bits)
    return rounded(quantiser, w_Rg, step_of(quantiser, factor, w_Rg, levels), levels)


def weights_of(seed: int, rows: int = 3, width: int = 16) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("quantiser", "factor", "bits", "expected"),
    [
        ("dynamic", 1.0, 2, [1, -1, 0, -1, 1, 0, 0, 1]),  # in multiples of alpha = gamma * .4625: three levels
        ("dynamic", 2.0, 2, [1, 0, 0, -1, 0, 0, 0, 1]),  # .45 / .925 rounds to 0
        ("dynamic", 2.0, 3, [3, -1, 0, -3, 1, 0, 0, 2]),  # step .925 / 3
        ("pact", 0.925, 3, [3, -1, 0, -3, 1, 0, 0, 2]),
        ("lsq", 0.5, 2, [1, -1, 0, -2, 1, 0, 0, 1]),  # four levels; -.3 / .5 = -.6 rounds to -1
    ],
)
def test_golden_levels(quantiser: str, factor: float, bits: int, expected: list[int]) -> None:
    levels = levels_of(quantiser, bits)
    step = float(step_of(quantiser, torch.tensor([[factor]]), W, levels))
    assert torch.allclose(made(quantiser, W, torch.tensor([[factor]]), bits), torch.tensor([expected]) * step)


@pytest.mark.parametrize(("quantiser", "count"), [("dynamic", 3), ("pact", 3), ("lsq", 4)])
def test_two_bits_have_exactly_so_many_levels(quantiser: str, count: int) -> None:
    w_Rg = weights_of(0, 1, 500)
    levels = levels_of(quantiser, 2)
    q_Rg = made(quantiser, w_Rg, factor_of(quantiser, torch.tensor([[0.7]]).double(), w_Rg, levels, whole=True), 2)
    assert len(q_Rg.unique()) == count == levels.number


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(QUANTISERS), st.sampled_from([2, 3, 4, 8]))
def test_every_value_is_a_level_and_the_nearest(seed: int, quantiser: str, bits: int) -> None:
    w_Rg, levels = weights_of(seed), levels_of(quantiser, bits)
    step_R1 = least_error_step(w_Rg, levels)
    whole_Rg = rounded(quantiser, w_Rg, step_R1, levels) / step_R1
    assert torch.allclose(whole_Rg, whole_Rg.round(), atol=1e-9)
    assert float(whole_Rg.min()) >= levels.low - 1e-9
    assert float(whole_Rg.max()) <= levels.top + 1e-9
    all_levels = torch.arange(levels.low, levels.top + 1)
    nearest = ((w_Rg / step_R1)[..., None] - all_levels).abs().amin(dim=-1)
    assert torch.allclose((w_Rg / step_R1 - whole_Rg).abs(), nearest, atol=1e-9)


def gradients(quantiser: str, w_Rg: Tensor, factor: Tensor, bits: int, pull_Rg: Tensor) -> tuple[Tensor, Tensor]:
    w_Rg, factor = w_Rg.clone().requires_grad_(), factor.clone().requires_grad_()
    (made(quantiser, w_Rg, factor, bits) * pull_Rg).sum().backward()
    return w_Rg.grad, factor.grad


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 3, 4, 8]), st.floats(0.3, 4.0))
def test_gradient_of_gamma_is_that_of_the_definition(seed: int, bits: int, gamma: float) -> None:
    """METHODS 12.2: sum of dL/dq * mean|w| * {(q - w) / alpha inside, sign(w) outside}; dL/dw is dL/dq inside and 0 outside."""
    w_Rg, pull_Rg, factor = weights_of(seed), weights_of(seed + 1), torch.full((1, 1), gamma, dtype=torch.float64)
    by_weight, by_gamma = gradients("dynamic", w_Rg, factor, bits, pull_Rg)
    means_R1 = w_Rg.abs().mean(dim=1, keepdim=True)
    alpha_R1, q_Rg = gamma * means_R1, made("dynamic", w_Rg, factor, bits)
    inside_Rg = w_Rg.abs() <= alpha_R1
    slope_Rg = torch.where(inside_Rg, (q_Rg - w_Rg) / alpha_R1, w_Rg.sign())
    assert torch.allclose(by_gamma, (pull_Rg * means_R1 * slope_Rg).sum().view(1, 1), atol=1e-9)
    assert torch.equal(by_weight, pull_Rg * inside_Rg)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(QUANTISERS), st.sampled_from([2, 4]))
def test_gradients_of_the_factor_against_finite_differences(seed: int, quantiser: str, bits: int) -> None:
    """Clipped weights: of the function itself. The others: of w + s * (round(w0 / s0) - w0 / s0), rounding being the identity (PACT: of w)."""
    w_Rg, pull_Rg, levels = weights_of(seed), weights_of(seed + 1), levels_of(quantiser, bits)
    factor = factor_of(quantiser, torch.full((3, 1), 0.6, dtype=torch.float64), w_Rg, levels, whole=False)
    start_R1 = step_of(quantiser, factor, w_Rg, levels)
    offset_Rg = (w_Rg / start_R1).round() - w_Rg / start_R1
    inside_Rg = (w_Rg / start_R1 >= levels.low) & (w_Rg / start_R1 <= levels.top)

    def loss(moved: Tensor) -> Tensor:
        step_R1 = step_of(quantiser, moved, w_Rg, levels)
        straight_Rg = w_Rg if quantiser == "pact" else w_Rg + step_R1 * offset_Rg
        clipped_Rg = (w_Rg / start_R1).clamp(levels.low, levels.top) * step_R1
        return (torch.where(inside_Rg, straight_Rg, clipped_Rg) * pull_Rg).sum(dim=1, keepdim=True)

    nudge = 1e-6
    differences_R1 = (loss(factor + nudge) - loss(factor - nudge)) / (2 * nudge)
    scale = (w_Rg.shape[1] * levels.top) ** -0.5 if quantiser == "lsq" else 1.0
    assert torch.allclose(gradients(quantiser, w_Rg, factor, bits, pull_Rg)[1], differences_R1 * scale, rtol=1e-5, atol=1e-6)


def test_clipped_weights_follow_the_function_itself() -> None:
    """With every weight beyond the clip nothing is rounded, so gamma's gradient is an ordinary derivative."""
    w_Rg, pull_Rg = weights_of(3).sign() * (1 + weights_of(4).abs()), weights_of(5)
    factor, nudge = torch.full((1, 1), 0.3, dtype=torch.float64), 1e-6
    two_sides = [float((made("dynamic", w_Rg, factor + move, 4) * pull_Rg).sum()) for move in (nudge, -nudge)]
    assert float(gradients("dynamic", w_Rg, factor, 4, pull_Rg)[1]) == pytest.approx((two_sides[0] - two_sides[1]) / (2 * nudge), rel=1e-6)


def test_steps_are_rounded_as_they_are_stored() -> None:
    steps_R1 = torch.tensor([[0.1234567], [0.0], [1e-45]], requires_grad=True)
    kept_R1 = stored(steps_R1)
    assert kept_R1.tolist() == [[float(torch.tensor(0.1234567).bfloat16())], [1.0], [1.0]]
    kept_R1.sum().backward()
    assert steps_R1.grad.tolist() == [[1.0], [1.0], [1.0]]


def test_a_factor_below_the_least_can_rise_again() -> None:
    factor = torch.tensor([[-0.5]], requires_grad=True)
    kept = at_least(factor, 0.01)
    assert float(kept.detach()) == pytest.approx(0.01)
    kept.sum().backward()
    assert float(factor.grad) == 1.0


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_start_of_least_error_beats_the_papers_and_the_widest(quantiser: str, bits: int) -> None:
    w_Rg, levels = weights_of(7, 8, 64), levels_of(quantiser, bits)

    def error(step_R1: Tensor) -> float:
        return float((rounded(quantiser, w_Rg, stored(step_R1), levels) - w_Rg).square().sum())

    best = error(start_step(quantiser, w_Rg, levels, least_error=True))
    assert best <= error(w_Rg.abs().amax(dim=1, keepdim=True) / levels.top)
    assert best <= error(start_step(quantiser, w_Rg, levels, least_error=False)) * 1.02, "no tried step is far from any other"


def test_the_papers_starts() -> None:
    assert float(start_step("dynamic", W, levels_of("dynamic", 2), least_error=False)) == pytest.approx(0.4625)
    assert float(start_step("lsq", W, levels_of("lsq", 4), least_error=False)) == pytest.approx(2 * 0.4625 / 7**0.5)


def test_one_factor_a_matrix_gives_about_the_same_steps_to_rows_alike() -> None:
    w_Rg, levels = weights_of(8, 4, 4096), levels_of("dynamic", 4)
    step_R1 = least_error_step(w_Rg, levels)
    whole = factor_of("dynamic", step_R1, w_Rg, levels, whole=True)
    assert whole.shape == (1, 1)
    assert torch.allclose(step_of("dynamic", whole, w_Rg, levels), step_R1, rtol=0.1)


def test_an_unknown_quantiser_is_named() -> None:
    with pytest.raises(ValueError, match="no quantiser 'sawb'"):
        step_of("sawb", torch.ones(1, 1), W, levels_of("dynamic", 2))
