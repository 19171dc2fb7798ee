"""Models attend by the project's kernel, and it changes nothing but time."""

import pytest
import torch

from bitpress.engine.model import attention
from bitpress.kernels import cpu_build
from bitpress.kernels.attention import attend_back

LIB = cpu_build.library()
IDS = torch.randint(2, 300, (3, 64), generator=torch.Generator().manual_seed(0))


@pytest.mark.skipif(LIB is None or not LIB.bitpress_has_panels(), reason="no compiled bfloat16 kernels on this machine")
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_logits_are_those_of_torch_to_rounding(tiny_models, family, monkeypatch):
    model = tiny_models(family).to(torch.bfloat16)
    calls = []
    monkeypatch.setattr(attention, "attend_back", lambda *sides: calls.append(1) or attend_back(*sides))
    with torch.no_grad():
        before = model(input_ids=IDS).logits.float()
        attention.use_own(model)
        after = model(input_ids=IDS).logits.float()
        exact = model.float()(input_ids=IDS).logits
    assert len(calls) == model.config.num_hidden_layers
    assert (after - exact).norm() <= 1.2 * (before - exact).norm()


def test_padding_and_gradients_go_to_torch(tiny_models, monkeypatch):
    model = tiny_models("llama").to(torch.bfloat16)
    attention.use_own(model)
    monkeypatch.setattr(attention, "attend_back", lambda *sides: pytest.fail("the kernel knows neither padding nor gradients"))
    padded = torch.ones_like(IDS)
    padded[0, :5] = 0
    with torch.no_grad():
        assert model(input_ids=IDS, attention_mask=padded).logits.isfinite().all()
    model.requires_grad_(True)
    model(input_ids=IDS).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad.isfinite().all()


def test_a_model_that_attends_otherwise_is_left_alone(tiny_models):
    model = tiny_models("llama")
    model.config._attn_implementation = "eager"
    attention.use_own(model)
    assert model.config._attn_implementation == "eager"
