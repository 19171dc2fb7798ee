"""Norms and gates of loaded models are the project's own where that changes nothing but time."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bitpress.engine.model import attention, between, surgery
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
@pytest.mark.parametrize(("family", "each", "turns"), [("llama", 2, 2), ("mistral", 2, 2), ("qwen2", 2, 2), ("qwen3", 4, 0), ("gpt2", 0, 0)])
def test_logits_are_those_of_torch_to_rounding(tiny_models, family, each, turns, monkeypatch):
    model = tiny_models(family).to(torch.bfloat16)
    attention.use_own(model)
    calls = {"rms_norm": 0, "gated_silu": 0, "turn_rounded": 0}
    for name in calls:
        plain = getattr(cpu_step, name)
        monkeypatch.setattr(cpu_step, name, lambda *args, name=name, plain=plain, **more: calls.update({name: calls[name] + 1}) or plain(*args, **more))
    with torch.no_grad():
        before = model(input_ids=IDS, use_cache=False).logits.float()
        between.use_own(model)
        calls.update(rms_norm=0, gated_silu=0, turn_rounded=0)
        after = model(input_ids=IDS, use_cache=False).logits.float()
        exact = copy.deepcopy(model).float()(input_ids=IDS).logits
    blocks = model.config.num_hidden_layers
    assert calls == {"rms_norm": each * blocks + (each > 0), "gated_silu": blocks * (each > 0), "turn_rounded": turns * blocks}
    assert (after - exact).norm() <= 1.1 * (before - exact).norm()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_whatever_type_weights_are_stored_in(tiny_models, family, dtype):
    model = tiny_models(family).to(dtype)
    attention.use_own(model)
    between.use_own(model)
    block = model.to(torch.bfloat16).model.layers[0]
    assert isinstance(block.input_layernorm, between.OwnNorm)
    assert isinstance(block.mlp, between.OwnGate)
    assert isinstance(block.self_attn, between.OwnAttention) == (family == "llama"), "Qwen3 norms its heads before it turns them"
    with torch.no_grad():
        assert model(input_ids=IDS, use_cache=False).logits.isfinite().all()


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


class StrangeRMSNorm(OffsetRMSNorm):
    """One that must be told more."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x) * scale


@needs_kernels
@pytest.mark.parametrize("kind", [OffsetRMSNorm, StrangeRMSNorm, GeluGate])
def test_what_answers_otherwise_is_left_alone(kind):
    model = nn.Sequential(kind().to(torch.bfloat16))
    between.use_own(model)
    assert type(model[0]) is kind


def test_nothing_happens_without_kernels(tiny_models, monkeypatch):
    monkeypatch.setattr(cpu_step, "available", lambda: False)
    model = tiny_models("llama")
    between.use_own(model)
    assert not any(isinstance(module, between.OwnNorm | between.OwnGate) for module in model.modules())


@needs_kernels
@pytest.mark.parametrize("length", [3, 40])
def test_padding_and_a_cache_go_the_old_way_and_short_texts_are_the_same(tiny_models, length, monkeypatch):
    model = tiny_models("llama").to(torch.bfloat16)
    attention.use_own(model)
    ids = IDS[:, :length]
    padded = torch.ones_like(ids)
    padded[0, :2] = 0
    with torch.no_grad():
        wanted = [model(input_ids=ids, use_cache=False).logits, model(input_ids=ids, attention_mask=padded).logits, model(input_ids=ids, use_cache=True).logits]
        between.use_own(model)
        found = [model(input_ids=ids, use_cache=False).logits]
        monkeypatch.setattr(cpu_step, "turn_rounded", lambda *_: pytest.fail("the short way knows neither padding nor a cache"))
        found += [model(input_ids=ids, attention_mask=padded).logits, model(input_ids=ids, use_cache=True).logits]
    for one, two in zip(found, wanted, strict=True):
        assert ((one - two).float().norm() / two.float().norm()) < 0.02


@needs_kernels
def test_heads_that_were_removed_unevenly_go_the_old_way(tiny_models):
    model = tiny_models("llama").to(torch.bfloat16)
    attention.use_own(model)
    between.use_own(model)
    own = model.model.layers[0].self_attn
    assert isinstance(own, between.OwnAttention)
    x = torch.zeros(1, 4, own.q_proj.in_features, dtype=torch.bfloat16)
    tables = (torch.zeros(1, 4, own.head_dim, dtype=torch.bfloat16),) * 2
    with torch.no_grad():
        assert between._turns(own, x, tables)
        assert not between._turns(own, x.float(), tables)
        assert not between._turns(own, x, None)
        own.register_buffer("key_head_of", torch.tensor([0, 0]))
        assert not between._turns(own, x, tables)
