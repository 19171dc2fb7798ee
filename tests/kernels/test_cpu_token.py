"""A whole step in C++ gives the bits of the same step call by call, with any mixture of matrices; what it does not take it leaves."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from bitpress.kernels import cpu_build, cpu_step
from bitpress.kernels.cpu_token import BlockParts, EndParts, TokenStep
from bitpress.kernels.layout import TableLayout, UniformLayout
from bitpress.kernels.packed import PackedEmbedding, PackedLinear
from bitpress.kernels.rows import DenseRows, join

pytestmark = pytest.mark.skipif(cpu_build.library() is None, reason=f"no compiled library: {cpu_build.why_not()}")
WIDTH, HEADS, KV_HEADS, CHANNELS, FFN, CAPACITY = 48, 3, 1, 16, 80, 12
SHAPES = (
    (HEADS * CHANNELS, WIDTH),
    (KV_HEADS * CHANNELS, WIDTH),
    (KV_HEADS * CHANNELS, WIDTH),
    (WIDTH, HEADS * CHANNELS),
    (FFN, WIDTH),
    (FFN, WIDTH),
    (WIDTH, FFN),
)


def block(packed, layouts: list[UniformLayout | None], seed: int, bias: bool = False) -> BlockParts:
    """Seven matrices, dense where the layout is None."""
    made: list[nn.Module] = []
    for place, (shape, layout) in enumerate(zip(SHAPES, layouts, strict=True)):
        dense = nn.Linear(shape[1], shape[0], bias=bias, dtype=torch.bfloat16)
        made.append(dense if layout is None else PackedLinear(packed(shape, layout, seed + place)))
    norms = tuple(((torch.rand(WIDTH) + 0.5).bfloat16(), 1e-5) for _ in range(2))
    rows = tuple(join(group, torch.bfloat16) for group in (made[:3], made[3:4], made[4:6], made[6:]))
    return BlockParts(norms, rows)


def call_by_call(blocks: list[BlockParts], x_1D: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, at: int) -> Tensor:
    for parts, planes in zip(blocks, cache[:, 0].unbind(), strict=True):
        (attention, epsilon), (mlp, mlp_epsilon) = parts.norms
        qkv, out, gate_up, down = parts.matrices
        mixed = cpu_step.attend_one(qkv(cpu_step.rms_norm(x_1D, attention, epsilon)), cos, sin, planes, at, HEADS, CHANNELS**-0.5)
        x_1D = x_1D + out(mixed)
        x_1D = x_1D + down(cpu_step.gated_silu(*gate_up(cpu_step.rms_norm(x_1D, mlp, mlp_epsilon)).chunk(2, -1)))
    return x_1D


FOUR, WIDE, FLOATS = UniformLayout(4, 32), UniformLayout(8, 0, True), UniformLayout(3, 32, zero="float")


@pytest.mark.parametrize(
    "layouts", [[FOUR] * 7, [WIDE] * 7, [FLOATS] * 7, [FOUR, WIDE, FLOATS, FOUR, WIDE, FOUR, FLOATS], [None, FOUR, None, FOUR, FOUR, None, WIDE]]
)
def test_the_same_bits_as_call_by_call(packed, layouts: list[UniformLayout | None]) -> None:
    blocks = [block(packed, layouts, seed) for seed in (0, 10)]
    step = TokenStep.of(blocks)
    assert step is not None
    cache = torch.randn(2, 1, 2 * KV_HEADS, CAPACITY, CHANNELS).bfloat16()
    other, cos, sin = cache.clone(), torch.randn(CHANNELS), torch.randn(CHANNELS)
    for at in range(3, 6):
        x_1D = torch.randn(1, WIDTH).bfloat16()
        wanted = call_by_call(blocks, x_1D, cos, sin, other, at)
        found = step(x_1D.clone(), cos, sin, cache, at, HEADS, CHANNELS**-0.5, FFN)
        if None in layouts:  # dense products of torch add in another order
            assert (found - wanted).float().norm() < 0.02 * wanted.float().norm()
        else:
            assert torch.equal(found, wanted) and torch.equal(cache, other)


@pytest.mark.parametrize("kind", ["8 bits, tied", "8 bits, symmetric, tied", "4 bits, tied", "dense", "dense embedding, 4-bit head"])
def test_from_a_token_to_its_logits(packed, kind: str) -> None:
    words, norm = 70, ((torch.rand(WIDTH) + 0.5).bfloat16(), 1e-5)
    plain = nn.Embedding(words, WIDTH, dtype=torch.bfloat16)
    layout = UniformLayout(4 if "4 bits" in kind else 8, 16 if "4 bits" in kind else 32, symmetric="symmetric" in kind)
    embedding: nn.Module = PackedEmbedding(packed((words, WIDTH), layout)) if "tied" in kind else plain
    head: nn.Module = embedding.head() if isinstance(embedding, PackedEmbedding) else nn.Linear(WIDTH, words, bias=False, dtype=torch.bfloat16)
    if "4-bit head" in kind:
        head = PackedLinear(packed((words, WIDTH), FOUR))
    rows, blocks = join([head], torch.bfloat16), [block(packed, [FOUR] * 7, 0)]
    step = TokenStep.of(blocks, EndParts(embedding, norm, rows))
    assert step is not None
    if "4 bits" in kind:  # groups of 16 have no tiles
        assert step.ends is None and not step.looks_up
        return
    assert step.looks_up
    cache, cos, sin = torch.randn(1, 1, 2 * KV_HEADS, CAPACITY, CHANNELS).bfloat16(), torch.randn(CHANNELS), torch.randn(CHANNELS)
    state = call_by_call(blocks, embedding(torch.tensor([5])), cos, sin, cache.clone(), 3)
    wanted = rows(cpu_step.rms_norm(state, *norm)).float()[0]
    found = step.logits(5, torch.empty(1, WIDTH).bfloat16(), cos, sin, cache, 3, HEADS, CHANNELS**-0.5, FFN)
    assert found.dtype == torch.float32 and found.shape == (words,)
    assert torch.equal(found, wanted) if kind != "dense" else (found - wanted).norm() < 0.02 * wanted.norm()


def test_dense_blocks_are_torchs_products(packed) -> None:
    blocks = [block(packed, [None] * 7, 0)]
    step = TokenStep.of(blocks)
    assert step is not None
    cache, cos, sin, x_1D = torch.randn(1, 1, 2, CAPACITY, CHANNELS).bfloat16(), torch.randn(CHANNELS), torch.randn(CHANNELS), torch.randn(1, WIDTH).bfloat16()
    wanted = call_by_call(blocks, x_1D, cos, sin, cache.clone(), 4).double()
    assert (step(x_1D.clone(), cos, sin, cache, 4, HEADS, CHANNELS**-0.5, FFN).double() - wanted).norm() < 0.02 * wanted.norm()


def test_what_it_does_not_take(packed, monkeypatch: pytest.MonkeyPatch) -> None:
    four = [FOUR] * 7
    assert TokenStep.of([block(packed, [None] * 7, 0, bias=True)]) is None
    assert TokenStep.of([block(packed, [FOUR, FOUR, FOUR, TableLayout("nf4", 16), FOUR, FOUR, FOUR], 0)]) is None
    parts = block(packed, four, 0)
    mixed = PackedLinear(packed(SHAPES[3], WIDE, 3), activation_bits=8, outliers=6.0)
    assert TokenStep.of([BlockParts(parts.norms, (parts.matrices[0], join([mixed], torch.bfloat16), *parts.matrices[2:]))]) is None, "outliers stay unrounded"
    floats = BlockParts(tuple((weight.float(), epsilon) for weight, epsilon in parts.norms), parts.matrices)
    assert TokenStep.of([floats]) is None
    odd = SimpleNamespace(weight=torch.zeros(4, 4), bias=None, out_features=4)
    assert isinstance(join([nn.Linear(4, 4)], torch.float32), DenseRows) and TokenStep.of([BlockParts(parts.norms, (odd, *parts.matrices[1:]))]) is None
    monkeypatch.setattr(cpu_build, "library", lambda: None)
    assert TokenStep.of([parts]) is None
