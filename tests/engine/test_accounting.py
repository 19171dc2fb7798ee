"""Bytes and FLOPs on paper: by hand on small shapes, on the known figures of SmolLM2, and against real files to the byte."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitpress.engine.accounting import flops_per_token, ideal_speedup, layout_of, size_of, weight_bytes_per_token
from bitpress.engine.layer_store import LayerStore
from bitpress.engine.model.anatomy import Anatomy, Part
from bitpress.engine.recipe import Recipe, Scheme
from bitpress.kernels.layout import BinaryLayout, BitmapLayout, DenseLayout, Layout, PairLayout, TableLayout, TwoFourLayout, UniformLayout

SCHEMES: dict[str, dict[str, Any]] = {
    "4-bit": {"schemes": [{"match": "*", "weights": {"bits": 4}}], "embedding": {"bits": 8}, "stages": [{"method": "rtn"}]},
    "3-bit short groups": {"schemes": [{"match": "*", "weights": {"bits": 3, "group_size": 24}}], "embedding": {"bits": 4}, "stages": [{"method": "rtn"}]},
    "row symmetric": {"schemes": [{"match": "*", "weights": {"bits": 8, "group_size": "row", "symmetric": True}}], "stages": [{"method": "rtn"}]},
    "mixed": {
        "schemes": [{"match": "role:attention", "weights": {"bits": 5, "group_size": 16}}, {"match": "role:mlp", "sparsity": {"ratio": 0.5}}],
        "stages": [{"method": "magnitude"}, {"method": "rtn"}],
    },
    "two of four": {
        "schemes": [{"match": "*", "sparsity": {"ratio": 0.5, "pattern": "2:4"}}, {"match": "role:attention", "weights": {"bits": 4, "group_size": 32}}],
        "stages": [{"method": "magnitude"}, {"method": "rtn"}],
    },
    "half the blocks": {"schemes": [{"match": "*", "weights": {"bits": 2}}], "structure": {"drop_blocks": "odd"}, "stages": [{"method": "rtn"}]},
}


def smollm2() -> Anatomy:
    """The shapes of METHODS 0.1."""
    shapes = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
    shapes |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
    linears = tuple(
        Part(name=f"b.{block}.{role}", role=role, block=block, out_features=n, in_features=k) for block in range(30) for role, (n, k) in shapes.items()
    )
    embedding = Part(name="embed", role="embedding", out_features=49152, in_features=576)
    return Anatomy(
        model="s", architecture="LlamaForCausalLM", fingerprint="", blocks=30, hidden=576, ffn=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152,
        context=2048, tied=True, params=134_515_008, bytes=2 * 134_515_008, block_rest_params=1152, linears=linears, embedding=embedding,
    )  # fmt: skip


def recipe(name: str, model: str = "m") -> Recipe:
    return Recipe.from_dict({"model": model, **SCHEMES[name]})


def test_smollm2_figures() -> None:
    size = size_of(recipe("4-bit"), smollm2())
    assert size.linear_params == 106_168_320
    # 4 bits a code, 16 a scale, and of zeros 5 bytes for the 9 groups of a 576-wide row, 12 for the 24 of a 1536-wide one.
    per_block = (576 + 192 + 192 + 576 + 1536 + 1536) * (288 + 18 + 5) + 576 * (768 + 48 + 12)
    assert size.linear_bytes == 30 * per_block
    assert size.bytes == 30 * per_block + 49152 * (576 + 2) + 2 * 35136
    assert size.bits_per_weight_linears == pytest.approx(4.32, abs=0.01)
    assert size.bits_per_weight_model == pytest.approx(8 * size.bytes / 134_515_008)
    assert flops_per_token(None, smollm2()) == 2 * (106_168_320 + 49152 * 576)
    assert smollm2().kv_bytes_per_token == 23_040


def test_dense_recipe_changes_no_figure(paper: Callable[..., Anatomy]) -> None:
    for anatomy in (paper(), paper(tied=False)):
        size = size_of(Recipe(model="m"), anatomy)
        assert size.bytes == size.dense_bytes == anatomy.bytes
        assert size.ratio == ideal_speedup(Recipe(model="m"), anatomy) == 1.0
        assert size.bits_per_weight_model == size.bits_per_weight_linears == 16


def scheme(**parts: Any) -> Scheme:
    return Scheme.model_validate(parts)


@pytest.mark.parametrize(
    ("parts", "layout"),
    [
        ({}, DenseLayout()),
        ({"sparsity": {"ratio": 0.5}}, BitmapLayout(0.5)),
        ({"sparsity": {"ratio": 0.06}}, DenseLayout()),
        ({"sparsity": {"ratio": 0.07}}, BitmapLayout(0.07)),
        ({"sparsity": {"ratio": 0.5, "pattern": "2:4"}}, TwoFourLayout(DenseLayout())),
        ({"sparsity": {"ratio": 0.0, "pattern": "2:4"}}, DenseLayout()),
        ({"sparsity": {"ratio": 0.5}, "weights": {"bits": 4}}, UniformLayout(4)),
        ({"sparsity": {"ratio": 0.5, "pattern": "2:4"}, "weights": {"bits": 4}}, TwoFourLayout(UniformLayout(4, 32))),
        ({"sparsity": {"ratio": 0.5, "pattern": "2:4"}, "weights": {"bits": 8, "group_size": 0, "symmetric": True}}, TwoFourLayout(UniformLayout(8, 0, True))),
        ({"sparsity": {"ratio": 0.5, "pattern": "2:4"}, "weights": {"bits": 2}}, UniformLayout(2)),
        ({"sparsity": {"ratio": 0.5, "pattern": "2:4"}, "weights": {"bits": 4, "zero": "float"}}, UniformLayout(4, zero="float")),
        ({"weights": {"bits": 4, "zero": "float", "symmetric": True}}, UniformLayout(4, symmetric=True)),
        ({"weights": {"bits": 4, "format": "nf4", "double_quant": True}}, TableLayout("nf4", 64, True)),
        ({"weights": {"bits": 3, "format": "bcq", "group_size": 0}}, BinaryLayout(3, 0)),
        ({"rank": {"keep": 0.5}}, PairLayout(0.5, DenseLayout(), DenseLayout())),
        ({"rank": {"keep": 0.5}, "weights": {"bits": 4}}, PairLayout(0.5, UniformLayout(4), UniformLayout(4))),
        ({"rank": {"keep": 0.5, "factors": {"bits": 8}}, "weights": {"bits": 4}}, PairLayout(0.5, UniformLayout(8), UniformLayout(8))),
        ({"weights": {"bits": 8}, "activations": {"bits": 8}}, UniformLayout(8)),
    ],
)  # fmt: skip
def test_a_scheme_alone_decides_the_layout(parts: dict[str, Any], layout: Layout) -> None:
    assert layout_of(scheme(**parts)) == layout


def test_a_sparse_layout_is_smaller_than_the_dense_one() -> None:
    for parts, limit in (({"sparsity": {"ratio": 0.07}}, 1.0), ({"sparsity": {"ratio": 0.5}}, 0.57), ({"sparsity": {"ratio": 0.5, "pattern": "2:4"}}, 0.57)):
        assert layout_of(scheme(**parts)).nbytes(576, 576) < limit * DenseLayout().nbytes(576, 576)


def test_flops_follow_blocks_and_context(paper: Callable[..., Anatomy]) -> None:
    anatomy, dropped = paper(), recipe("half the blocks")
    head = 2 * 100 * 64
    assert flops_per_token(dropped, anatomy) - head == (flops_per_token(None, anatomy) - head) // 2
    assert flops_per_token(None, anatomy, context=10) - flops_per_token(None, anatomy) == 4 * 10 * 4 * 16 * 4
    assert flops_per_token(recipe("4-bit"), anatomy) == flops_per_token(None, anatomy)


def test_a_separate_embedding_is_read_one_row_a_token(paper: Callable[..., Anatomy]) -> None:
    tied, untied = paper(), paper(tied=False)
    assert weight_bytes_per_token(None, tied) == tied.bytes
    assert weight_bytes_per_token(None, untied) == untied.bytes - 99 * 64 * 2
    assert ideal_speedup(recipe("4-bit"), tied) == pytest.approx(tied.bytes / size_of(recipe("4-bit"), tied).bytes)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("architecture", ["llama", "llama_untied", "gpt2", "phi3", "opt"])
def test_real_files_and_the_real_model_have_the_bytes_that_paper_says(in_memory: Callable[..., Any], tmp_path: Path, architecture: str, name: str) -> None:
    from safetensors import safe_open

    from bitpress.engine.compress import compress

    loaded, plan = in_memory(architecture), recipe(name, architecture)
    made = compress(loaded, plan, store=LayerStore(tmp_path))
    size = size_of(plan, loaded.anatomy)
    for path in (tmp_path / "layers").iterdir():
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size - header == size.layer_bytes[path.name.removesuffix(".safetensors")]
        with safe_open(path, "pt") as file:
            assert sum(file.get_tensor(key).nbytes for key in file.keys()) == path.stat().st_size - header  # noqa: SIM118
    assert made.bytes == size.bytes
    assert {layer.layer: layer.bytes for layer in made.layers} == {layer.layer: size.layer_bytes[layer.layer] for layer in made.layers}
