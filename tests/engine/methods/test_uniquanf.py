"""UniQuanF: unified start, gradients of METHODS 1.4, local and periodic mapping, unification into a plain binary code, the toy layer of 1.8."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitpress.engine.methods import registry
from bitpress.engine.methods.quantize.binary import Planes, alternate, error_of, fit_rows, greedy, nearest, signs, unified
from bitpress.engine.methods.quantize.pipeline import ClipSearch, dequantize_groups, quantize_groups
from bitpress.engine.methods.quantize.uniquanf import UnifiedWeight, nearest_neighbour
from bitpress.engine.recipe import Scheme, WeightScheme
from bitpress.kernels import reference


def weights_of(seed: int, rows: int = 6, width: int = 24) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def started(weight_NK: Tensor, bits: int = 3, group: int = 8, **options: object) -> UnifiedWeight:
    method = registry.get("uniquanf")
    return method.start(weight_NK, Scheme(weights=WeightScheme(bits=bits, group_size=group, format="bcq")), {}, method.parse(options))


def moved(learned: UnifiedWeight, by: float = 0.1) -> UnifiedWeight:
    """Every parameter pushed a little."""
    with torch.no_grad():
        for number, parameter in enumerate(learned.parameters()):
            parameter += by * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(number))
    return learned


def test_the_unified_start_puts_the_middle_of_the_levels_in_the_middle_of_the_range() -> None:
    groups = weights_of(0)
    planes = unified(groups, 3, 15, 1)
    assert torch.allclose(planes.shift, (groups.amin(1, keepdim=True) + groups.amax(1, keepdim=True)) / 2, atol=1e-6)
    searched = unified(groups, 3, 15, 20)
    assert (error_of(groups, searched, 2.4) <= error_of(groups, planes, 2.4) + 1e-9).all()


def test_the_best_start_loses_to_none_of_its_choices() -> None:
    weights, scheme = weights_of(1, 16, 64).pow(3), WeightScheme(bits=3, group_size=32)
    groups = weights.view(-1, 32)
    made = started(weights, group=32, start="best")
    error = (made.eval()().detach().view(-1, 32) - groups).square().sum(1)
    clipped = (dequantize_groups(quantize_groups(weights, scheme, ClipSearch()), scheme).view(-1, 32) - groups).square().sum(1)
    mean = groups.mean(1, keepdim=True)
    binary = error_of(groups, alternate(groups, greedy(groups, 3, mean), 15, True).planes)[:, 0]
    assert (error <= torch.minimum(clipped, binary) * 1.05).all(), "but for alphas rounded to what is stored"


def test_gradients_are_those_of_the_definition() -> None:
    """Appendix C of METHODS: straight through where near, true gradients for the alphas, the scale's own everywhere."""
    weights, pull = weights_of(2), weights_of(3)
    learned = moved(started(weights, bits=2), 0.3)
    (learned.train()() * pull).sum().backward()
    reshape = learned.reshape
    d1, d2, d3, alphas = (part.detach().clone().requires_grad_() for part in (reshape.log_scale, reshape.element, reshape.group, learned.alphas))
    u = weights.view(-1, 8) / (d1 + d2 + d3).exp() + learned.offset_R1
    levels = alphas @ signs(2).t()
    q = levels.gather(1, nearest(u.detach(), levels.detach()))
    near = (u - q).abs() <= alphas.abs().amin(1, keepdim=True)
    assert 0.5 < near.float().mean() < 1, "the filter has work here"
    inner = torch.where(near, q, q.detach()) + torch.where(near, u, u.detach()) - u.detach()
    ((inner - learned.offset_R1) * d1.exp() * pull.view(-1, 8)).sum().backward()
    for made, right in ((reshape.log_scale, d1), (reshape.element, d2), (reshape.group, d3), (learned.alphas, alphas)):
        assert torch.allclose(made.grad, right.grad, atol=2e-2 * float(right.grad.abs().max())), "equal but for rounding to what is stored"


@settings(max_examples=25, deadline=None)
@given(bits=st.integers(2, 4), seed=st.integers(0, 1000))
def test_unification_is_exact(bits: int, seed: int) -> None:
    """METHODS 1.5: D(M(T(w))) with scale, zero and middle is a binary code with s * alpha and one shift."""
    generator = torch.Generator().manual_seed(seed)
    x, z = torch.randn(4, 16, generator=generator).double(), torch.randn(4, 1, generator=generator).double()
    s, alphas = torch.rand(4, 1, generator=generator).double() + 0.1, torch.rand(4, bits, generator=generator).double()
    middle = (2**bits - 1) / 2
    levels = alphas @ signs(bits).double().t()
    places = nearest(x + z - middle, levels)
    long_way = (levels.gather(1, places) + middle - z) * s
    folded = Planes(alphas * s, s * (middle - z))
    assert torch.allclose(folded.levels().gather(1, places) + folded.shift, long_way, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [0, 8, 10])
def test_exported_codes_dequantise_to_the_trained_weights(bits: int, group: int) -> None:
    weights = weights_of(4)
    learned = moved(started(weights, bits, group))
    for _ in range(3):  # an odd number of calls: the codes of training are stale
        learned.train()()
    outcome = learned.outcome()
    trained = learned.eval()().detach()
    assert torch.equal(reference.dequantize(outcome.packed), outcome.weight_NK)
    assert float((outcome.weight_NK - trained).abs().max()) <= 1e-5 * float(trained.abs().max())


def test_levels_change_only_every_other_step_and_by_one_place() -> None:
    learned = started(weights_of(5, 16, 32), bits=3, period=2).train()
    learned()
    first = learned.places_Rg.clone()
    moved(learned, 0.5)
    learned()
    second = learned.places_Rg.clone()
    assert not torch.equal(first, second)
    assert int((first - second).abs().max()) == 1
    learned()
    assert torch.equal(learned.places_Rg, second)


def test_a_neighbour_is_taken_only_when_it_is_nearer() -> None:
    levels = torch.tensor([[3.0, 1.0, -1.0, -3.0]])
    places = nearest_neighbour(torch.tensor([[2.5, 2.5, -3.0, 0.0]]), levels, torch.tensor([[3, 1, 0, 1]]))
    assert places.tolist() == [[2, 0, 1, 1]]


def test_an_unfit_scheme_is_not_satisfied() -> None:
    assert not registry.get("uniquanf").satisfies(Scheme(weights=WeightScheme(bits=3)))


def relative_output_error(made: Tensor, weights: Tensor, moment: Tensor) -> float:
    gap = made - weights
    return float(((gap @ moment) * gap).sum() / ((weights @ moment) * weights).sum())


def trained_toy(seed: int, bits: int, steps: int = 120) -> tuple[float, float, float]:
    """Output errors of UniQuanF, clipped rounding and alternating BCQ on the layer of METHODS 1.8: 64 x 192, correlated inputs, 4 outlier channels."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(64, 192, generator=generator)
    mixing = torch.randn(192, 192, generator=generator) / math.sqrt(192) + torch.eye(192)
    mixing[:, :4] *= 8
    moment, scheme = mixing.t() @ mixing, WeightScheme(bits=bits, group_size=0)
    learned = started(weights, bits, 0, rate=2e-3, alpha_rate=2e-4)
    optimiser = torch.optim.Adam(learned.rates())
    for step in range(steps):
        for group, peak in zip(optimiser.param_groups, (2e-3, 2e-4), strict=True):
            group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * step / steps))
        x_MK = torch.randn(256, 192, generator=generator) @ mixing
        loss = (x_MK @ (learned.train()() - weights).t()).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    planes = fit_rows(weights, 0, lambda groups, _: alternate(groups, greedy(groups, bits, torch.zeros(len(groups), 1)), 15, False).planes)
    binary = planes.levels().gather(1, nearest(weights, planes.levels()))
    clipped = dequantize_groups(quantize_groups(weights, scheme, ClipSearch()), scheme)
    return tuple(relative_output_error(made, weights, moment) for made in (learned.eval()().detach(), clipped, binary))


@pytest.mark.parametrize("bits", [2, 3])
def test_on_the_toy_layer_it_beats_clipped_rounding_and_binary_coding_on_average(bits: int) -> None:
    errors = torch.tensor([trained_toy(seed, bits) for seed in range(5)]).mean(dim=0)
    assert errors[0] < 0.95 * errors[1:].min()
