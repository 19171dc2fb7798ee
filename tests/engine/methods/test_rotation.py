"""Rotation: Hadamard matrices of the sizes that models have, identical logits after turning, outliers spread, unfit models refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.engine.decode import Decoder
from bitpress.engine.errors import InputError
from bitpress.engine.methods import registry
from bitpress.engine.methods.hadamard import Rotation, factors
from bitpress.engine.model.inspect import anatomy_of
from bitpress.engine.model.surgery import twin

IDS = torch.randint(2, 300, (2, 16), generator=torch.Generator().manual_seed(1))
METHOD: Any = registry.get("rotation")
TURNABLE = {"llama", "llama_untied", "mistral", "qwen2", "qwen3", "gemma", "phi3"}


@pytest.mark.parametrize("size", [1, 2, 4, 12, 16, 20, 36, 64, 160, 288, 512, 576, 1536])
def test_hadamard_matrices_are_of_ones_and_orthogonal(size: int) -> None:
    parts = factors(size)
    assert parts is not None
    matrix = torch.kron(*parts)
    assert matrix.shape == (size, size)
    assert torch.equal(matrix.abs(), torch.ones(size, size, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.t(), size * torch.eye(size, dtype=torch.float64))


def test_sizes_without_a_known_matrix_are_turned_by_a_random_one() -> None:
    assert factors(6) is None
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotation = Rotation(6, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation(x).norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(rotation.back(rotation(x)), x)


@settings(max_examples=30, deadline=None)
@given(size=st.sampled_from((6, 16, 36, 64, 160, 576, 1536)), seed=st.integers(0, 1000))
def test_a_rotation_keeps_lengths_and_is_undone(size: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    rotation, x = Rotation(size, draw), torch.randn(2, 3, size, dtype=torch.float64, generator=draw)
    torch.testing.assert_close(rotation(x).norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotation.back(rotation(x)), x)
    assert rotation(x.bfloat16()).dtype == torch.bfloat16


def test_an_outlier_is_spread_over_all_channels() -> None:
    x = torch.zeros(1, 576, dtype=torch.float64)
    x[0, 7] = 24.0
    assert torch.allclose(Rotation(576, torch.Generator().manual_seed(0))(x).abs(), torch.ones(1, 576, dtype=torch.float64))


def test_logits_are_those_of_the_dense_model_or_the_model_is_refused(any_tiny: tuple[str, Any]) -> None:
    name, model = any_tiny
    anatomy, turned = anatomy_of(model, name), twin(model)
    if name not in TURNABLE:
        with pytest.raises(InputError, match="cannot be rotated"):
            METHOD.turn(turned, anatomy, 0, METHOD.parse({}))
        return
    with torch.no_grad():
        for module in model.modules():
            if "RMSNorm" in type(module).__name__:
                module.weight.add_(torch.rand(len(module.weight), generator=torch.Generator().manual_seed(3)))
    METHOD.turn(turned, anatomy, 0, METHOD.parse({}))
    expected = model(input_ids=IDS).logits
    torch.testing.assert_close(turned(input_ids=IDS).logits, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(turned.get_submodule(anatomy.linears[0].name).weight, model.get_submodule(anatomy.linears[0].name).weight)
    assert sum(weight.numel() for weight in turned.parameters()) == sum(weight.numel() for weight in model.parameters()), "nothing grows"


@pytest.mark.parametrize("options", [{"heads": False}, {"down": False}, {"heads": False, "down": False}])
def test_each_part_can_be_left_out(options: dict[str, bool], tiny_models: Callable[..., Any]) -> None:
    model = tiny_models("llama")
    turned = twin(model)
    METHOD.turn(turned, anatomy_of(model, "llama"), 5, METHOD.parse(options))
    torch.testing.assert_close(turned(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-3, atol=1e-3)


def test_a_turned_model_decodes_as_the_dense_one_in_transformers_loop(tiny_models: Callable[..., Any]) -> None:
    model = tiny_models("llama")
    turned = twin(model)
    METHOD.turn(turned, anatomy_of(model, "llama"), 0, METHOD.parse({}))
    decoder = Decoder(turned, dtype=torch.float32)
    assert decoder.reason is not None
    assert "rotation" in decoder.reason
    torch.testing.assert_close(decoder.prefill(IDS[0]), Decoder(model, dtype=torch.float32).prefill(IDS[0]), rtol=1e-3, atol=1e-3)
