"""Heads and neurons that are really gone: equal to a masked model on every family, also decoded, saved and loaded; and every refusal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bitpress.engine.decode import Decoder
from bitpress.engine.errors import InputError
from bitpress.engine.model.anatomy import Anatomy, Units
from bitpress.engine.model.inspect import anatomy_of
from bitpress.engine.model.surgery import get, linear_weight, twin
from bitpress.engine.recipe import Recipe
from bitpress.engine.scene import reshape
from bitpress.engine.structure import Structure, then

IDS = torch.arange(24).view(2, 12) * 7 % 320
SEPARATE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "opt", "phi")
FUSED = ("gpt2", "gpt_neox", "phi3")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def masked(model: Any, anatomy: Anatomy, structure: Structure) -> Any:
    """The same model at full size, with zeros where the removed heads and neurons are read."""
    made = twin(model)
    for part in anatomy.linears:
        module = get(made, part.name)
        if part.role == "o":
            gone = [head * anatomy.head_dim + c for head in structure.remove_heads.get(part.block, ()) for c in range(anatomy.head_dim)]
        else:
            gone = list((structure.remove_neurons or {}).get(part.block, ())) if part.role in ("down", "fc2") else []
        if gone:
            module.weight = torch.nn.Parameter(module.weight.detach().clone(), requires_grad=False)
            linear_weight(module)[:, gone] = 0
    return made


def sliced(model: Any, anatomy: Anatomy, structure: Structure) -> Any:
    made = twin(model)
    reshape(made, anatomy, structure)
    return made


@pytest.mark.parametrize("heads", [{1: [0, 1]}, {0: [2], 1: [0, 3], 2: [0, 1, 3]}], ids=["a key-value group", "single heads"])
@pytest.mark.parametrize("family", SEPARATE)
def test_a_sliced_model_is_the_masked_one(tiny_models: Callable[..., Any], family: str, heads: dict[int, list[int]]) -> None:
    model = tiny_models(family)
    anatomy = anatomy_of(model, family)
    structure = Structure(remove_heads=heads, remove_neurons={0: list(range(0, 128, 3)), 2: [5]})
    made, before = sliced(model, anatomy, structure), logits(model)
    assert torch.allclose(logits(made), logits(masked(model, anatomy, structure)), atol=2e-4)
    assert torch.equal(logits(model), before), "the dense model keeps its weights"
    expected = Recipe(model="m", structure=structure).reduced(anatomy)
    for part in expected.linears:
        assert tuple(linear_weight(get(made, part.name)).shape) == (part.out_features, part.in_features)
    assert sum(weight.numel() for weight in made.parameters()) < anatomy.params


@pytest.mark.parametrize("family", FUSED)
def test_fused_families_lose_neurons_and_keep_heads(tiny_models: Callable[..., Any], family: str) -> None:
    model = tiny_models(family)
    anatomy = anatomy_of(model, family)
    structure = Structure(remove_neurons={1: list(range(40))})
    assert torch.allclose(logits(sliced(model, anatomy, structure)), logits(masked(model, anatomy, structure)), atol=2e-4)
    with pytest.raises(InputError, match=r"are fused.*Remove neurons or blocks"):
        sliced(model, anatomy, Structure(remove_heads={1: [0]}))


@pytest.mark.parametrize("heads", [{1: [0, 1]}, {0: [2], 2: [0, 1, 3]}], ids=["a key-value group", "single heads"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_decoding_follows_each_blocks_heads(tiny_models: Callable[..., Any], family: str, heads: dict[int, list[int]]) -> None:
    model = tiny_models(family)
    made = sliced(model, anatomy_of(model, family), Structure(remove_heads=heads, remove_neurons={1: list(range(64))}))
    decoder = Decoder(made, dtype=torch.float32)
    assert decoder.reason is None
    found = [decoder.prefill(IDS[0, :9]), *(decoder.step(int(token)) for token in IDS[0, 9:])]
    assert torch.allclose(torch.stack(found), logits(made)[0, 8:], atol=1e-4)
    plain = Decoder(made)
    assert torch.nn.functional.cosine_similarity(plain.prefill(IDS[0]), found[-1], dim=0) > 0.99
    generated = made.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=1, eos_token_id=None)
    assert generated[0, 12] == found[-1].argmax()


def test_where_shapes_stay_uniform_plain_transformers_loads_it(tiny_models: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_models("llama")
    anatomy = anatomy_of(model, "llama")
    alike = Structure(drop_blocks=[1], remove_heads={b: [2, 3] for b in range(3)}, remove_neurons={b: list(range(b, 32 + b)) for b in range(3)})
    made = sliced(model, anatomy, alike)
    made.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(made))
    assert (again.config.num_attention_heads, again.config.num_key_value_heads, again.config.intermediate_size) == (2, 1, 96)
    unlike = sliced(model, anatomy, Structure(remove_heads={0: [1]}))
    assert unlike.config.bitpress_units == [[3, 2, 128], [4, 2, 128], [4, 2, 128]]


def test_one_structure_after_another_is_counted_in_the_dense_models_numbers(tiny_models: Callable[..., Any]) -> None:
    model = tiny_models("llama")
    anatomy = anatomy_of(model, "llama")
    first = Structure(drop_blocks=[0], remove_heads={1: [0]}, remove_neurons={2: [0, 2]})
    both = then(first, Structure(drop_blocks=[1], remove_heads={0: [1, 2]}, remove_neurons={0: [7], 1: [0, 1]}), anatomy)
    assert both.drop_blocks == [0, 2]
    assert both.remove_heads == {1: [0, 2, 3]}
    assert both.remove_neurons == {1: [7], 2: [0, 1, 2, 3]}
    assert both.units(anatomy)[1] == Units(1, 1, 127)


@pytest.mark.parametrize(
    ("structure", "field", "wrong", "right"),
    [
        ({"remove_heads": {1: [0, 1, 2, 3]}}, "structure.remove_heads", "Every head of block 1", "drop_blocks: [1]"),
        ({"remove_heads": {1: [4]}}, "structure.remove_heads", "no head 4", "0 to 3"),
        ({"remove_heads": {9: [0]}}, "structure.remove_heads", "no block 9", "0 to 3"),
        ({"remove_neurons": {0: list(range(160))}}, "structure.remove_neurons", "Every neuron of block 0", "drop_blocks: [0]"),
        ({"remove_neurons": {0: [160]}}, "structure.remove_neurons", "no neuron 160", "0 to 159"),
        ({"drop_blocks": [0, 1, 2, 3]}, "structure.drop_blocks", "Every block", "at least one"),
    ],
)
def test_what_cannot_go_is_named(paper: Callable[..., Anatomy], structure: dict[str, Any], field: str, wrong: str, right: str) -> None:
    (problem,) = Recipe.from_dict({"model": "paper", "structure": structure}).validate_for(paper())
    assert (problem.field, wrong in problem.wrong, right in problem.right) == (field, True, True)


def test_patterns_are_held_against_the_smaller_rows(paper: Callable[..., Anatomy]) -> None:
    lines = [{"match": "role:down", "sparsity": {"ratio": 0.5, "pattern": "2:4"}}]
    made = Recipe.from_dict({"model": "paper", "structure": {"remove_neurons": {2: [0]}}, "schemes": lines})
    (problem,) = made.validate_for(paper())
    assert "layers.2" in problem.field
    assert "multiple of 4 inputs; this one has 159" in problem.wrong
