"""Our loop against transformers' own logits, step by step; dense and packed; every family through the same calls."""

import pytest
import torch
from torch import nn

from bitpress.engine.decode import Decoder
from bitpress.engine.errors import InputError
from bitpress.kernels import cpu_build
from bitpress.kernels.formats import PackedTensor, pack
from bitpress.kernels.layout import UniformLayout
from bitpress.kernels.packed import PackedEmbedding, PackedLinear

OWN = ("llama", "llama_untied", "mistral", "qwen2", "qwen3")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 320, (length,), generator=torch.Generator().manual_seed(seed))


def plain(model: nn.Module, ids_T: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids_T[None]).logits[0].float()


def stepped(decoder: Decoder, ids_T: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits after the prompt and after each single token behind it."""
    return torch.stack([decoder.prefill(ids_T[:prompt]), *(decoder.step(int(token)) for token in ids_T[prompt:])])


def random_packed(weight: torch.Tensor, layout: UniformLayout) -> PackedTensor:
    """Random codes of the weight's shape and about its size."""
    codes = torch.randint(0, 2**layout.bits, weight.shape, dtype=torch.uint8)
    scales = torch.full((len(weight), layout.groups(weight.shape[1])), 2.0 ** -(layout.bits + 2))
    zeros = None if layout.symmetric else torch.full_like(scales, 2 ** (layout.bits - 1))
    return pack(codes, scales, zeros, layout)


def pack_linears(model: nn.Module, widths: dict[str, int]) -> nn.Module:
    """Put packed layers of random codes into a model, 4 bits unless named otherwise, and return it."""
    for block in model.model.layers:
        for name in LINEARS:
            parent = block.self_attn if hasattr(block.self_attn, name) else block.mlp
            linear = getattr(parent, name)
            made = random_packed(linear.weight, UniformLayout(widths.get(name, 4), 32))
            setattr(parent, name, PackedLinear(made, linear.bias))
    made = random_packed(model.model.embed_tokens.weight, UniformLayout(8, 0, True))
    model.model.embed_tokens = PackedEmbedding(made, torch.float32)
    model.lm_head = model.model.embed_tokens.head()
    return model


@pytest.mark.parametrize("family", OWN)
def test_own_loop_gives_transformers_logits_at_each_step(tiny_models, family) -> None:
    model, tokens = tiny_models(family), ids(40)
    expected = plain(model, tokens)
    decoder = Decoder(model, dtype=torch.float32)
    assert decoder.reason is None
    torch.testing.assert_close(stepped(decoder, tokens, 12), expected[11:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", OWN)
def test_pieces_after_the_first_see_the_cache(tiny_models, family) -> None:
    model, tokens = tiny_models(family), ids(40)
    decoder = Decoder(model, dtype=torch.float32)
    decoder.prefill(tokens[:5])
    for start, stop in ((5, 6), (6, 20), (20, 39)):
        decoder.extend(tokens[start:stop])
    torch.testing.assert_close(decoder.step(int(tokens[39])), plain(model, tokens)[-1], atol=2e-5, rtol=1e-4)


def test_every_family_decodes_as_transformers_does(any_tiny) -> None:
    name, model = any_tiny
    tokens = ids(24)
    expected = plain(model, tokens)
    decoder = Decoder(model, dtype=torch.float32)
    assert (decoder.reason is None) == (name in OWN)
    torch.testing.assert_close(stepped(decoder, tokens, 10), expected[9:], atol=5e-5, rtol=1e-3)


def test_every_family_decodes_in_the_steps_own_type(any_tiny) -> None:
    """bfloat16 steps agree with float32 logits to what bfloat16 holds, and leave the model's weights alone."""
    _, model = any_tiny
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    tokens = ids(24)
    expected = plain(model, tokens)
    found = stepped(Decoder(model), tokens, 10)
    assert float((found - expected[9:]).norm() / expected[9:].norm()) < 0.05
    assert all(torch.equal(tensor, before[name]) and tensor.dtype == torch.float32 for name, tensor in model.named_parameters())


LINEAR_ROPE = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}


@pytest.mark.parametrize("changes", [LINEAR_ROPE, {"attention_bias": True, "mlp_bias": True}, {"hidden_act": "gelu"}])
def test_the_configuration_is_honoured(tiny_models, changes) -> None:
    model, tokens = tiny_models("llama", **changes), ids(20)
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            tensor.copy_(torch.randn_like(tensor))
    torch.testing.assert_close(stepped(Decoder(model, dtype=torch.float32), tokens, 9), plain(model, tokens)[8:], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("widths", [{}, {"v_proj": 8, "up_proj": 3}])
def test_packed_layers_fused_or_not_give_the_modules_own_logits(tiny_models, widths, monkeypatch) -> None:
    """Exact without the C++ kernels, whose 15-bit activations would hide an error of the fusing."""
    monkeypatch.setattr(cpu_build, "library", lambda: None)
    model, tokens = pack_linears(tiny_models("llama"), widths), ids(30)
    expected = plain(model, tokens)
    torch.testing.assert_close(stepped(Decoder(model, dtype=torch.float32), tokens, 12), expected[11:], atol=1e-4, rtol=1e-4)
    fast = stepped(Decoder(model), tokens, 12)
    assert float((fast - expected[11:]).norm() / expected[11:].norm()) < 0.05
    torch.testing.assert_close(plain(model, tokens), expected, atol=1e-5, rtol=1e-5)


def test_packed_layers_run_in_the_generic_loop(tiny_models) -> None:
    model, tokens = pack_linears(tiny_models("llama"), {}), ids(30)
    model.config.model_type = "llama-of-another-kind"
    decoder = Decoder(model)
    expected = plain(model, tokens)
    assert "another-kind" in decoder.reason
    assert float((stepped(decoder, tokens, 12) - expected[11:]).norm() / expected[11:].norm()) < 0.05


def test_two_decoders_share_the_weights_and_not_the_cache(tiny_models) -> None:
    model, tokens = tiny_models("llama").to(torch.bfloat16), ids(20)
    first, second = Decoder(model), Decoder(model)
    attention = model.model.layers[0].self_attn
    assert attention.k_proj.weight.untyped_storage().data_ptr() == attention.q_proj.weight.untyped_storage().data_ptr()
    first.prefill(tokens)
    alone = first.step(7)
    first.prefill(tokens)
    second.prefill(tokens[:3])
    assert torch.equal(first.step(7), alone)


def test_a_sliding_window_within_the_length_goes_to_transformers(tiny_models) -> None:
    model = tiny_models("mistral", sliding_window=16)
    assert Decoder(model, max_length=16).reason is None
    long = Decoder(model, dtype=torch.float32)
    assert "slides over 16 tokens" in long.reason
    tokens = ids(40)
    torch.testing.assert_close(stepped(long, tokens, 30), plain(model, tokens)[29:], atol=5e-5, rtol=1e-4)


def test_a_full_cache_is_refused_in_words(tiny_models) -> None:
    decoder = Decoder(tiny_models("llama"), max_length=10)
    with pytest.raises(InputError, match="room for 10"):
        decoder.prefill(ids(11))
    decoder.prefill(ids(10))
    with pytest.raises(InputError, match="do not fit"):
        decoder.step(3)
    with pytest.raises(InputError, match="no token"):
        decoder.prefill([])


def test_log_probabilities_come_in_slices(tiny_models, monkeypatch) -> None:
    monkeypatch.setattr("bitpress.engine.decode.LOGIT_ROWS", 16)
    model, tokens = tiny_models("llama"), ids(40)
    pieces = list(Decoder(model, dtype=torch.float32).log_probabilities(tokens))
    assert [len(piece) for piece in pieces] == [16, 16, 8]
    torch.testing.assert_close(torch.cat(pieces), plain(model, tokens).log_softmax(-1), atol=5e-5, rtol=1e-4)


def test_conditions_name_the_types(tiny_models) -> None:
    assert Decoder(tiny_models("llama")).conditions["step_dtype"] == "bfloat16"
    assert "gpt2" in Decoder(tiny_models("gpt2")).conditions["loop"]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2"])
def test_steps_in_one_call_and_in_torch_operations_agree(tiny_models, architecture, monkeypatch) -> None:
    model, tokens = tiny_models(architecture).bfloat16(), ids(24)
    decoder = Decoder(model)
    if not decoder._loop.fused_steps:
        pytest.skip("no compiled kernels on this machine")
    fused = stepped(decoder, tokens, 9)
    monkeypatch.setattr(cpu_build, "library", lambda: None)
    apart = stepped(Decoder(model), tokens, 9)
    assert float((fused - apart).norm() / apart.norm()) < 0.03
