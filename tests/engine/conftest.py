"""What tests of the engine share beside the models: an anatomy on paper, and a loaded tiny model without files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitpress.engine.model.anatomy import Anatomy, Part

ROLE_SHAPES = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64), "gate": (160, 64), "up": (160, 64), "down": (64, 160)}
PLACES = {"gate": "mlp", "up": "mlp", "down": "mlp"}


def paper_anatomy(blocks: int = 4, tied: bool = True) -> Anatomy:
    """A Llama of width 64 in 16-bit weights that exists on paper only."""
    linears = tuple(
        Part(name=f"model.layers.{block}.{PLACES.get(role, 'self_attn')}.{role}_proj", role=role, block=block, out_features=rows, in_features=columns)
        for block in range(blocks)
        for role, (rows, columns) in ROLE_SHAPES.items()
    )  # fmt: skip
    embedding = Part(name="model.embed_tokens", role="embedding", out_features=100, in_features=64)
    head = None if tied else Part(name="lm_head", role="head", out_features=100, in_features=64)
    params = sum(part.numel for part in linears) + embedding.numel * (1 if tied else 2) + blocks * 128 + 64
    sizes = {"hidden": 64, "ffn": 160, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 100, "context": 128, "params": params, "bytes": 2 * params}
    return Anatomy(
        model="paper", architecture="LlamaForCausalLM", fingerprint="f" * 64, blocks=blocks, tied=tied,
        block_rest_params=128, linears=linears, embedding=embedding, head=head, **sizes,
    )  # fmt: skip


@pytest.fixture(scope="session")
def paper() -> Callable[..., Anatomy]:
    """`paper(blocks=4, tied=True)` -> Anatomy."""
    return paper_anatomy


@pytest.fixture(scope="session")
def in_memory(tiny_models: Callable[..., Any]) -> Callable[..., Any]:
    """`in_memory("llama", seed=0, **config changes)` -> Loaded, without tokenizer and folder."""

    def build(architecture: str, seed: int = 0, **changes: Any) -> Any:
        from bitpress.engine.model.inspect import anatomy_of
        from bitpress.engine.model.load import Loaded

        model = tiny_models(architecture, seed, **changes)
        return Loaded(model, None, anatomy_of(model, architecture), Path(), architecture)

    return build
