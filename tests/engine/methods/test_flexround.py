"""FlexRound: its start, its gradients against the definition, what is stored, what it gains on one layer."""

import pytest
import torch
from torch import Tensor

from bitpress.engine.methods import registry
from bitpress.engine.methods.base import LearnedWeight
from bitpress.engine.methods.quantize.pipeline import ClipSearch, dequantize_groups, quantize_groups
from bitpress.engine.recipe import Scheme, WeightScheme


def weights_of(seed: int, rows: int = 6, width: int = 24) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


METHOD = registry.get("flexround")


def started(weight_NK: Tensor, name: str = "flexround", bits: int = 3, group: int = 8, symmetric: bool = False, **options: object) -> LearnedWeight:
    method = registry.get(name)
    return method.start(weight_NK, Scheme(weights=WeightScheme(bits=bits, group_size=group, symmetric=symmetric)), {}, method.parse(options))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [0, 8, 10])
def test_the_start_is_rounding_after_a_clip_search(group: int, symmetric: bool) -> None:
    scheme = WeightScheme(bits=3, group_size=group, symmetric=symmetric)
    learned = started(weights_of(0), group=group, symmetric=symmetric)
    codes = quantize_groups(weights_of(0), scheme, ClipSearch())
    assert torch.allclose(learned.outcome().weight_NK, dequantize_groups(codes, scheme), atol=1e-6)


def test_gradients_are_those_of_the_definition() -> None:
    """METHODS 1.9 written out, with rounding as the identity in the backward pass."""
    weights, learned = weights_of(1), started(weights_of(1), bits=2)
    reshape = learned.reshape
    with torch.no_grad():
        reshape.element.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(0))
        reshape.group.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(1))
    pull = weights_of(2)
    (learned() * pull).sum().backward()

    log_scale, element, group = (part.detach().clone().requires_grad_() for part in (reshape.log_scale, reshape.element, reshape.group))
    free = weights.view(-1, 8) / (log_scale + element + group).exp() + learned.zero_R1
    rounded = free + (free.round() - free).detach()
    stored = learned.grid().scale
    scale = log_scale.exp() * (stored / log_scale.exp()).detach()
    ((rounded.clamp(0, 3) - learned.zero_R1) * scale * pull.view(-1, 8)).sum().backward()
    for made, right in ((reshape.log_scale, log_scale), (reshape.element, element), (reshape.group, group)):
        assert torch.allclose(made.grad, right.grad, atol=2e-2 * float(right.grad.abs().max())), "equal but for the stored scale's rounding"


@pytest.mark.parametrize("name", ["flexround", "omniquant"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_stored_is_what_was_trained(name: str, symmetric: bool) -> None:
    weights = weights_of(3, 5, 21)
    weights[weights.abs() < 0.5] = 0
    learned = started(weights, name, symmetric=symmetric)
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    outcome = learned.eval().outcome()
    assert torch.allclose(learned().detach(), outcome.weight_NK, rtol=1e-5, atol=1e-6)
    scheme = WeightScheme(bits=3, group_size=8, symmetric=symmetric)
    assert torch.equal(dequantize_groups(outcome.codes, scheme), outcome.weight_NK)
    assert (outcome.weight_NK[weights == 0] == 0).all(), "pruned weights stay zero"


def output_error(learned: LearnedWeight, weights: Tensor, x_MK: Tensor) -> float:
    with torch.no_grad():
        return float((x_MK @ (learned.eval()() - weights).t()).square().mean() / (x_MK @ weights.t()).square().mean())


@pytest.mark.parametrize("name", ["flexround", "omniquant"])
def test_training_lowers_the_error_of_a_layer(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    weights = weights_of(5, 32, 64)
    mixing = torch.randn(64, 64, generator=generator) / 8
    options = {"start": "wide", "rate": 0.05} if name == "omniquant" else {}
    learned = started(weights, name, bits=2, group=32, **options)
    fresh = torch.randn(512, 64, generator=generator) @ mixing
    before = output_error(learned, weights, fresh)
    optimiser = torch.optim.Adam(learned.rates())
    for _ in range(60):
        x_MK = torch.randn(128, 64, generator=generator) @ mixing
        loss = (x_MK @ (learned.train()() - weights).t()).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert output_error(learned, weights, fresh) < 0.99 * before


@pytest.mark.parametrize("name", ["flexround", "omniquant", "uniquanf"])
def test_the_start_is_that_of_gptq_where_second_moments_are_known(name: str) -> None:
    weights, generator = weights_of(8, 16, 48), torch.Generator().manual_seed(8)
    weights[:, 5] = 0
    x_MK = torch.randn(256, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    gram = (x_MK.t() @ x_MK / 256).double()
    method = registry.get(name)
    scheme = Scheme(weights=WeightScheme(bits=3, group_size=20, format="bcq" if name == "uniquanf" else "uniform"))
    options = method.parse({})
    assert method.needs_for(options) == {"gram", "second_moment"}
    assert method.needs_for(method.parse({"compensate": False, "by_inputs": False})) == set()
    plain, made = (method.start(weights, scheme, stats, options).outcome().weight_NK for stats in ({}, {"gram": gram}))
    before, after = ((x_MK @ (stored - weights).t()).square().mean() for stored in (plain, made))
    assert after < 0.9 * before
    if name != "uniquanf":
        assert not made[:, 5].any()


def test_a_compensated_start_rounds_as_gptq_does() -> None:
    weights, generator = weights_of(9, 8, 48), torch.Generator().manual_seed(9)
    gram = torch.cov(torch.randn(48, 200, generator=generator)).double()
    scheme = Scheme(weights=WeightScheme(bits=3, group_size=16))
    stats = {"gram": gram, "second_moment": gram.diagonal()}
    method, gptq = registry.get("flexround"), registry.get("gptq")
    start = method.start(weights, scheme, stats, method.parse({})).outcome()
    rounded = gptq.apply(weights, scheme, stats, gptq.parse({"clip_search": True, "static_groups": True, "act_order": False}))
    same = (start.codes.codes_NK == rounded.codes.codes_NK).float().mean()
    assert same > 0.97, "but for importances floored at a thousandth, and ties"


@pytest.mark.parametrize("zero", ["integer", "float"])
def test_a_mended_start_is_nearer_and_is_what_is_stored(zero: str) -> None:
    """Codes and grids that were mended in turn before the first step, as GPTQ's rounds do."""
    chance = torch.Generator().manual_seed(0)
    inputs_MK = torch.randn(160, 40, generator=chance) @ torch.randn(40, 40, generator=chance)
    gram_KK, weight_NK = (inputs_MK.t() @ inputs_MK / 160).double(), torch.randn(6, 40, generator=chance)
    scheme, stats = Scheme(weights=WeightScheme(bits=3, group_size=16, zero=zero)), {"gram": gram_KK, "second_moment": gram_KK.diagonal()}
    left = []
    for rounds in (0, 3):
        learned = METHOD.start(weight_NK, scheme, stats, METHOD.parse({"mending": rounds})).eval()
        made = learned.outcome().weight_NK
        torch.testing.assert_close(learned().detach(), made)
        left.append(float(((made - weight_NK).double() @ gram_KK * (made - weight_NK)).sum()))
    assert left[1] < left[0]
