"""Parts, roles and sizes of every family, the fingerprint, and what is written for readers without torch."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from bitpress.engine.accounting import size_of
from bitpress.engine.errors import InputError
from bitpress.engine.model import load as loading
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.model.inspect import anatomy_of, fingerprint, role_of, write_inspection
from bitpress.engine.model.surgery import get, linear_weight
from bitpress.engine.recipe import Recipe

SPLIT = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64), "gate": (128, 64), "up": (128, 64), "down": (64, 128)}
PLAIN_MLP = {"fc1": (128, 64), "fc2": (64, 128)}
FUSED_QKV = {"qkv": (192, 64), "o": (64, 64), **PLAIN_MLP}
ROLES = dict.fromkeys(("llama", "llama_untied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"), SPLIT) | {
    "gpt2": FUSED_QKV,
    "gpt_neox": FUSED_QKV,
    "opt": {"q": (64, 64), "k": (64, 64), "v": (64, 64), "o": (64, 64), **PLAIN_MLP},
    "phi": {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64), **PLAIN_MLP},
    "phi3": {"qkv": (128, 64), "o": (64, 64), "gate_up": (256, 64), "down": (64, 128)},
}
TIED = {"llama", "qwen2", "gemma", "gemma2", "gemma3", "gpt2", "opt"}


def test_roles_and_shapes_of_every_block_in_running_order(any_tiny):
    name, model = any_tiny
    anatomy = anatomy_of(model, name)
    for block in range(3):
        parts = list(anatomy.of_block(block))
        if name == "custom":
            assert [(part.role, part.out_features, part.in_features) for part in parts] == [("other", 128, 64), ("other", 64, 128)]
        else:
            assert {part.role: (part.out_features, part.in_features) for part in parts} == ROLES[name]
            assert [part.role for part in parts] == list(ROLES[name])
        assert all(linear_weight(get(model, part.name)).shape == (part.out_features, part.in_features) for part in parts)
        assert all(part.name.startswith(f"{anatomy.block_prefix}.{block}.") for part in parts)


def test_heads_widths_and_context(any_tiny):
    name, model = any_tiny
    anatomy = anatomy_of(model, name)
    assert (anatomy.blocks, anatomy.hidden, anatomy.ffn, anatomy.vocab, anatomy.context) == (3, 64, 128, 320, 128)
    many = 4 if name in ("gpt2", "opt", "gpt_neox") else 2
    assert (anatomy.heads, anatomy.kv_heads, anatomy.head_dim) == ((0, 0, 0) if name == "custom" else (4, many, 16))
    assert anatomy.tied is (name in TIED)
    assert (anatomy.head is None) is anatomy.tied


def test_sizes_are_those_of_the_weights_with_a_tied_matrix_once(any_tiny):
    name, model = any_tiny
    anatomy = anatomy_of(model.to(torch.bfloat16), name)
    storages = {weight.data_ptr(): weight for weight in model.state_dict(keep_vars=True).values() if isinstance(weight, nn.Parameter)}
    assert anatomy.params == sum(weight.numel() for weight in storages.values())
    assert anatomy.bytes == 2 * anatomy.params
    assert size_of(Recipe(model=name), anatomy).bytes == anatomy.bytes
    without = size_of(Recipe(model=name, structure={"drop_blocks": [1]}), anatomy).bytes
    block = get(model, f"{anatomy.block_prefix}.1")
    assert anatomy.bytes - without == sum(weight.nbytes for weight in block.parameters())


def test_fused_matrices_name_their_roles_and_biases_are_seen(tiny_models):
    phi3, gpt2, llama = (anatomy_of(tiny_models(name), name) for name in ("phi3", "gpt2", "llama"))
    assert {part.role: part.fused for part in phi3.of_block(0) if part.fused} == {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
    assert all(part.bias for part in gpt2.linears)
    assert not any(part.bias or part.fused for part in llama.linears)


@pytest.mark.parametrize(("name", "role"), [("attn.c_proj", "o"), ("mlp.c_proj", "fc2"), ("attention.dense", "o"), ("mlp.router", "other")])
def test_a_name_with_two_meanings_is_told_by_its_place(name, role):
    assert role_of(name) == role


def test_the_fingerprint_sees_one_changed_weight_and_nothing_else(tiny_models):
    one, other = tiny_models("llama"), tiny_models("llama")
    assert fingerprint(one) == fingerprint(other)
    assert fingerprint(tiny_models("llama", seed=1)) != fingerprint(one)
    other.model.layers[2].mlp.up_proj.weight[5, 5] += 1e-3
    assert fingerprint(other) != fingerprint(one)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(InputError, match="blocks"):
        anatomy_of(nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8)), "flat")


def test_inspection_is_written_for_every_layer(tiny_llama_dir, tmp_path):
    loaded = loading.load(tiny_llama_dir)
    seen = []
    write_inspection(loaded, tmp_path, lambda done, total: seen.append((done, total)))
    assert Anatomy.load(tmp_path / "anatomy.json") == loaded.anatomy
    index = json.loads((tmp_path / "stats" / "index.json").read_text())
    assert list(index["layers"]) == [part.name for part in loaded.anatomy.linears]
    assert index["fingerprint"] == loaded.anatomy.fingerprint
    assert seen[-1] == (21, 21)
    record = json.loads((tmp_path / "stats" / "model.layers.1.mlp.down_proj.json").read_text())
    assert index["layers"][record["layer"]].items() <= record.items()
    assert sum(file.stat().st_size for file in (tmp_path / "stats").iterdir()) < 21 * 8000


def test_a_layers_numbers_are_right(tiny_llama_dir, tmp_path):
    loaded = loading.load(tiny_llama_dir)
    write_inspection(loaded, tmp_path)
    name = "model.layers.1.mlp.up_proj"
    record = json.loads((tmp_path / "stats" / f"{name}.json").read_text())
    weight = linear_weight(get(loaded.model, name)).float().numpy().astype(np.float64)
    singular = np.linalg.svd(weight, compute_uv=False)
    places = np.array(record["spectrum"]["index"]) - 1
    assert (places[0], places[-1]) == (0, 63)
    np.testing.assert_allclose(record["spectrum"]["value"], (singular / singular[0])[places], rtol=1e-4)
    np.testing.assert_allclose(record["spectrum"]["energy"], (np.cumsum(singular**2) / np.sum(singular**2))[places], rtol=1e-4)
    edges = np.linspace(-abs(weight).max(), abs(weight).max(), 66)
    np.testing.assert_allclose(record["histogram"]["edges"], edges, rtol=1e-5)
    np.testing.assert_array_equal(record["histogram"]["counts"], np.histogram(weight, edges)[0])
    np.testing.assert_allclose(record["std"], weight.std(), rtol=1e-4)
    np.testing.assert_allclose(record["kurtosis"], np.mean((weight - weight.mean()) ** 4) / weight.var() ** 2, rtol=1e-3)
    errors = [record["error_by_bits"][bits] for bits in ("2", "3", "4", "5", "6", "8")]
    assert errors == sorted(errors, reverse=True)
    # A normal weight, 64 a group, 4 bits: a step of about 4.8 deviations / 15, and an error of step / sqrt(12).
    assert errors[2] == pytest.approx(4.8 / 15 / 12**0.5, rel=0.1)
