"""AWQ and SmoothQuant: factors by their formulas, the search never worse than no factor, clipping, refusals."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitpress.engine.methods import registry
from bitpress.engine.methods.prepare.awq import centred, gram_blocks, rounded
from bitpress.engine.recipe import Scheme, WeightScheme

AWQ: Any = registry.get("awq")
SMOOTH: Any = registry.get("smoothquant")


def outlying(seed: int, width: int = 48) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights, and statistics of inputs of which a few channels are much larger than the others."""
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.rand(width, generator=draw).mul(4).exp()
    x_MK = torch.randn(400, width, generator=draw, dtype=torch.float64) * sizes
    stats = {"gram": x_MK.t() @ x_MK / 400, "mean_abs": x_MK.abs().mean(0), "peak": x_MK.abs().amax(0)}
    return torch.randn(10, width, generator=draw), stats


def output_error(weight_NK: Tensor, made_NK: Tensor, gram_KK: Tensor) -> float:
    gap = (made_NK - weight_NK).double()
    return float(((gap @ gram_KK) * gap).sum())


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.sampled_from((2, 3, 4)), group=st.sampled_from((0, 16, 20)), form=st.sampled_from(("uniform", "nf4")))
def test_the_scale_never_costs_and_the_limits_never_cost(seed: int, bits: int, group: int, form: str) -> None:
    weights, stats = outlying(seed)
    scheme = Scheme(weights=WeightScheme(bits=4 if form == "nf4" else bits, group_size=group, format=form))  # type: ignore[arg-type]
    options = AWQ.parse({})
    scale = AWQ.scale([weights], [scheme], stats, options).float()
    plain = output_error(weights, rounded(weights, scheme.weights), stats["gram"])
    scaled = output_error(weights, rounded(weights * scale, scheme.weights) / scale, stats["gram"])
    assert scaled <= plain * (1 + 1e-4)
    limits = AWQ.limits(weights, scheme, stats["gram"], "up", options)
    largest = torch.nn.functional.pad(weights, (0, -48 % (group or 48))).view(10, -1, group or 48).abs().amax(-1)
    assert ((limits <= largest) & (limits >= largest * 0.5)).all()


def test_large_inputs_gain_from_the_scale() -> None:
    weights, stats = outlying(1)
    scheme = Scheme(weights=WeightScheme(bits=3, group_size=16))
    scale = AWQ.scale([weights, weights], [scheme, Scheme()], stats, AWQ.parse({})).float()
    scaled = output_error(weights, rounded(weights * scale, scheme.weights) / scale, stats["gram"])
    assert scaled < 0.9 * output_error(weights, rounded(weights, scheme.weights), stats["gram"])
    assert scale[stats["mean_abs"].argmax()] > scale[stats["mean_abs"].argmin()]


def test_factors_lie_on_both_sides_of_1() -> None:
    size = torch.tensor([0.01, 1.0, 100.0])
    assert centred(size, 0.0).tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(centred(size, 0.5), torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64), rtol=1e-6, atol=0.0)
    assert centred(torch.zeros(3), 0.5).tolist() == [1.0, 1.0, 1.0], "inputs that never came have no size"


def test_limits_are_the_best_of_ten_by_the_outputs_of_each_group() -> None:
    weights, stats = outlying(2)
    scheme = Scheme(weights=WeightScheme(bits=2, group_size=16))
    limits = AWQ.limits(weights, scheme, stats["gram"], "down", AWQ.parse({}))
    blocks = gram_blocks(stats["gram"], 16)
    row, group = 3, 1
    part, moments = weights[row : row + 1, 16:32], blocks[group].double()
    scored = []
    for step in range(10):
        limit = part.abs().max() * (1 - step / 20)
        gap = (rounded(part.clamp(-limit, limit), scheme.weights) - part).double()
        scored.append((float((gap @ moments * gap).sum()), float(limit)))
    assert limits[row, group].item() == pytest.approx(min(scored)[1], rel=1e-6)


@pytest.mark.parametrize(("role", "options", "scheme"), [
    ("q", {}, Scheme(weights=WeightScheme(bits=4))),
    ("up", {"clip": False}, Scheme(weights=WeightScheme(bits=4))),
    ("up", {}, Scheme()),
])  # fmt: skip
def test_what_is_not_clipped(role: str, options: dict[str, Any], scheme: Scheme) -> None:
    weights, stats = outlying(3)
    assert AWQ.limits(weights, scheme, stats["gram"], role, AWQ.parse(options)) is None


def test_smoothquant_shares_the_outliers_as_alpha_says() -> None:
    weights, stats = torch.tensor([[1.0, -4.0], [0.5, 2.0]]), {"peak": torch.tensor([16.0, 1.0]).double()}
    assert SMOOTH.scale([weights], [Scheme()], stats, SMOOTH.parse({})).tolist() == [4.0, 0.5]
    assert SMOOTH.scale([weights], [Scheme()], stats, SMOOTH.parse({"alpha": 1.0})).tolist() == [16.0, 1.0]
    assert SMOOTH.scale([weights], [Scheme()], stats, SMOOTH.parse({"alpha": 0.0})).tolist() == [1.0, 0.25]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), alpha=st.floats(0, 1))
def test_what_leaves_the_activations_enters_the_weights(seed: int, alpha: float) -> None:
    weights, stats = outlying(seed)
    scale = SMOOTH.scale([weights], [Scheme()], stats, SMOOTH.parse({"alpha": alpha}))
    assert (scale > 0).all()
    inputs, rows = stats["peak"] / scale, weights.abs().amax(0).double() * scale
    torch.testing.assert_close(inputs * rows, stats["peak"] * weights.abs().amax(0), rtol=1e-9, atol=0.0)
