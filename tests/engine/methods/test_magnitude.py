"""Magnitude pruning: golden mask of METHODS 0.6, exact counts, ties, patterns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.engine.methods import registry
from bitpress.engine.methods.prune.pipeline import _lowest, prune_matrix, select
from bitpress.engine.recipe import Scheme, SparsityScheme

GOLDEN = torch.tensor([[0.9, -0.3, 0.1, -1.2, 0.45, 0, -0.05, 0.7]])


def pruned(weights: torch.Tensor, sparsity: SparsityScheme, **options: str) -> torch.Tensor:
    method = registry.get("magnitude")
    return method.apply(weights, Scheme(sparsity=sparsity), {}, method.parse(options)).weight_NK


def test_golden_2_4_mask() -> None:
    made = pruned(GOLDEN, SparsityScheme(ratio=0.5, pattern="2:4"))
    assert (made != 0).int().tolist() == [[1, 0, 0, 1, 1, 0, 0, 1]]
    assert torch.equal(made[made != 0], GOLDEN[made != 0])


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 9),
    width=st.integers(1, 30),
    ratio=st.floats(0, 0.99),
    levels=st.integers(1, 8),
    scope=st.sampled_from(("layer", "row")),
)
def test_count_of_zeros_is_exact_also_among_ties(seed: int, rows: int, width: int, ratio: float, levels: int, scope: str) -> None:
    scores = torch.randint(0, levels, (rows, width), generator=torch.Generator().manual_seed(seed)).float()
    keep = select(scores, SparsityScheme(ratio=ratio), scope)  # type: ignore[arg-type]
    if scope == "layer":
        assert int((~keep).sum()) == round(ratio * rows * width)
        assert not keep.any() or keep.all() or scores[keep].min() >= scores[~keep].max()
    else:
        assert (~keep).sum(dim=1).tolist() == [round(ratio * width)] * rows


def test_among_equals_the_first_go() -> None:
    assert select(torch.ones(2, 4), SparsityScheme(ratio=0.5)).int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert select(torch.ones(2, 4), SparsityScheme(ratio=0.5), "row").int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert select(torch.ones(1, 8), SparsityScheme(ratio=0.5, pattern="2:4")).int().tolist() == [[0, 0, 1, 1, 0, 0, 1, 1]]


def test_layer_and_row_scopes_differ_where_rows_differ() -> None:
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    assert (pruned(weights, SparsityScheme(ratio=0.5)) == 0).int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert (pruned(weights, SparsityScheme(ratio=0.5), scope="row") == 0).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]


def test_ratio_zero_keeps_all_and_the_input_is_never_changed() -> None:
    before = GOLDEN.clone()
    assert torch.equal(pruned(GOLDEN, SparsityScheme(ratio=0.0)), before)
    pruned(GOLDEN, SparsityScheme(ratio=0.9))
    assert torch.equal(GOLDEN, before)


def test_a_repair_acts_on_what_stays_only() -> None:
    made = prune_matrix(GOLDEN, GOLDEN.abs(), SparsityScheme(ratio=0.5), repair=lambda weights, keep: weights * 2)
    assert torch.equal(made, torch.where(made != 0, 2 * GOLDEN, torch.zeros(())))
    assert int((made == 0).sum()) == 4


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_half_of_a_real_shape_goes(pattern: str) -> None:
    weights = torch.randn(96, 288, generator=torch.Generator().manual_seed(1))
    made = pruned(weights, SparsityScheme(ratio=0.5, pattern=pattern))  # type: ignore[arg-type]
    assert int((made == 0).sum()) == weights.numel() // 2
    if pattern == "2:4":
        assert ((made.view(-1, 4) == 0).sum(dim=1) == 2).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 4096), (200, 4), (40, 8), (3, 200)])
@pytest.mark.parametrize("kind", ["apart", "alike", "signed", "far"])
def test_the_lowest_are_those_of_a_stable_sort(shape: tuple[int, int], kind: str) -> None:
    chance = torch.Generator().manual_seed(shape[1])
    scores = torch.randn(shape, generator=chance)
    if kind == "alike":
        scores = torch.randint(-2, 3, shape, generator=chance).float() * torch.where(scores > 0, 1.0, -1.0)  # zeros of both signs
    elif kind == "apart":
        scores = scores.abs()
    elif kind == "far":
        scores *= 10.0 ** torch.randint(-30, 30, shape, generator=chance)
    for count in {0, 1, shape[1] // 2, shape[1]}:
        wanted = torch.zeros(shape, dtype=torch.bool).scatter(1, scores.sort(dim=1, stable=True).indices[:, :count], True)
        assert torch.equal(_lowest(scores, count), wanted)
