"""Which stage does what, and every way in which stages cannot work, with the field and what would be right."""

from collections.abc import Callable
from typing import Any

import pytest

from bitpress.engine.methods import registry
from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.catalogue import check_stages, problems
from bitpress.engine.methods.stages import plan_stages
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Problem, Recipe

FOUR_BITS = {"match": "*", "weights": {"bits": 4}}
ONLY_Q = {"method": "magnitude", "targets": "role:q"}
HALF = {"match": "*", "sparsity": {"ratio": 0.5}}


@pytest.fixture
def found(paper: Callable[..., Anatomy]) -> Callable[..., list[Problem]]:
    """Problems of a recipe's stages on the paper model."""
    return lambda **fields: check_stages(Recipe.from_dict({"model": "paper", **fields}), paper(), registry.catalogue())


def test_a_recipe_that_fits_has_no_problems(found: Callable[..., list[Problem]]) -> None:
    assert found(schemes=[FOUR_BITS, HALF], stages=[{"method": "magnitude"}, {"method": "rtn", "options": {"clip_search": True}}]) == []
    assert found() == []


@pytest.mark.parametrize(
    ("fields", "field", "wrong", "right"),
    [
        ({"schemes": [FOUR_BITS], "stages": [{"method": "rnt"}]}, "stages[0].method", "mean 'rtn'", "magnitude, "),
        ({"schemes": [FOUR_BITS], "stages": [{"method": "qqqq"}]}, "stages[0].method", "no method 'qqqq'.", "magnitude, "),
        ({"schemes": [FOUR_BITS], "stages": [{"method": "rtn", "options": {"clip": True}}]}, "stages[0].options.clip", "no such", "clip_search"),
        ({"schemes": [FOUR_BITS], "stages": [{"method": "rtn", "options": {"clip_search": 1}}]}, "stages[0].options.clip_search", "1 can", "true or false"),
        ({"schemes": [FOUR_BITS], "stages": [{"method": "rtn", "options": {"candidates": 4.5}}]}, "stages[0].options.candidates", "4.5", "whole number"),
        ({"schemes": [FOUR_BITS], "stages": [{"method": "rtn", "options": {"candidates": True}}]}, "stages[0].options.candidates", "True", "whole number"),
        ({"schemes": [FOUR_BITS], "stages": [{"method": "rtn", "options": {"exponent": 9}}]}, "stages[0].options.exponent", "9", "at most 4.0"),
        ({"schemes": [HALF], "stages": [{"method": "magnitude", "options": {"scope": "all"}}]}, "stages[0].options.scope", "'all'", "layer or row"),
        ({"schemes": [FOUR_BITS]}, "schemes (model.layers.0.self_attn.q_proj and 27 more)", "fewer bits, but no stage", "method: rtn"),
        ({"schemes": [HALF], "stages": [ONLY_Q]}, "schemes (model.layers.0.self_attn.k_proj and 23 more)", "zeros", "magnitude"),
        ({"schemes": [{"match": "role:q", "rank": {"keep": 0.5}}]}, "schemes (model.layers.0.self_attn.q_proj and 3 more)", "low rank", "method: svd"),
        ({"stages": [{"method": "rtn"}]}, "stages[0]", "rtn has nothing to do", "set `weights`"),
        ({"schemes": [FOUR_BITS], "stages": [{"method": "rtn"}, {"method": "rtn"}]}, "stages[1]", "nothing to do", "Remove the stage"),
        ({"schemes": [FOUR_BITS, HALF], "stages": [{"method": "rtn"}, {"method": "magnitude"}]}, "stages", "after its weights", "prune or factor before"),
        ({"structure": {"heads": {"keep": 0.5}}}, "structure.heads", "no stage chooses", "Add a stage"),
        ({"structure": {"neurons": {"keep": 0.5}}}, "structure.neurons", "no stage chooses", "Add a stage"),
        ({"structure": {"share_blocks": [[0, 1]]}}, "structure.share_blocks", "no stage makes them common", "block-sharing"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_named(found: Callable[..., list[Problem]], fields: dict[str, Any], field: str, wrong: str, right: str) -> None:
    (problem,) = found(**fields)
    assert problem.field == field
    assert wrong in problem.wrong
    assert right in problem.right


def test_plan_gives_each_part_to_the_first_stage_that_can(paper: Callable[..., Anatomy]) -> None:
    stages = [{"method": "magnitude", "targets": "role:mlp"}, {"method": "rtn", "targets": "blocks:0"}, {"method": "rtn"}]
    recipe = Recipe.from_dict({"model": "paper", "schemes": [FOUR_BITS, {"match": "role:mlp", "sparsity": {"ratio": 0.5}}], "stages": stages})
    known = {"rtn": Ability(part="weights", bits=(4,)), "magnitude": Ability(part="sparsity", patterns=("unstructured",))}
    plan = plan_stages(recipe, paper(), known)
    assert plan.steps["model.layers.0.self_attn.q_proj"] == [1]
    assert plan.steps["model.layers.0.mlp.up_proj"] == [0, 1]
    assert plan.steps["model.layers.3.mlp.up_proj"] == [0, 2]
    assert (plan.unmet, plan.idle, plan.late) == ({}, [], [])


def test_problems_join_those_of_fields_and_of_stages(paper: Callable[..., Anatomy], bitpress_home: object) -> None:
    bad = Recipe.from_dict({"model": "paper", "schemes": [{"match": "role:w", "weights": {"bits": 4}}], "stages": [{"method": "rnt"}]})
    assert [problem.field for problem in problems(bad, paper(), registry.catalogue())] == ["schemes[0].match", "stages[0].method"]
    assert [problem.field for problem in problems(bad, paper())] == ["schemes[0].match"], "without a catalogue stages are not judged"
    registry.write_catalogue()
    assert len(problems(bad, paper())) == 2
