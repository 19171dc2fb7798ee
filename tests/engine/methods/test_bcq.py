"""Binary coding: golden vectors of METHODS 0.6, uniform grids inside it, falling error, nearest levels, edge groups, what is stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.engine.methods import registry
from bitpress.engine.methods.quantize.binary import Fit, Planes, alternate, decode, error_of, greedy, nearest, refit, signs, uniform_planes
from bitpress.engine.methods.quantize.pipeline import decode as decode_uniform
from bitpress.engine.methods.quantize.pipeline import dequantize_groups, encode, group_range, make_grid, quantize_groups
from bitpress.engine.recipe import BITS, Scheme, WeightScheme
from bitpress.kernels import reference

GOLDEN = torch.tensor([[0.9, -0.3, 0.1, -1.2, 0.45, 0, -0.05, 0.7]], dtype=torch.float64)
NONE = torch.zeros(1, 1, dtype=torch.float64)


def groups_of(seed: int, rows: int = 6, width: int = 24, tail: float = 0.0) -> torch.Tensor:
    """Normal numbers; with a tail every seventh is made larger by that factor."""
    made = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    made[:, ::7] *= 1 + tail
    return made


def code(weight_NK: torch.Tensor, bits: int, group: int = 8, **options: object) -> tuple[torch.Tensor, object]:
    method, scheme = registry.get("bcq"), Scheme(weights=WeightScheme(bits=bits, group_size=group, format="bcq"))
    outcome = method.apply(weight_NK, scheme, {}, method.parse(options))
    return outcome.weight_NK, outcome.packed


@pytest.mark.parametrize(
    ("bits", "alphas", "mse"), [(1, [0.4625], 0.166719), (2, [0.4625, 0.353125], 0.0420215), (3, [0.4625, 0.353125, 0.161719], 0.0158685)]
)  # fmt: skip
def test_golden_greedy(bits: int, alphas: list[float], mse: float) -> None:
    made = greedy(GOLDEN, bits, NONE)
    assert made.planes.alphas[0].tolist() == pytest.approx(alphas, abs=1e-6)
    assert float((decode(made.places_Rg, made.planes) - GOLDEN).square().mean()) == pytest.approx(mse, abs=5e-7)


@pytest.mark.parametrize(("bits", "alphas", "mse"), [(2, [0.556667, 0.376667], 0.0337083), (3, [0.545536, 0.332143, 0.166964], 0.0076897)])
def test_golden_alternating(bits: int, alphas: list[float], mse: float) -> None:
    made = alternate(GOLDEN, greedy(GOLDEN, bits, NONE), 15, fit_shift=False)
    assert made.planes.alphas[0].tolist() == pytest.approx(alphas, abs=1e-6)
    assert float((decode(made.places_Rg, made.planes) - GOLDEN).square().mean()) == pytest.approx(mse, abs=5e-7)


def test_golden_uniform_levels_as_binary_code() -> None:
    planes = Planes(torch.tensor([[2.0, 1.0, 0.5]]), torch.tensor([[3.5]]))
    assert (planes.levels() + planes.shift).tolist() == [[7, 6, 5, 4, 3, 2, 1, 0]]


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from(BITS), symmetric=st.booleans(), seed=st.integers(0, 10_000))
def test_every_uniform_grid_is_a_binary_code(bits: int, symmetric: bool, seed: int) -> None:
    groups = groups_of(seed).double()
    grid = make_grid(*group_range(groups), WeightScheme(bits=bits, group_size=0, symmetric=symmetric), scale_dtype=None)
    planes = uniform_planes(grid, bits)
    uniform, binary = decode_uniform(encode(groups, grid), grid), decode(nearest(groups - planes.shift, planes.levels()), planes)
    # Rounding half to even and taking the higher of two equally near levels may differ, but not in the error.
    assert torch.allclose((uniform - groups).abs(), (binary - groups).abs(), atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 4), seed=st.integers(0, 10_000), shift=st.booleans(), kind=st.sampled_from(("normal", "tailed", "few", "same")))
def test_neither_half_of_a_round_raises_the_error(bits: int, seed: int, shift: bool, kind: str) -> None:
    groups = groups_of(seed, tail=9.0 if kind == "tailed" else 0.0).double()
    if kind in ("few", "same"):  # the normal equations of these are singular
        groups = groups.round() if kind == "few" else groups[:, :1].expand(-1, 24).contiguous()
    fit = greedy(groups, bits, groups.mean(dim=1, keepdim=True) if shift else torch.zeros(len(groups), 1, dtype=torch.float64))
    for _ in range(6):
        before = (decode(fit.places_Rg, fit.planes) - groups).square().sum(dim=1, keepdim=True)
        planes = refit(groups, fit, shift)
        # The same signs under the new numbers: their order may have changed, so the best relabelling is the nearest level at worst.
        solved = least_squares_error(groups, signs(bits).double()[fit.places_Rg], shift)
        places = nearest(groups - planes.shift, planes.levels())
        after = (decode(places, planes) - groups).square().sum(dim=1, keepdim=True)
        assert (solved <= before + 1e-9).all()
        assert (after <= solved + 1e-9).all()
        fit = Fit(planes, places)


def least_squares_error(groups: torch.Tensor, columns: torch.Tensor, shift: bool) -> torch.Tensor:
    """The least squared error that any numbers have on these signs, by the pseudo-inverse."""
    design = torch.cat([columns, torch.ones_like(columns[..., :1])], dim=-1) if shift else columns
    target = groups[..., None]
    return (design @ (torch.linalg.pinv(design) @ target) - target).square().sum(dim=1)


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(1, 8), seed=st.integers(0, 10_000))
def test_the_nearest_level_is_the_nearest(bits: int, seed: int) -> None:
    groups, alphas = groups_of(seed), groups_of(seed + 1, width=bits)
    levels = Planes(alphas, torch.zeros(len(alphas), 1)).levels()
    gap = (levels.gather(1, nearest(groups, levels)) - groups).abs()
    assert torch.allclose(gap, (groups[:, :, None] - levels[:, None]).abs().amin(dim=2), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(bits=st.integers(2, 4), seed=st.integers(0, 10_000), width=st.integers(9, 40), group=st.sampled_from((0, 8, 9)), shift=st.booleans())
def test_what_is_stored_is_what_is_handed_on_and_at_the_nearest_stored_level(bits: int, seed: int, width: int, group: int, shift: bool) -> None:
    weights = groups_of(seed, 3, width)
    made, packed = code(weights, bits, group, rounds=2, shift=shift)
    assert torch.equal(made, reference.dequantize(packed))
    span = group or width
    alphas, shifts = packed.tensors["alphas"].float(), packed.tensors["shifts"].float()
    levels = (alphas @ signs(bits).t() + shifts[..., None]).repeat_interleave(span, dim=1)[:, :width]
    assert torch.allclose((made - weights).abs(), (levels - weights[..., None]).abs().amin(dim=2), atol=1e-5)
    if not shift:
        assert not shifts.any()


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-39, 3.3e38])
def test_constant_groups_are_kept_and_finite(value: float) -> None:
    made, _ = code(torch.full((2, 20), value), 3)
    assert made.flatten().tolist() == pytest.approx([value] * 40, rel=0.01, abs=1e-38)


def test_a_short_last_group_is_fitted_on_its_own() -> None:
    weights = torch.cat([groups_of(0, 1, 8), 100 * groups_of(1, 1, 3)], dim=1)
    made, packed = code(weights, 3)
    assert packed.tensors["alphas"].shape == (1, 2, 3)
    alone, _ = code(weights[:, 8:], 3, group=0)
    assert torch.equal(made[:, 8:], alone)


def test_the_matrix_is_the_same_whether_in_one_chunk_or_many(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = groups_of(0, 33, 40)
    whole = code(weights, 3, 16)[0]
    monkeypatch.setattr("bitpress.engine.methods.quantize.binary.CHUNK_WEIGHTS", 100)
    assert torch.equal(code(weights, 3, 16)[0], whole)


def test_greedy_loses_to_rounding_at_4_bits_and_alternation_does_not() -> None:
    """The lesson of METHODS 1.8, on normal weights whose relative errors it lists."""
    weights, scheme = torch.randn(64, 576, generator=torch.Generator().manual_seed(0)), WeightScheme(bits=4, group_size=0)
    zero = torch.zeros(64, 1)
    rtn = (dequantize_groups(quantize_groups(weights, scheme), scheme) - weights).square().sum() / weights.square().sum()
    start = greedy(weights, 4, zero)
    plain = (decode(start.places_Rg, start.planes) - weights).square().sum() / weights.square().sum()
    fitted = error_of(weights, alternate(weights, start, 15, False).planes).sum() / weights.square().sum()
    assert fitted < rtn < plain
    assert float(rtn) == pytest.approx(0.0147, rel=0.1)
    assert float(plain) == pytest.approx(0.0340, rel=0.15)
    assert float(fitted) == pytest.approx(0.0117, rel=0.1)


def test_a_shift_pays_on_skewed_weights() -> None:
    weights = groups_of(3, 32, 64).exp()
    errors = [float((code(weights, 2, 64, shift=shift)[0] - weights).square().sum()) for shift in (False, True)]
    assert errors[1] < 0.8 * errors[0]


def test_only_binary_formats_are_satisfied() -> None:
    method = registry.get("bcq")
    assert method.satisfies(Scheme(weights=WeightScheme(bits=3, format="bcq")))
    assert not method.satisfies(Scheme(weights=WeightScheme(bits=3)))


def test_errors_of_large_inputs_count_more() -> None:
    weights, moment = groups_of(7, 16, 64), torch.ones(64, dtype=torch.float64)
    moment[:4] = 100.0
    method, scheme = registry.get("bcq"), Scheme(weights=WeightScheme(bits=2, group_size=32, format="bcq"))
    options = method.parse({"by_inputs": True})
    assert method.needs_for(options) == {"second_moment"} and method.needs_for(method.parse({})) == set()
    weighed = method.apply(weights, scheme, {"second_moment": moment}, options).weight_NK
    errors = [float(((made - weights).square() * moment).sum()) for made in (code(weights, 2, 32)[0], weighed)]
    assert errors[1] < 0.8 * errors[0]
    same = method.apply(weights, scheme, {"second_moment": torch.full((64,), 3.0)}, options).weight_NK
    assert torch.allclose(same, code(weights, 2, 32)[0], atol=1e-2)
