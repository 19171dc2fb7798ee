"""SparseGPT and the repairs: equality with magnitude for H = I, exactness on small matrices, joint codes, singular statistics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitpress.engine.errors import BitpressError
from bitpress.engine.methods import registry
from bitpress.engine.methods.base import Outcome
from bitpress.engine.methods.obs import inverse_factor
from bitpress.engine.methods.prune.pipeline import least_squares, prune_matrix, repair_by, schedule
from bitpress.engine.methods.quantize.pipeline import dequantize_groups
from bitpress.engine.recipe import PATTERNS, Scheme, SparsityScheme, WeightScheme

HALF = SparsityScheme(ratio=0.5)


def matrix(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def gram_of(width: int, seed: int = 1, rows: int = 400) -> Tensor:
    """Of inputs that hang together, some much larger than others."""
    sizes = torch.linspace(0.2, 3, width)[torch.randperm(width, generator=torch.Generator().manual_seed(seed))]
    x = matrix(rows, width, seed) @ (torch.eye(width) + 0.4 * matrix(width, width, seed + 1)) * sizes
    return (x.t() @ x).double() / rows


def run(weights: Tensor, gram: Tensor, scheme: Scheme, name: str = "sparsegpt", **options: object) -> Outcome:
    method = registry.linear(name)
    return method.apply(weights, scheme, {"gram": gram, "second_moment": gram.diagonal()}, method.parse(options))


def loss(weights: Tensor, made: Tensor, gram: Tensor) -> float:
    gap = (weights - made).double()
    return float((gap @ gram * gap).sum())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_identity_statistics_give_magnitude_block_by_block(pattern: str) -> None:
    weights, sparsity = matrix(6, 272), SparsityScheme(ratio=0.5, pattern=pattern)  # type: ignore[arg-type]
    made = run(weights, torch.eye(272, dtype=torch.float64), Scheme(sparsity=sparsity)).weight_NK
    expected = torch.cat([prune_matrix(part, part.abs(), sparsity) for part in weights.split(128, dim=1)], dim=1)
    assert torch.allclose(made, expected, atol=1e-6)


def test_factor_is_that_of_the_damped_inverse() -> None:
    gram = gram_of(24)
    factor = inverse_factor(gram, 0.05).double()
    damped = gram + 0.05 * gram.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    assert torch.allclose(factor.t() @ factor, torch.linalg.inv(damped), rtol=1e-4, atol=1e-6)
    assert torch.equal(factor, factor.triu())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_repair_loses_less_than_the_one_before(pattern: str) -> None:
    weights, gram = matrix(20, 160), gram_of(160)
    scheme = Scheme(sparsity=SparsityScheme(ratio=0.5, pattern=pattern))  # type: ignore[arg-type]
    lost = [loss(weights, run(weights, gram, scheme, "wanda", repair=repair).weight_NK, gram) for repair in ("none", "obs", "least_squares")]
    assert lost[0] > 1.3 * lost[1] > lost[1] > lost[2]
    assert loss(weights, run(weights, gram, scheme).weight_NK, gram) < 1.05 * lost[1]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), width=st.integers(2, 12), ratio=st.floats(0, 0.99), repair=st.sampled_from(("obs", "least_squares")))
def test_repairs_keep_the_zeros_and_change_nothing_where_nothing_goes(seed: int, width: int, ratio: float, repair: str) -> None:
    weights, gram = matrix(3, width, seed), gram_of(width, seed)
    mend = repair_by(repair, {"gram": gram}, 1e-4)  # type: ignore[arg-type]
    made = prune_matrix(weights, weights.abs(), SparsityScheme(ratio=ratio), repair=mend)
    gone = round(ratio * weights.numel())
    assert int((made == 0).sum()) >= gone
    if gone == 0:
        assert torch.allclose(made, weights, atol=1e-3)


def test_least_squares_is_the_solution_of_the_regression() -> None:
    x, weights = matrix(200, 8, 3), matrix(2, 8, 4)
    keep = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    made = least_squares(weights, keep, (x.t() @ x).double() / 200)
    expected = torch.linalg.lstsq(x[:, keep[0]], x @ weights[0, :, None]).solution[:, 0]
    assert torch.allclose(made[0, keep[0]], expected, atol=1e-4)
    assert not made[0, ~keep[0]].any()
    assert not made[1].any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "pattern"), [(32, "unstructured"), (48, "2:4"), (0, "4:8")])
@pytest.mark.parametrize("repair", ["obs", "none"])
def test_joint_codes_keep_the_zeros_and_what_is_rounded_is_made_up_for(group: int, pattern: str, symmetric: bool, repair: str) -> None:
    weights, gram = matrix(16, 144), gram_of(144)
    coded = WeightScheme(bits=4, group_size=group, symmetric=symmetric)
    sparsity = SparsityScheme(ratio=0.5, pattern=pattern)  # type: ignore[arg-type]
    made = run(weights, gram, Scheme(weights=coded, sparsity=sparsity), repair=repair)
    assert made.codes is not None
    assert torch.equal(dequantize_groups(made.codes, coded), made.weight_NK)
    assert int((made.weight_NK == 0).sum()) >= weights.numel() // 2
    if repair == "none":
        pruned = run(weights, gram, Scheme(sparsity=sparsity), repair=repair).weight_NK
        rtn = registry.linear("rtn")
        apart = rtn.apply(pruned, Scheme(weights=coded), {}, rtn.parse({})).weight_NK
        assert loss(pruned, made.weight_NK, gram) < 0.8 * loss(pruned, apart, gram)


def test_many_steps_end_at_the_same_ratio() -> None:
    weights, gram = matrix(16, 64), gram_of(64)
    assert schedule(4) == [1 - 0.75**3, 1 - 0.5**3, 1 - 0.25**3, 1.0]
    for pattern in PATTERNS:
        scheme = Scheme(sparsity=SparsityScheme(ratio=0.5, pattern=pattern))  # type: ignore[arg-type]
        once, slowly = (run(weights, gram, scheme, "wanda", repair="least_squares", steps=steps).weight_NK for steps in (1, 4))
        assert int((once == 0).sum()) == int((slowly == 0).sum()) == weights.numel() // 2
        assert loss(weights, slowly, gram) < 1.1 * loss(weights, once, gram)


def test_dead_inputs_and_singular_statistics() -> None:
    weights, gram = matrix(4, 16), gram_of(16)
    gram[3], gram[:, 3] = 0, 0
    made = run(weights, gram, Scheme(sparsity=HALF)).weight_NK
    assert made.isfinite().all()
    assert not made[:, 3].any()
    flat = torch.ones(16, 16, dtype=torch.float64)
    assert run(weights, flat, Scheme(sparsity=HALF)).weight_NK.isfinite().all()
    with pytest.raises(BitpressError, match="Calibrate on more"):
        inverse_factor(torch.full((4, 4), float("nan"), dtype=torch.float64))
