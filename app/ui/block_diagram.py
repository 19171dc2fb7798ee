"""The model as blocks of heads and neurons, in which what is removed is visibly gone. Knows numbers of units; draws HTML; no model.

Each block is a column: a square for every query head, grouped by the key-value head they read, over a bar of its neurons. What is gone is an
outline; a dropped block is an outline as a whole. While only shares are known, heads count from the left and say so.
"""

from dataclasses import dataclass
from html import escape

import streamlit as st

from bitpress.app.ui import charts
from bitpress.app.ui.numbers import THIN, amount, short_count
from bitpress.engine.accounting import flops_per_token
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Recipe
from bitpress.engine.structure import ends_warning

COLUMN, SQUARE, BAR, GAP = 30, 7, 56, 4  # pixels, where there are many blocks
ROOM, LARGEST = 900, 2.5  # what a page has for a row of them, and how many times as large a few may be
MOST_BLOCKS = 80


@dataclass(frozen=True)
class BlockShape:
    """What of a block stays: a flag for every query head, the share of its neurons, and how many those are. None of it where the block is dropped."""

    number: int
    heads: tuple[bool, ...]
    neurons: int
    all_neurons: int
    dropped: bool = False

    @property
    def words(self) -> str:
        """For a tooltip and a screen reader."""
        if self.dropped:
            return f"Block {self.number}: removed"
        return f"Block {self.number}: {sum(self.heads)} of {len(self.heads)} heads, {self.neurons:,} of {self.all_neurons:,} neurons"


def shapes_of(recipe: Recipe, anatomy: Anatomy) -> list[BlockShape]:
    """Every block of the dense model under a recipe's structure."""
    gone, units = set(recipe.dropped_blocks(anatomy)), recipe.structure.units(anatomy)
    found = []
    for block in range(anatomy.blocks):
        if block in gone:
            found.append(BlockShape(block, (False,) * anatomy.heads, 0, anatomy.ffn, dropped=True))
            continue
        mine = units.get(block, anatomy.units)
        named = set(recipe.structure.kept_heads(anatomy, block))
        heads = tuple(head in named for head in range(anatomy.heads))
        if recipe.structure.heads:
            heads = tuple(head < mine.heads for head in range(anatomy.heads))
        found.append(BlockShape(block, heads, mine.neurons, anatomy.ffn))
    return found


def changed(recipe: Recipe) -> bool:
    """Whether a recipe takes anything out of the shape."""
    structure = recipe.structure
    return bool(structure.drop_blocks or structure.remove_heads or structure.remove_neurons or structure.shares)


def size_of_blocks(count: int) -> float:
    """How many times as large as at their smallest the columns are drawn: few blocks take the room that there is."""
    return min(LARGEST, max(1.0, ROOM / (max(1, count) * (COLUMN + GAP))))


def drawing(shapes: list[BlockShape], group: int) -> str:
    """The picture as HTML of its own styles; columns wrap where the page is narrow."""
    label = f"{sum(not shape.dropped for shape in shapes)} of {len(shapes)} blocks stay"
    times = size_of_blocks(len(shapes))
    body = "".join(_column(shape, group, times) for shape in shapes)
    return f'<div role="img" aria-label="{label}" style="display:flex;flex-wrap:wrap;gap:6px {GAP * times:.0f}px;font-size:0.75rem">{body}</div>'


def _column(shape: BlockShape, group: int, times: float) -> str:
    heads = "".join(_square(stays, head // max(1, group) % 2, times) for head, stays in enumerate(shape.heads))
    share = 100 * shape.neurons / max(1, shape.all_neurons)
    filled = f'<div style="position:absolute;bottom:0;width:100%;height:{share:.1f}%;background:currentColor;opacity:0.5"></div>'
    bar = f'<div style="position:relative;height:{BAR * min(1.5, times):.0f}px;margin-top:3px;{_edge(True)}">{filled}</div>'
    frame = f"padding:2px;border-radius:3px;{_edge(shape.dropped)}"
    inner = f'<div style="{frame}"><div style="display:flex;flex-wrap:wrap;justify-content:center;gap:{2 * times:.0f}px">{heads}</div>{bar}</div>'
    return f'<div title="{escape(shape.words)}" style="width:{COLUMN * times:.0f}px;text-align:center">{shape.number}{inner}</div>'


def _square(stays: bool, shade: int, times: float) -> str:
    look = f"background:currentColor;opacity:{0.9 if shade else 0.6}" if stays else _edge(True)
    return f'<div style="width:{SQUARE * times:.0f}px;height:{SQUARE * times:.0f}px;border-radius:2px;box-sizing:border-box;{look}"></div>'


def _edge(gone: bool) -> str:
    return "border:1px dashed currentColor;opacity:0.6;" if gone else "border:1px solid rgba(128,128,128,0.4);"


def figures(recipe: Recipe, anatomy: Anatomy) -> str:
    """What the shape leaves, in a sentence: weights of the block linears, then parameters and operations of the whole model."""
    reduced = recipe.reduced(anatomy)
    before, after = flops_per_token(None, anatomy), flops_per_token(recipe, anatomy)
    linears = f"{_percent(reduced.linear_params / anatomy.linear_params)} of the block linears' {short_count(anatomy.linear_params)} weights stay"
    rest = anatomy.block_rest_params * (anatomy.blocks - len(reduced.present))
    params = anatomy.params - (anatomy.linear_params - reduced.linear_params) - rest
    operations = f"{short_count(after)} of {short_count(before)} operations a token"
    whole_model = f"of the whole model {short_count(params)} of {short_count(anatomy.params)} parameters and {operations}"
    return f"{linears}; {whole_model} ({_percent(after / before)})."


def _percent(share: float) -> str:
    return f"{amount(100 * share)}{THIN}%"


def block_diagram(recipe: Recipe, anatomy: Anatomy, key: str = "block-diagram") -> None:
    """Draw it, with its table. recipe: as a run has decided it where one has."""
    shapes = shapes_of(recipe, anatomy)
    st.html(drawing(shapes[:MOST_BLOCKS], anatomy.group))
    if warning := ends_warning(recipe.dropped_blocks(anatomy), anatomy.blocks):
        st.warning(f"{warning} On the map: click its number, and put it back.", icon=":material/warning:")
    undecided = " Which heads and neurons go is chosen by the run." if recipe.structure.shares else ""
    st.caption(f"Squares are heads, bars are neurons; dashed outlines are gone. {figures(recipe, anatomy)}{undecided}")
    with st.expander("As a table", key=f"{key}-twin"):
        table = {
            "block": [shape.number for shape in shapes],
            "heads": [sum(shape.heads) for shape in shapes],
            "neurons": [shape.neurons for shape in shapes],
            "removed": ["yes" if shape.dropped else "" for shape in shapes],
        }
        charts.twin(table, key)
