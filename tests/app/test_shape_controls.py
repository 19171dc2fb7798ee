"""Heads, neurons and depth on screen: edits of the structure, the stage that comes with them, and the picture of what is gone."""

from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from bitpress.app import edits
from bitpress.app.ui.block_diagram import changed, drawing, figures, shapes_of, size_of_blocks
from bitpress.app.ui.numbers import short_count
from bitpress.app.ui.shape_controls import place_of
from bitpress.engine.accounting import flops_per_token
from bitpress.engine.errors import InputError
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Recipe
from bitpress.engine.structure import ends_warning, neurons_kept


def plain(**fields: object) -> Recipe:
    return Recipe.from_dict({"model": "tiny-stories", **fields})


def test_shares_bring_a_stage_that_chooses_and_take_it_away_again(anatomy: Anatomy) -> None:
    half = edits.set_units(plain(), anatomy, "neurons", [1, 2], 0.5)
    assert [stage.method for stage in half.stages] == ["magnitude-structured"]
    assert [half.structure.share_of("neurons", anatomy, block) for block in range(4)] == [1, 0.5, 0.5, 1]
    more = edits.set_units(half, anatomy, "neurons", [2, 3], 0.25)
    assert [more.structure.share_of("neurons", anatomy, block) for block in range(4)] == [1, 0.5, 0.25, 0.25]
    assert more.reduced(anatomy).units_of(3).neurons == 128
    whole = edits.set_units(more, anatomy, "neurons", range(anatomy.blocks), 1.0)
    assert whole.structure.neurons is None
    assert whole.stages == []
    coded = edits.set_weights(half, "*", anatomy, bits=4)
    assert [stage.method for stage in coded.stages] == ["magnitude-structured", "rtn"]


def test_blocks_go_by_place(anatomy: Anatomy) -> None:
    made = edits.chop(plain(), anatomy, 3, "max-gap")
    assert made.dropped_blocks(anatomy) == edits.chopped(anatomy.blocks, 3, "max-gap")
    assert place_of(made, anatomy) == "max-gap"
    assert edits.chop(made, anatomy, 0, "input").dropped_blocks(anatomy) == []
    assert place_of(plain(structure={"drop_blocks": [0]}), anatomy) is None
    with pytest.raises(InputError, match="the first and the last always stay"):
        edits.chop(plain(), anatomy, anatomy.blocks, "input")
    assert edits.difference(plain(), made, anatomy)[-1][:2] == ("shape", "whole")


def test_the_picture_shows_what_is_gone(anatomy: Anatomy) -> None:
    structure = {"drop_blocks": [1], "remove_heads": {0: [0]}, "remove_neurons": {2: list(range(128))}}
    shapes = shapes_of(plain(structure=structure), anatomy)
    assert shapes[0].heads[0] is False
    assert all(shapes[0].heads[1:])
    assert shapes[1].dropped
    assert (shapes[2].neurons, shapes[2].all_neurons) == (anatomy.ffn - 128, anatomy.ffn)
    picture = drawing(shapes, anatomy.group)
    assert "Block 1: removed" in picture
    assert picture.count("border:1px dashed") > drawing(shapes_of(plain(), anatomy), anatomy.group).count("border:1px dashed")
    told = figures(plain(structure=structure), anatomy)
    left = flops_per_token(plain(structure=structure), anatomy) / flops_per_token(None, anatomy)
    assert f"operations a token ({100 * left:.1f}" in told
    assert short_count(anatomy.params) in told
    gone = anatomy.linear_params - plain(structure=structure).reduced(anatomy).linear_params + anatomy.block_rest_params
    assert f"{short_count(anatomy.params - gone)} of" in told
    assert size_of_blocks(6) == 2.5
    assert size_of_blocks(len(shapes) * 20) == 1.0
    assert changed(plain(structure=structure))
    assert not changed(plain())


def test_sliders_edit_the_recipe_and_the_picture_follows(app_home: Path, app_root: Path, anatomy: Anatomy) -> None:
    app = AppTest.from_file(app_root / "pages" / "explore.py", default_timeout=60)
    app.session_state["shape"] = True
    app.run()
    assert not app.exception
    app.slider(key="keep-neurons").set_value(50).run()
    recipe = app.session_state["bitpress-session"].recipe
    assert recipe.reduced(anatomy).units_of(0).neurons == anatomy.ffn // 2
    app.slider(key="chop-count").set_value(2).run()
    recipe = app.session_state["bitpress-session"].recipe
    assert len(recipe.dropped_blocks(anatomy)) == 2
    assert not app.exception
    assert any("dashed outlines are gone" in caption.value for caption in app.caption)


def test_the_ends_of_the_model_are_missed(anatomy: Anatomy) -> None:
    assert ends_warning([1], anatomy.blocks) == ""
    assert ends_warning([0, 2], anatomy.blocks).startswith("The first block of the model goes.")
    both = ends_warning([0, anatomy.blocks - 1], anatomy.blocks)
    assert f"take 0 and {anatomy.blocks - 1} out of" in both


def test_shares_of_neurons_stay_widths_that_patterns_divide(anatomy: Anatomy) -> None:
    assert [neurons_kept(512, share) for share in (0.7, 0.5, 0.001, 1.0)] == [360, 256, 8, 512]
    assert neurons_kept(171, 0.5) == round(171 / 2)
    narrow = edits.set_units(plain(), anatomy, "neurons", range(anatomy.blocks), 0.7)
    assert not edits.set_sparsity(narrow, "*", anatomy, 0.5, "2:4").validate_for(anatomy)
