"""The parts of a model by role, as a record that a screen can read. Knows names, shapes and bytes; imports no torch.

`inspect.py` beside this file makes the record from a loaded model and writes it as `anatomy.json`.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

ATTENTION_ROLES = ("q", "k", "v", "qkv", "o")
MLP_ROLES = ("gate", "up", "gate_up", "down", "fc1", "fc2")
WRITERS = ("o", "down", "fc2")  # of the hidden states; all others read them
ROLES = (*ATTENTION_ROLES, *MLP_ROLES, "other")


class Part(BaseModel):
    """One weight matrix of shape (out_features, in_features), whatever the order in which the model stores it."""

    model_config = ConfigDict(frozen=True)

    name: str
    role: str
    block: int | None = None
    out_features: int
    in_features: int
    bias: bool = False
    fused: tuple[str, ...] = ()  # the roles a fused matrix holds, in row order

    @property
    def numel(self) -> int:
        """Weights in the matrix, its bias not counted."""
        return self.out_features * self.in_features


class Units(NamedTuple):
    """How many query heads, key-value heads and MLP neurons a block has."""

    heads: int
    kv_heads: int
    neurons: int


class Anatomy(BaseModel):
    """A causal language model in parts. `linears` are the block linears; embedding and head stand apart."""

    model_config = ConfigDict(frozen=True, ignored_types=(cached_property,))

    version: int = 1
    model: str
    architecture: str
    fingerprint: str  # sha256 over names, shapes and bytes of all weights
    blocks: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    tied: bool
    params: int
    bytes: int  # of the dense weights, a tied matrix counted once
    itemsize: int = 2
    block_rest_params: int = 0  # norms and biases of one block
    block_prefix: str = "model.layers"
    linears: tuple[Part, ...]
    embedding: Part
    head: Part | None = None  # only where untied

    @cached_property
    def by_name(self) -> dict[str, Part]:
        """Every part by its full name, the embedding and an untied head included."""
        parts = [*self.linears, self.embedding, *([self.head] if self.head else [])]
        return {part.name: part for part in parts}

    def of_block(self, block: int) -> Iterator[Part]:
        """The linears of one block, in the order in which they run."""
        return (part for part in self.linears if part.block == block)

    @property
    def present(self) -> list[int]:
        """The numbers of the blocks that are there: all, unless it is a reduced anatomy."""
        return sorted({part.block for part in self.linears if part.block is not None})

    @property
    def units(self) -> Units:
        """What every block has while nothing is removed."""
        return Units(self.heads, self.kv_heads, self.ffn)

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return max(1, self.heads // max(1, self.kv_heads))

    def units_of(self, block: int) -> Units:
        """What a block of a reduced anatomy has, from the shapes of its matrices; a head size of 0 counts as no heads."""
        sizes = {part.role: part for part in self.of_block(block)}
        inner = next((sizes[role].in_features for role in ("down", "fc2") if role in sizes), self.ffn)
        if not self.head_dim or not {"o", "k"} <= set(sizes):
            return self.units._replace(neurons=inner)
        return Units(sizes["o"].in_features // self.head_dim, sizes["k"].out_features // self.head_dim, inner)

    def reduced(self, dropped: Iterable[int], units: Mapping[int, Units], width: int | None = None) -> "Anatomy":
        """Without some blocks, with fewer units in others, or hidden states of another width inside the blocks.

        Names and block numbers stay those of the whole model, and so do `blocks` and `hidden`.
        """
        gone = set(dropped)
        if not gone and not units and width is None:
            return self
        parts = (self._resized(part, units.get(part.block or 0, self.units)) for part in self.linears if part.block not in gone)
        if width is not None:
            sides = dict.fromkeys(WRITERS, "out_features")
            parts = (part.model_copy(update={sides.get(part.role, "in_features"): width}) for part in parts)
        return Anatomy.model_construct(**{**{name: getattr(self, name) for name in Anatomy.model_fields}, "linears": tuple(parts)})

    def _resized(self, part: Part, units: Units) -> Part:
        """A matrix between units that are fewer than all: its outputs or inputs shrink in proportion."""
        if units == self.units:
            return part
        heads, kv_heads, neurons = units
        outputs = {"q": (heads, self.heads), "k": (kv_heads, self.kv_heads), "v": (kv_heads, self.kv_heads)}
        outputs |= dict.fromkeys(("gate", "up", "gate_up", "fc1"), (neurons, self.ffn))
        inputs = {"o": (heads, self.heads), "down": (neurons, self.ffn), "fc2": (neurons, self.ffn)}
        rows, columns = outputs.get(part.role, (1, 1)), inputs.get(part.role, (1, 1))
        shape = {"out_features": part.out_features * rows[0] // rows[1], "in_features": part.in_features * columns[0] // columns[1]}
        return part.model_copy(update=shape)

    @property
    def linear_params(self) -> int:
        """Weights of all block linears."""
        return sum(part.numel for part in self.linears)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that occur, in the order of `ROLES`."""
        found = {part.role for part in self.linears}
        return tuple(role for role in ROLES if role in found)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes one more token adds to a 16-bit KV cache over all blocks."""
        return 2 * self.blocks * self.kv_heads * self.head_dim * 2

    def save(self, path: Path) -> None:
        """Write `anatomy.json` whole or not at all."""
        part = path.with_name(path.name + ".partial")
        part.write_text(self.model_dump_json(indent=1))
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Anatomy":
        """Read what `save` wrote. Raises pydantic's ValidationError when the file is of another kind."""
        return cls.model_validate_json(path.read_text())
