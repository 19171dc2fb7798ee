"""What a person may ask of pruning by mistake: every answer names the thing, the limit and what to do instead."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.compress import compress
from bitpress.engine.errors import InputError
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.model.load import Loaded
from bitpress.engine.model.slicing import keep_heads, keep_neurons
from bitpress.engine.recipe import Recipe

TOKENS = CalibrationSet("made up", 0, "sha", torch.arange(48).view(2, 24) * 7 % 320)
STRUCTURED = ("magnitude-structured", "wanda-structured", "flap", "llm-pruner", "kwon", "k-prune", "mope")


def said(fields: dict[str, Any], anatomy: Anatomy) -> str:
    """What is said about a recipe: at once, or when it is held against a model."""
    try:
        return " ".join(str(problem) for problem in Recipe.from_dict({"model": "paper", **fields}).validate_for(anatomy))
    except InputError as error:
        return str(error)


def sparse(**sparsity: Any) -> dict[str, Any]:
    return {"schemes": [{"match": "*", "sparsity": sparsity}]}


@pytest.mark.parametrize(
    ("fields", "wrong", "right"),
    [
        ({"structure": {"remove_heads": {1: [0, 1, 2, 3]}}}, "Every head of block 1 would be removed", "drop_blocks: [1]"),
        ({"structure": {"remove_neurons": {1: list(range(160))}}}, "Every neuron of block 1 would be removed", "drop_blocks: [1]"),
        ({"structure": {"remove_heads": {1: [7]}}}, "Block 1 has no head 7", "0 to 3"),
        ({"structure": {"remove_heads": {9: [0]}}}, "The model has no block 9", "0 to 3"),
        ({"structure": {"drop_blocks": [0, 1, 2, 3]}}, "Every block would be dropped", "Leave at least one"),
        ({"structure": {"drop_blocks": [4]}}, "The model has no block 4", "Blocks are 0 to 3"),
        ({"structure": {"heads": {"keep": 0.0}}}, "structure.heads", "greater than 0"),
        (sparse(ratio=1.0), "1.0 would leave nothing of a matrix", "use at most 0.99"),
        (sparse(ratio=-0.1), "sparsity.ratio", "greater than or equal to 0"),
        (sparse(ratio=0.6, pattern="2:4"), "2:4 is a ratio of 0.5", "Set ratio: 0.5"),
        (sparse(ratio=0.5, pattern="3:7"), "pattern", "'2:4' or '4:8'"),
    ],
)
def test_a_recipe_that_asks_for_too_much(paper: Callable[..., Anatomy], fields: dict[str, Any], wrong: str, right: str) -> None:
    told = said(fields, paper())
    assert wrong in told
    assert right in told


@pytest.mark.parametrize(("pattern", "width"), [("2:4", 66), ("4:8", 68)])
def test_a_pattern_that_does_not_divide_a_matrix(paper: Callable[..., Anatomy], pattern: str, width: int) -> None:
    anatomy = paper()
    odd = anatomy.model_copy(update={"linears": tuple(part.model_copy(update={"in_features": width}) for part in anatomy.linears)})
    told = said(sparse(ratio=0.5, pattern=pattern), odd)
    assert str(width) in told
    assert anatomy.linears[0].name in told
    assert "unstructured" in told or "multiple" in told


@pytest.mark.parametrize("name", STRUCTURED)
def test_no_score_takes_everything(in_memory: Callable[..., Loaded], name: str) -> None:
    plan = Recipe.from_dict({"model": "llama", "stages": [{"method": name, "options": {"remove": 0.97, "repair": "none"}}]})
    with pytest.raises(InputError, match=r"97% of the block linears cannot be removed\. At most \d+% can go.*drop whole blocks"):
        compress(in_memory("llama"), plan, calibration=TOKENS)


@pytest.mark.parametrize("name", ["layerchop", "shortgpt", "greedy-depth"])
@pytest.mark.parametrize(("remove", "targets"), [(0.7, "*"), (0.34, "blocks:0"), (0.34, "blocks:last1")])
def test_no_method_takes_the_ends(in_memory: Callable[..., Loaded], name: str, remove: float, targets: str) -> None:
    """Three blocks: two of them would need an end, and so would any choice among the ends alone. LayerChop goes by place and knows no targets."""
    plan = Recipe.from_dict({"model": "llama", "stages": [{"method": name, "options": {"remove": remove}, "targets": targets}]})
    if name == "layerchop" and targets != "*":
        assert compress(in_memory("llama"), plan).recipe.structure.drop_blocks == [1]
        return
    with pytest.raises(InputError, match=r"cannot be removed.*(always stay|between the first and the last).*[Rr]emove"):
        compress(in_memory("llama"), plan, calibration=TOKENS)


def test_an_end_that_a_recipe_names_goes_with_a_warning(in_memory: Callable[..., Loaded]) -> None:
    notes: list[dict[str, Any]] = []
    emit: Callable[[str, dict[str, Any]], None] = lambda kind, data: notes.append(data) if kind == "note" else None  # noqa: E731
    compress(in_memory("llama"), Recipe.from_dict({"model": "llama", "structure": {"drop_blocks": [0]}}), emit)
    assert [(note["level"], "first block" in note["text"], "structure.drop_blocks" in note["text"]) for note in notes] == [("warning", True, True)]


def test_fused_attention_keeps_its_heads_and_says_why(in_memory: Callable[..., Loaded]) -> None:
    loaded = in_memory("gpt2")
    plan = Recipe.from_dict({"model": "gpt2", "stages": [{"method": "kwon", "options": {"remove": 0.2}}]})
    with pytest.raises(InputError, match=r"fused.*neurons"):
        compress(loaded, plan, calibration=TOKENS)
    assert "fused" in said({"structure": {"remove_heads": {0: [0]}}}, loaded.anatomy)


@pytest.mark.parametrize("repair", ["none", "least_squares"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3"])
def test_the_remedy_for_fused_attention_works(in_memory: Callable[..., Loaded], family: str, repair: str) -> None:
    """Neurons go by any score, with any repair, where the heads cannot."""
    loaded = in_memory(family)
    plan = {"model": family, "structure": {"neurons": {"keep": 0.5}}, "stages": [{"method": "k-prune", "options": {"repair": repair}}]}
    made = compress(loaded, Recipe.from_dict(plan), calibration=TOKENS)
    reduced = made.recipe.reduced(loaded.anatomy)
    assert {reduced.units_of(block).neurons for block in reduced.present} == {loaded.anatomy.ffn // 2}
    assert made.model(input_ids=TOKENS.ids_SL).logits.isfinite().all()


def test_surgery_refuses_nothing_left(in_memory: Callable[..., Loaded]) -> None:
    loaded = in_memory("llama")
    with pytest.raises(InputError, match=r"heads of block 1 cannot be removed\. No head would stay"):
        keep_heads(loaded.model, loaded.anatomy, 1, [])
    with pytest.raises(InputError, match=r"neurons of block 1 cannot be removed\. No neuron would stay.*drop the block"):
        keep_neurons(loaded.model, loaded.anatomy, 1, [])
