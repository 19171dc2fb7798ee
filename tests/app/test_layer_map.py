"""The map's cells, legend and selection, without a browser; colours that can be read."""

from dataclasses import replace
from itertools import pairwise

import pytest

from bitpress.app import edits
from bitpress.app.ui import theme
from bitpress.app.ui.layer_map import Cell, _grid
from bitpress.app.ui.overlays import OVERLAYS, Picture, cells_of, legend_of, log_places, missing_reason, scale_of, selection_parts
from bitpress.engine.accounting import size_of
from bitpress.engine.model.anatomy import Anatomy, Part
from bitpress.engine.recipe import Recipe, SchemeLine


def picture(anatomy: Anatomy, recipe: Recipe | None = None, **more) -> Picture:
    wanted = recipe or Recipe(model=anatomy.model, schemes=[SchemeLine(match="*", weights={"bits": 4})])
    return Picture(anatomy, wanted, wanted.resolve(anatomy), size_of(wanted, anatomy), **more)


def by_id(cells: list[Cell]) -> dict[str, Cell]:
    return {cell.id: cell for cell in cells}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_draws_every_part(anatomy: Anatomy, overlay: str) -> None:
    scores = {part.name: 0.1 * (index + 1) for index, part in enumerate(anatomy.linears)}
    shown = picture(anatomy, errors=scores, scores=scores)
    cells = cells_of(shown, overlay)
    assert len({cell.id for cell in cells}) == len(cells) == len(anatomy.linears) + 3
    assert all(cell.text for cell in cells if cell.column is not None), "colour must not be the only signal"
    assert legend_of(shown, overlay).steps
    assert missing_reason(shown, overlay) == ""
    assert all(
        part.name in cell.title for part, cell in zip(sorted(anatomy.linears, key=lambda p: (anatomy.roles.index(p.role), p.block)), cells, strict=False)
    )


def test_bits_zeros_and_removed_blocks_have_marks_of_their_own(anatomy: Anatomy) -> None:
    recipe = edits.set_sparsity(Recipe(model="tiny-stories"), "role:up", anatomy, 0.5, "2:4")
    cells = by_id(cells_of(picture(anatomy, edits.drop_blocks(recipe, anatomy, [2], True)), "bits"))
    assert cells["model.layers.0.mlp.up_proj"].size < 1 == cells["model.layers.0.mlp.down_proj"].size
    assert cells["model.layers.2.mlp.up_proj"].state == "removed"
    assert cells["model.layers.0.mlp.up_proj"].text == "16"


def test_a_job_fills_the_squares(anatomy: Anatomy) -> None:
    first, second, third = (part.name for part in anatomy.linears[:3])
    cells = by_id(cells_of(picture(anatomy, done=frozenset({first, second}), fresh=frozenset({second})), "bits"))
    assert [cells[name].state for name in (first, second, third)] == ["", "fresh", "pending"]


def test_fused_and_missing_roles_are_shown(anatomy: Anatomy) -> None:
    fused = Part(name="h.0.qkv", role="qkv", block=0, out_features=576, in_features=192, fused=("q", "k", "v"))
    odd = anatomy.model_copy(update={"linears": (fused, *anatomy.linears[7:]), "blocks": 6})
    cells = cells_of(picture(odd), "bits")
    assert any(cell.state == "missing" and cell.column == 0 and cell.row == "q" for cell in cells)
    assert "holds q, k, v" in by_id(cells)["h.0.qkv"].title


def test_eighty_blocks_stay_a_small_message(anatomy: Anatomy) -> None:
    import json

    parts = [replace_block(part, block) for block in range(80) for part in anatomy.of_block(0)]
    large = anatomy.model_copy(update={"linears": tuple(parts), "blocks": 80})
    grid = _grid(cells_of(picture(large), "bits"), None)
    assert len(grid["cells"]) == 560
    assert len(json.dumps(grid)) < 120_000


def replace_block(part: Part, block: int) -> Part:
    return part.model_copy(update={"block": block, "name": part.name.replace(".0.", f".{block}.", 1)})


def test_a_selection_in_the_recipes_words(anatomy: Anatomy) -> None:
    found = selection_parts(("kv-cache", anatomy.linears[3].name, anatomy.embedding.name), anatomy)
    assert found == {"linears": [anatomy.linears[3].name], "embedding": True, "head": False, "cache": True}


def test_places_on_a_logarithmic_scale() -> None:
    assert log_places({"a": 0.01, "b": 0.1, "c": 1.0, "d": 0.0}) == pytest.approx({"a": 0.0, "b": 0.5, "c": 1.0, "d": 0.0})
    assert log_places({"a": 0.2}) == {"a": 0.0}


def test_cells_are_plain_records() -> None:
    assert replace(Cell("a", "q", 0), state="fresh").state == "fresh"


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scale", [theme.AMOUNT, theme.HARM, theme.CHANGE, scale_of("error")])
def test_text_on_every_colour_can_be_read(scale: tuple[str, ...]) -> None:
    for colour, ink in theme.palette(scale):
        light, dark = sorted((luminance(colour), luminance(ink)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.0, (colour, ink)


def test_the_amount_scale_is_even_in_lightness() -> None:
    greys = [luminance(colour) ** (1 / 3) for colour, _ in theme.palette(theme.AMOUNT, 9)]
    steps = [a - b for a, b in pairwise(greys)]
    assert min(steps) > 0
    assert max(steps) < 3 * min(steps)
