"""The parts of a token's time: all of its products, their bytes and kernels, and what is left."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.engine.compress import compress
from bitpress.engine.decode import Decoder
from bitpress.engine.measure.token_parts import call_seconds, read_rate, token_parts
from bitpress.engine.model.load import load
from bitpress.engine.recipe import Recipe

MIXED = {"model": "tiny-llama", "stages": [{"method": "rtn"}],
         "schemes": [{"match": "*", "weights": {"bits": 4, "group_size": 32}}, {"match": "role:v", "weights": {"bits": 8, "group_size": 32}}]}  # fmt: skip


def parts_of(model: Any, token_s: float = 1.0) -> dict[str, Any]:
    found = token_parts(Decoder(model, None, 16), token_s, 1e10, 640)
    assert found is not None
    return found


def test_every_product_of_a_dense_model_is_counted(tiny_llama_dir: Path, bitpress_home: Path) -> None:
    loaded = load(tiny_llama_dir, dtype=torch.float32)
    found = parts_of(loaded.model)
    parts = {part["part"]: part for part in found["parts"]}
    assert list(parts) == ["q, k, v", "attention output", "gate, up", "down", "head", "rest"]
    linears = sum(part.numel for part in loaded.anatomy.linears)
    assert sum(part["flops"] for name, part in parts.items() if name not in ("head", "rest")) == 2 * linears
    assert sum(part["bytes"] for name, part in parts.items() if name not in ("head", "rest")) == 2 * linears, "bfloat16 steps read two bytes a weight"
    assert all(part["kernel"] == "dense" and part["seconds"] > 0 for name, part in parts.items() if name != "rest")
    assert parts["rest"]["bytes"] == 640
    assert sum(part["seconds"] for part in parts.values()) == pytest.approx(found["token_s"])


def test_packed_layers_say_their_kernels_and_stored_bytes(tiny_llama_dir: Path, bitpress_home: Path) -> None:
    loaded = load(tiny_llama_dir, dtype=torch.float32)
    made = compress(loaded, Recipe.from_dict(MIXED))
    found = parts_of(made.model)
    parts = {part["part"]: part for part in found["parts"]}
    assert parts["q, k, v"]["calls"] == 3 * loaded.anatomy.blocks, "v has another scheme, so the three are not one product"
    assert parts["gate, up"]["calls"] == loaded.anatomy.blocks
    assert sum(part["bytes"] for part in found["parts"][:4]) == sum(layer.stored_bytes for layer in made.model.modules() if hasattr(layer, "activation_bits"))
    assert parts["down"]["reason"]


def test_parts_that_took_longer_than_the_token_are_scaled_to_it(tiny_llama_dir: Path, bitpress_home: Path) -> None:
    found = parts_of(load(tiny_llama_dir, dtype=torch.float32).model, token_s=1e-9)
    assert found["excess"] > 1 and sum(part["seconds"] for part in found["parts"]) == pytest.approx(1e-9)


def test_a_loop_that_is_not_ours_has_no_parts(tiny_models: Any) -> None:
    assert token_parts(Decoder(tiny_models("gpt2"), None, 16), 1.0, 1e10, 0) is None


def test_rates_of_this_machine() -> None:
    assert read_rate(torch.device("cpu")) > 1e8
    assert 0 < call_seconds(torch.device("cpu")) < 1e-2
