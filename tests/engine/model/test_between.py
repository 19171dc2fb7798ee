"""Norms and gates of loaded models are the project's own where that changes nothing but time."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bitpress.engine.model import between, surgery
from bitpress.kernels import cpu_step

IDS = torch.randint(2, 300, (3, 64), generator=torch.Generator().manual_seed(0))
needs_kernels = pytest.mark.skipif(not cpu_step.available(), reason="no compiled kernels on this machine")


class OffsetRMSNorm(nn.Module):
    """Gemma's: the weight is what is added to one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(0.1 * torch.randn(32)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight.float())).to(x.dtype)


class GeluGate(nn.Module):
    """An MLP with another gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@needs_kernels
@pytest.mark.parametrize(("family", "each"), [("llama", 2), ("mistral", 2), ("qwen2", 2), ("qwen3", 4), ("gpt2", 0)])
def test_logits_are_those_of_torch_to_rounding(tiny_models, family, each, monkeypatch):
    model = tiny_models(family).to(torch.bfloat16)
    calls = {"rms_norm": 0, "gated_silu": 0}
    for name in calls:
        plain = getattr(cpu_step, name)
        monkeypatch.setattr(cpu_step, name, lambda *args, name=name, plain=plain, **more: calls.update({name: calls[name] + 1}) or plain(*args, **more))
    with torch.no_grad():
        before = model(input_ids=IDS).logits.float()
        between.use_own(model)
        calls.update(rms_norm=0, gated_silu=0)
        after = model(input_ids=IDS).logits.float()
        exact = copy.deepcopy(model).float()(input_ids=IDS).logits
    blocks = model.config.num_hidden_layers
    assert calls == {"rms_norm": each * blocks + (each > 0), "gated_silu": blocks * (each > 0)}
    assert (after - exact).norm() <= 1.1 * (before - exact).norm()


@needs_kernels
def test_names_stay_and_a_second_time_changes_nothing(tiny_models):
    model = tiny_models("llama")
    names = [type(module).__name__ for module in model.modules()]
    between.use_own(model)
    kinds = [type(module) for module in model.modules()]
    between.use_own(model)
    assert [type(module) for module in model.modules()] == kinds
    assert [kind.__name__ for kind in kinds] == names
    assert any(issubclass(kind, between.OwnNorm) for kind in kinds)


@needs_kernels
def test_float32_gradients_and_twins_go_the_old_way(tiny_models):
    model = tiny_models("llama")
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        between.use_own(model)
        assert torch.equal(model(input_ids=IDS).logits, wanted)
    twin = surgery.twin(model).to(torch.bfloat16).requires_grad_(True)
    twin(input_ids=IDS).logits.sum().backward()
    assert twin.model.layers[0].input_layernorm.weight.grad.isfinite().all()
    assert twin.model.layers[0].mlp.gate_proj.weight.grad.count_nonzero() > 0


@needs_kernels
@pytest.mark.parametrize("kind", [OffsetRMSNorm, GeluGate])
def test_what_answers_otherwise_is_left_alone(kind):
    model = nn.Sequential(kind().to(torch.bfloat16))
    between.use_own(model)
    assert type(model[0]) is kind


def test_nothing_happens_without_kernels(tiny_models, monkeypatch):
    monkeypatch.setattr(cpu_step, "available", lambda: False)
    model = tiny_models("llama")
    between.use_own(model)
    assert not any(isinstance(module, between.OwnNorm | between.OwnGate) for module in model.modules())
