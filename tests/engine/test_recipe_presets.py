"""Every preset that comes with Bitpress fits every model it is offered for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitpress.engine.accounting import size_of
from bitpress.engine.errors import InputError
from bitpress.engine.methods import registry
from bitpress.engine.methods.catalogue import problems
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe_presets import ORDER, find_preset, for_model, list_presets, read_preset


def test_all_presets_are_there_with_words() -> None:
    presets = list_presets()
    assert [preset.id for preset in presets] == list(ORDER)
    for preset in presets:
        assert preset.title
        assert preset.title != preset.id
        assert len(preset.description) > 40
        assert preset.recipe.model == "any"


@pytest.mark.parametrize("preset_id", ORDER)
@pytest.mark.parametrize("architecture", ["llama", "llama_untied", "qwen3", "gemma3", "gpt2", "opt", "gpt_neox", "phi3"])
def test_presets_fit_every_family(in_memory: Callable[..., Any], preset_id: str, architecture: str) -> None:
    recipe = for_model(find_preset(preset_id), architecture)
    assert recipe.model == architecture
    assert problems(recipe, in_memory(architecture).anatomy, registry.catalogue()) == []


@pytest.mark.parametrize("preset_id", ORDER)
def test_presets_fit_rows_that_groups_do_not_divide(paper: Callable[..., Anatomy], preset_id: str) -> None:
    assert problems(for_model(find_preset(preset_id), "paper"), paper(blocks=6), registry.catalogue()) == []


def test_sizes_are_in_the_order_that_the_words_promise(paper: Callable[..., Anatomy]) -> None:
    sizes = {preset.id: size_of(preset.recipe, paper(blocks=8)).bytes for preset in list_presets()}
    dense = paper(blocks=8).bytes
    assert (
        sizes["uniform-2bit"] < sizes["uniform-3bit"] < sizes["attention-light"] < sizes["uniform-4bit"] < sizes["protect-ends"] < sizes["uniform-8bit"] < dense
    )
    assert sizes["sparse-50"] == sizes["sparse-2-4"] < 0.7 * dense
    assert sizes["half-the-layers"] < 0.6 * dense


def test_an_edited_preset_is_read_anew_and_a_broken_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: any\nseed: 1\n")
    assert read_preset(path).title == "mine"
    path.write_text("# title: Mine\nmodel: any\nseed: 22\n")
    assert (read_preset(path).title, read_preset(path).recipe.seed) == ("Mine", 22)
    path.write_text("model: any\nbits: 4\n")
    with pytest.raises(InputError, match="bits"):
        read_preset(path)
    with pytest.raises(InputError, match="uniform-4bit"):
        find_preset("uniform-4")
