"""Links: found in every family, and a folded scale leaves the logits as they were."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bitpress.engine.model.inspect import anatomy_of
from bitpress.engine.model.links import fold, links_of, tie_heads
from bitpress.engine.model.surgery import twin

IDS = torch.randint(2, 300, (2, 16), generator=torch.Generator().manual_seed(1))
GATED = {"llama", "llama_untied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"}


def test_folding_any_link_of_any_family_changes_no_logit(any_tiny: tuple[str, Any]) -> None:
    name, model = any_tiny
    anatomy, folded = anatomy_of(model, name), twin(model)
    with torch.no_grad():
        for part in anatomy.linears:  # biases and gains that are not the trivial ones
            module = model.get_submodule(part.name)
            if isinstance(module.bias, torch.Tensor):
                module.bias.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(len(part.name)))
    expected, draw = model(input_ids=IDS).logits, torch.Generator().manual_seed(2)
    links = links_of(model, anatomy)
    for link in links:
        width = anatomy.by_name[link.readers[0]].in_features
        scale = torch.rand(width, generator=draw) * 3 + 0.3
        fold(folded, anatomy, link, tie_heads(scale, anatomy) if link.kind == "v" else scale)
    if name in GATED:
        assert {link.kind for link in links} == {"norm", "v", "up"}
        assert len(links) == 4 * anatomy.blocks
    if links:
        assert any(not torch.equal(one, other) for one, other in zip(model.parameters(), folded.parameters(), strict=True))
    torch.testing.assert_close(folded(input_ids=IDS).logits, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=0)


def test_norm_links_hold_every_reader(tiny_models: Callable[..., Any]) -> None:
    model = tiny_models("llama")
    links = [link for link in links_of(model, anatomy_of(model, "llama")) if link.kind == "norm"]
    assert [tuple(name.rsplit(".", 1)[1] for name in link.readers) for link in links[:2]] == [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
    assert links[0].source == "model.layers.0.input_layernorm"


def test_a_block_without_separate_parts_has_no_inner_links(tiny_models: Callable[..., Any]) -> None:
    model = tiny_models("gpt2")
    assert {link.kind for link in links_of(model, anatomy_of(model, "gpt2"))} == {"norm"}


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_an_untied_scale_between_v_and_o_would_not_do(architecture: str, tiny_models: Callable[..., Any]) -> None:
    model = tiny_models(architecture)
    anatomy = anatomy_of(model, architecture)
    link = next(link for link in links_of(model, anatomy) if link.kind == "v")
    changed = twin(model)
    fold(changed, anatomy, link, torch.rand(anatomy.heads * anatomy.head_dim, generator=torch.Generator().manual_seed(0)) + 0.5)
    assert not torch.allclose(changed(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-3, atol=1e-4)
