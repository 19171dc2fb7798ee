"""The parts of a model by role, as a record that a screen can read. Knows names, shapes and bytes; imports no torch.

`inspect.py` beside this file makes the record from a loaded model and writes it as `anatomy.json`.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict

ATTENTION_ROLES = ("q", "k", "v", "qkv", "o")
MLP_ROLES = ("gate", "up", "gate_up", "down", "fc1", "fc2")
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
