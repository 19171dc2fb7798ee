"""The recipe's lines as rows that can be edited, and back."""

from collections.abc import Callable
from typing import Any

import pytest

from bitpress.app import edits
from bitpress.app.ui.exceptions_table import apply_deltas, line_of, row_of
from bitpress.engine.errors import InputError
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Recipe, SchemeLine

LINES = [
    {"match": "*", "weights": {"bits": 4, "group_size": 64, "symmetric": False}}, {"match": "role:q", "weights": "dense"},
    {"match": "role:mlp", "sparsity": {"ratio": 0.5, "pattern": "2:4"}}, {"match": "role:v", "weights": {"symmetric": True}, "sparsity": "dense"},
    {"match": "role:k", "weights": {"bits": 4, "format": "nf4", "double_quant": True}}, {"match": "role:o", "weights": {"format": "bcq"}},
    {"match": "role:up", "weights": {"bits": 8}, "activations": {"bits": 8}}, {"match": "role:gate", "rank": {"keep": 0.5, "factors": {"bits": 8}}},
]  # fmt: skip


def changed(recipe: Recipe, anatomy: Anatomy, **deltas: Any) -> Recipe:
    rows = apply_deltas([row_of(line) for line in recipe.schemes], deltas)
    return edits.with_lines(recipe, [line_of(row) for row in rows], anatomy)


@pytest.mark.parametrize("line", LINES)
def test_a_line_survives_the_table(line: dict[str, Any]) -> None:
    assert SchemeLine.model_validate(line_of(row_of(SchemeLine.model_validate(line)))) == SchemeLine.model_validate(line)


def test_lines_are_edited_added_and_deleted(preset_recipe: Callable[[str], Recipe], anatomy: Anatomy) -> None:
    added = changed(preset_recipe("uniform-4bit"), anatomy, added_rows=[{"match": "role:v", "bits": 8}])
    assert added.resolve(anatomy)["model.layers.0.self_attn.v_proj"].weights.bits == 8
    edited = changed(added, anatomy, edited_rows={1: {"bits": 6}})
    assert edited.resolve(anatomy)["model.layers.0.self_attn.v_proj"].weights.bits == 6
    assert changed(edited, anatomy, deleted_rows=[1]) == preset_recipe("uniform-4bit")


def test_what_has_no_column_stays_through_an_edit_and_a_deletion(preset_recipe: Callable[[str], Recipe], anatomy: Anatomy) -> None:
    lines = [{"match": "*", "weights": {"bits": 8}}, {"match": "role:v", "weights": {"bits": 4, "format": "nf4"}}, {"match": "role:up", "weights": {"bits": 3}}]
    recipe = preset_recipe("uniform-4bit").model_copy(update={"schemes": [SchemeLine.model_validate(line) for line in lines]})
    edited = changed(recipe, anatomy, edited_rows={1: {"group": 32}, 2: {"bits": 6}}, deleted_rows=[0])
    weights = edited.resolve(anatomy)["model.layers.0.self_attn.v_proj"].weights
    assert (weights.format, weights.group_size) == ("nf4", 32)
    assert [line.match for line in edited.schemes] == ["role:v", "role:up"]


def test_a_row_that_is_still_being_typed_waits() -> None:
    assert apply_deltas([], {"added_rows": [{"match": "role:v"}, {"bits": 4}, {}]}) == []


@pytest.mark.parametrize("row", [{"match": "role:nothing", "bits": 4}, {"match": "no.such.layer", "bits": 4}, {"match": "*", "group": 5},
{"match": "*", "bits": 7}])
def test_a_line_that_cannot_be_is_refused(preset_recipe: Callable[[str], Recipe], anatomy: Anatomy, row: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        changed(preset_recipe("uniform-4bit"), anatomy, added_rows=[row])
