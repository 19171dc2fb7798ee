"""Bytes of real models: dense, packed, tied; and the peak of the process."""

import copy
from typing import Any

import pytest
import torch

from bitpress.engine.accounting import size_of
from bitpress.engine.measure.memory import kernels_of, peak_bytes, reset_peak, weights_of
from bitpress.engine.model import surgery
from bitpress.engine.model.inspect import anatomy_of
from bitpress.engine.recipe import Recipe
from bitpress.kernels.formats import pack
from bitpress.kernels.layout import UniformLayout
from bitpress.kernels.packed import PackedEmbedding, PackedLinear

CPU = torch.device("cpu")


def packed_weight(rows: int, columns: int, layout: UniformLayout) -> Any:
    generator = torch.Generator().manual_seed(0)
    groups = layout.groups(columns)
    codes, zeros = (torch.randint(0, 2**layout.bits, (rows, width), dtype=torch.uint8, generator=generator) for width in (columns, groups))
    return pack(codes, torch.rand(rows, groups, generator=generator).bfloat16(), None if layout.symmetric else zeros, layout)


def packed_twin(model: Any, layout: UniformLayout, names: list[str]) -> Any:
    twin = copy.deepcopy(model)
    for name in names:
        linear = surgery.get(twin, name)
        weight_NK = surgery.linear_weight(linear)
        surgery.replace(twin, name, PackedLinear(packed_weight(*weight_NK.shape, layout), linear.bias))
    return twin


def test_a_dense_model_is_what_its_anatomy_says(any_tiny: tuple[str, Any]) -> None:
    family, model = any_tiny
    anatomy = anatomy_of(model, family)
    weights = weights_of(model, anatomy.block_prefix, anatomy.itemsize)
    assert (weights.stored_bytes, weights.params) == (anatomy.bytes, anatomy.params)
    assert weights.linear_params == anatomy.linear_params
    assert weights.resident_bytes == sum(weight.nbytes for weight in model.parameters())
    assert weights.bits_per_weight_linears == weights.bits_per_weight_model == 8 * anatomy.itemsize
    assert kernels_of(model, anatomy.block_prefix) == {"dense": len(anatomy.linears)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_packed_model_is_what_the_accounting_says(tiny_models: Any, family: str) -> None:
    model = tiny_models(family)
    anatomy = anatomy_of(model, family)
    twin = packed_twin(model, UniformLayout(4, 64, False), [part.name for part in anatomy.linears])
    recipe = Recipe.from_dict({"model": family, "schemes": [{"match": "*", "weights": {"bits": 4, "group_size": 64}}]})
    said, found = size_of(recipe, anatomy), weights_of(twin, anatomy.block_prefix, anatomy.itemsize)
    assert (found.stored_bytes, found.linear_bytes) == (said.bytes, said.linear_bytes)
    assert found.bits_per_weight_linears == pytest.approx(said.bits_per_weight_linears)
    assert found.bits_per_weight_model == pytest.approx(said.bits_per_weight_model)
    assert sum(kernels_of(twin, anatomy.block_prefix).values()) == len(anatomy.linears)
    assert "dense" not in kernels_of(twin, anatomy.block_prefix)


def test_the_stored_width_counts_and_not_the_type_computed_in(tiny_models: Any) -> None:
    stored = anatomy_of(tiny_models("llama").bfloat16(), "llama")
    weights = weights_of(tiny_models("llama"), stored.block_prefix, stored.itemsize)
    assert weights.stored_bytes == stored.bytes
    assert weights.resident_bytes == 2 * stored.bytes


def test_a_packed_embedding_and_its_tied_head_count_once(tiny_models: Any) -> None:
    model = tiny_models("llama")
    anatomy = anatomy_of(model, "llama")
    embedding = PackedEmbedding(packed_weight(anatomy.vocab, anatomy.hidden, UniformLayout(8, 0, True)))
    surgery.replace(model, anatomy.embedding.name, embedding)
    surgery.replace(model, "lm_head", embedding.head())
    recipe = Recipe.from_dict({"model": "llama", "embedding": {"bits": 8}})
    # The tiny model is stored in 4-byte numbers here, so its dense rest counts four bytes each.
    assert weights_of(model, anatomy.block_prefix, anatomy.itemsize).stored_bytes == size_of(recipe, anatomy).bytes
    assert weights_of(model, anatomy.block_prefix, anatomy.itemsize).params == anatomy.params


def test_the_peak_rises_with_what_is_touched_and_can_be_reset() -> None:
    if not reset_peak():
        pytest.skip("this system keeps no peak that can be reset")
    before = peak_bytes(CPU)
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak_bytes(CPU) - before > 60 << 20
    del block
    reset_peak()
    assert peak_bytes(CPU) - before < 30 << 20
