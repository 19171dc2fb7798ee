"""Reading and changing parts of a model, and twins that share every weight."""

import pytest
import torch
from torch import nn

from bitpress.engine.errors import InputError
from bitpress.engine.model.inspect import anatomy_of
from bitpress.engine.model.surgery import drop_blocks, get, linear_weight, replace, set_linear_weight, twin

IDS = torch.arange(2, 26)[None]


def test_a_weight_goes_in_as_it_comes_out_conv1d_included(any_tiny):
    name, model = any_tiny
    anatomy = anatomy_of(model, name)
    before = model(input_ids=IDS).logits
    for part in anatomy.linears:
        module = get(model, part.name)
        set_linear_weight(module, linear_weight(module).clone())
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_the_weight_computes_what_the_layer_computes(tiny_models):
    for name in ("llama", "gpt2"):
        model = tiny_models(name)
        module = get(model, anatomy_of(model, name).linears[0].name)
        x = torch.randn(3, 64)
        expected = torch.nn.functional.linear(x, linear_weight(module), module.bias)
        torch.testing.assert_close(module(x), expected)


def test_a_wrong_shape_or_module_is_refused(tiny_models):
    model = tiny_models("gpt2")
    with pytest.raises(ValueError, match="does not fit"):
        set_linear_weight(get(model, "transformer.h.0.attn.c_attn"), torch.zeros(64, 192))
    with pytest.raises(TypeError, match="LayerNorm"):
        linear_weight(get(model, "transformer.ln_f"))
    with pytest.raises(InputError, match=r"transformer\.h\.9"):
        replace(model, "transformer.h.9", nn.Identity())


def test_a_twin_shares_all_weights_and_changes_alone(any_tiny):
    name, model = any_tiny
    anatomy = anatomy_of(model, name)
    before = model(input_ids=IDS).logits
    other = twin(model)
    assert {weight.data_ptr() for weight in other.parameters()} == {weight.data_ptr() for weight in model.parameters()}
    assert len(list(other.parameters())) == len(list(model.parameters()))
    set_linear_weight(get(other, anatomy.linears[0].name), torch.zeros(anatomy.linears[0].out_features, anatomy.linears[0].in_features))
    drop_blocks(other, anatomy, [2])
    assert not torch.equal(other(input_ids=IDS).logits, before)
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert anatomy_of(model, name) == anatomy


def test_a_model_that_lost_a_block_is_the_model_that_never_had_it(any_tiny):
    """Same logits as an identity in the block's place; in Gemma the kinds of the remaining layers must follow."""
    name, model = any_tiny
    anatomy = anatomy_of(model, name)
    skipped = twin(model)
    block = get(skipped, f"{anatomy.block_prefix}.1")
    wrapped = _returns_a_tuple(skipped, block)
    block.forward = lambda x, *args, **kwargs: (x, None) if wrapped else x
    expected = skipped(input_ids=IDS).logits
    assert drop_blocks(model, anatomy, [1]) == {0: 0, 2: 1}
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    assert anatomy_of(model, name).blocks == 2


def _returns_a_tuple(model, block):
    forms = []
    handle = block.register_forward_hook(lambda module, args, output: forms.append(type(output)))
    model(input_ids=IDS)
    handle.remove()
    return forms == [tuple]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt", "gpt_neox", "phi3"])
def test_a_shortened_model_generates_with_its_cache_as_without(tiny_models, family):
    model = tiny_models(family)
    drop_blocks(model, anatomy_of(model, family), [0])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    with_cache = model.generate(IDS, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(IDS, use_cache=False, **options))
    assert model.config.num_hidden_layers == 2


@pytest.mark.parametrize("blocks", [[3], [-1], [0, 1, 2]])
def test_blocks_that_cannot_go_are_refused(tiny_models, blocks):
    model = tiny_models("llama")
    with pytest.raises(InputError, match="cannot be dropped"):
        drop_blocks(model, anatomy_of(model, "llama"), blocks)
    assert len(model.model.layers) == 3
