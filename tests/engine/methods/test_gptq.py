"""GPTQ: the golden row of METHODS 0.6, its invariants, against the plain column loop of Appendix I in float64, and what goes wrong."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.compress import compress
from bitpress.engine.errors import InputError
from bitpress.engine.methods import obs, registry
from bitpress.engine.methods.obs import inverse_factor
from bitpress.engine.methods.quantize import gptq
from bitpress.engine.methods.quantize.gptq import Grids, round_in_order
from bitpress.engine.methods.quantize.pipeline import Grid, decode, dequantize_groups, encode, group_range, make_grid, quantize_groups
from bitpress.engine.recipe import BITS, Recipe, Scheme, SparsityScheme, WeightScheme

METHOD = registry.linear("gptq")
PLAIN = {"act_order": False, "static_groups": False, "clip_search": False}
SCHEMES = st.builds(
    WeightScheme, bits=st.sampled_from(BITS), group_size=st.sampled_from((0, 8, 16, 24)), symmetric=st.booleans()
)  # fmt: skip


def matrix_and_gram(seed: int, rows: int = 6, width: int = 40) -> tuple[Tensor, Tensor]:
    """Weights, and second moments of inputs that depend on each other and differ in size, as those of a real layer do."""
    chance = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=chance, dtype=torch.float64) * torch.rand(width, generator=chance).double().mul(3).exp()
    inputs_MK = torch.randn(4 * width, width, generator=chance, dtype=torch.float64) @ mixing
    return torch.randn(rows, width, generator=chance), inputs_MK.t() @ inputs_MK / len(inputs_MK)


def quantised(weight_NK: Tensor, gram_KK: Tensor, scheme: WeightScheme, **options: Any) -> Any:
    return METHOD.apply(weight_NK, Scheme(weights=scheme), {"gram": gram_KK}, METHOD.parse(options))


def output_error(weight_NK: Tensor, made_NK: Tensor, gram_KK: Tensor) -> float:
    gap_NK = (weight_NK - made_NK).double()
    return float((gap_NK @ gram_KK * gap_NK).sum())


def test_golden_row_is_the_best_of_all_roundings() -> None:
    hessian = torch.tensor([[2, 1, 0], [1, 2, 0.5], [0, 0.5, 1]], dtype=torch.float64)
    weights = torch.tensor([[0.3, -0.7, 0.9]])
    grids = Grids(WeightScheme(bits=4, group_size=0), None, torch.ones(3))
    grids.by_group[0] = Grid(torch.tensor([0.5]), torch.tensor([8.0]), 15)
    codes = round_in_order(weights, torch.arange(3), inverse_factor(hessian, 0.0), grids)
    made = dequantize_groups(codes, grids.scheme)
    assert made[0].tolist() == [0.5, -1.0, 1.0]
    assert output_error(weights, made, hessian) == pytest.approx(0.12, abs=1e-6)
    every = [torch.tensor([[a, b, c]]) / 2 for a, b, c in product(range(-3, 4), repeat=3)]
    assert min(output_error(weights, other, hessian) for other in every) == pytest.approx(0.12, abs=1e-6)
    assert output_error(weights, torch.tensor([[0.5, -0.5, 1.0]]), hessian) == pytest.approx(0.27, abs=1e-6), "to the nearest"


def plain_loop(weight_NK: Tensor, gram_KK: Tensor, scheme: WeightScheme, damping: float) -> Tensor:
    """Appendix I: one column at a time in float64, each error spread over all columns to its right, through the inverse itself."""
    damped_KK = gram_KK + damping * gram_KK.diagonal().mean() * torch.eye(len(gram_KK), dtype=torch.float64)
    upper_KK = torch.linalg.cholesky(torch.linalg.inv(damped_KK), upper=True)
    left, made, size = weight_NK.double().clone(), torch.empty_like(weight_NK), scheme.group_size or weight_NK.shape[1]
    for column in range(weight_NK.shape[1]):
        if column % size == 0:
            grid = make_grid(*group_range(left[:, column : column + size].float()), scheme)
        value = left[:, column : column + 1]
        made[:, column : column + 1] = decode(encode(value.float(), grid), grid)
        error = (value - made[:, column : column + 1]) / upper_KK[column, column]
        left[:, column:] -= error * upper_KK[column, column:]
    return made


@pytest.mark.parametrize("block", [4, 24, 128])
@pytest.mark.parametrize("group_size", [0, 8, 24])
@pytest.mark.parametrize("bits", BITS)
def test_it_is_the_plain_loop(bits: int, group_size: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obs, "BLOCK", block)
    scheme = WeightScheme(bits=bits, group_size=group_size)
    weights, gram = matrix_and_gram(bits)
    made, expected = quantised(weights, gram, scheme, **PLAIN, damping=0.01).weight_NK, plain_loop(weights, gram, scheme, 0.01)
    # Float32 may land on the other side of a tie, after which the rest of that row differs.
    same_rows = ((made - expected).abs() < 1e-4).all(dim=1)
    assert same_rows.float().mean() > 0.8
    assert output_error(weights, made, gram) == pytest.approx(output_error(weights, expected, gram), rel=0.1)


@settings(max_examples=20, deadline=None)
@given(scheme=SCHEMES, seed=st.integers(0, 10_000), act_order=st.booleans(), static=st.booleans(), scale=st.sampled_from((1e-6, 1.0, 1e6)))
def test_with_equal_inputs_it_is_round_to_nearest(scheme: WeightScheme, seed: int, act_order: bool, static: bool, scale: float) -> None:
    weights = torch.randn(4, 50, generator=torch.Generator().manual_seed(seed))
    made = quantised(weights, scale * torch.eye(50, dtype=torch.float64), scheme, act_order=act_order, static_groups=static, clip_search=False)
    nearest = quantize_groups(weights, scheme)
    assert torch.equal(made.codes.codes_NK, nearest.codes_NK)
    assert torch.equal(made.codes.scales_NG, nearest.scales_NG)
    assert made.notes == ()


@settings(max_examples=12, deadline=None)
@given(scheme=SCHEMES, seed=st.integers(0, 10_000), act_order=st.booleans(), clip=st.booleans())
def test_outputs_are_nearer_than_after_round_to_nearest(scheme: WeightScheme, seed: int, act_order: bool, clip: bool) -> None:
    weights, gram = matrix_and_gram(seed, rows=12)
    made = quantised(weights, gram, scheme, act_order=act_order, clip_search=clip)
    nearest = dequantize_groups(quantize_groups(weights, scheme), scheme)
    assert output_error(weights, made.weight_NK, gram) < output_error(weights, nearest, gram)
    assert torch.equal(made.weight_NK, dequantize_groups(made.codes, scheme))


@settings(max_examples=12, deadline=None)
@given(scheme=SCHEMES, seed=st.integers(0, 10_000))
def test_the_error_of_a_row_is_the_sum_of_its_squared_steps(scheme: WeightScheme, seed: int) -> None:
    """With U^T U = H^-1 and E the errors over U's diagonal, W - Q = E U, so that (W - Q) H (W - Q)^T = E E^T."""
    weights, gram = matrix_and_gram(seed)
    made = quantised(weights, gram, scheme, act_order=False, damping=0.01).weight_NK
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    lower = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)  # U^-1
    steps = ((weights - made).double() @ lower).square().sum(1)
    gap = (weights - made).double()
    torch.testing.assert_close(steps, (gap @ damped * gap).sum(1), rtol=1e-6, atol=1e-9)


def test_inverse_factor_is_upper_triangular_and_inverts() -> None:
    _, gram = matrix_and_gram(1)
    upper = inverse_factor(gram, 0.05).double()
    mean = gram.diagonal().mean()
    damped = gram + 0.05 * mean * torch.eye(40, dtype=torch.float64)
    torch.testing.assert_close(upper.t() @ upper, torch.linalg.inv(damped), rtol=1e-4, atol=1e-4)
    assert torch.equal(upper, upper.triu())


def test_a_singular_hessian_is_damped_more_and_said() -> None:
    weights, _ = matrix_and_gram(0)
    ones = torch.ones(40, 40, dtype=torch.float64)
    made = quantised(weights, ones, WeightScheme(bits=4, group_size=8), damping=0.0)
    assert made.weight_NK.isfinite().all()
    assert made.notes == ("its inputs are linearly dependent; the damping was raised from 0 to 0.001",)


def test_silent_inputs_are_rounded_to_nearest_and_said() -> None:
    weights, gram = matrix_and_gram(0)
    gram[[3, 17]], gram[:, [3, 17]] = 0.0, 0.0
    scheme = WeightScheme(bits=4, group_size=8)
    made = quantised(weights, gram, scheme, **PLAIN | {"static_groups": True})
    nearest = dequantize_groups(quantize_groups(weights, scheme), scheme)
    assert torch.equal(made.weight_NK[:, [3, 17]], nearest[:, [3, 17]])
    assert made.notes == ("2 of its 40 inputs were 0 in all of the calibration text",)
    nothing = quantised(weights, torch.zeros_like(gram), scheme, clip_search=False)
    assert torch.equal(nothing.weight_NK, nearest)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(InputError, match="not finite"):
        inverse_factor(torch.full((4, 4), value, dtype=torch.float64), 0.01)


def test_moments_that_no_damping_mends_are_refused() -> None:
    with pytest.raises(InputError, match="cannot be inverted"):
        inverse_factor(torch.tensor([[1.0, 5.0], [5.0, 1.0]], dtype=torch.float64), 0.01)


@pytest.mark.parametrize(("width", "group"), [(576, 64), (576, 96), (1536, 1536), (1536, 192), (200, 200), (50, 24)])
def test_blocks_cover_all_inputs_and_a_group_starts_a_block_or_ends_inside(width: int, group: int) -> None:
    runs = list(obs.blocks(width, group))
    assert [index for start, stop in runs for index in range(start, stop)] == list(range(width))
    for start in range(0, width, group):
        first = next(run for run in runs if run[0] <= start < run[1])
        assert first[0] == start or min(start + group, width) <= first[1]


def test_the_clip_search_weighs_errors_by_the_inputs() -> None:
    weights = torch.tensor([[1.0] + [0.1] * 7])
    power = torch.tensor([1e-6] + [1.0] * 7).double()
    made = quantised(weights, torch.diag(power), WeightScheme(bits=2, group_size=8), candidates=99, damping=0.0)
    plain = quantised(weights, torch.diag(power), WeightScheme(bits=2, group_size=8), clip_search=False, damping=0.0)
    assert output_error(weights, made.weight_NK, torch.diag(power)) < 0.1 * output_error(weights, plain.weight_NK, torch.diag(power))


@pytest.mark.parametrize("symmetric", [False, True])
def test_zeros_of_a_stage_before_it_stay_zero(symmetric: bool) -> None:
    weights, gram = matrix_and_gram(2)
    weights[weights.abs() < 0.5] = 0.0
    scheme = Scheme(weights=WeightScheme(bits=4, group_size=8, symmetric=symmetric), sparsity=SparsityScheme(ratio=0.4))
    made = METHOD.apply(weights, scheme, {"gram": gram}, METHOD.parse({}))
    assert (made.weight_NK[weights == 0] == 0).all()
    assert (quantised(weights, gram, scheme.weights).weight_NK[weights == 0] != 0).any(), "without the pattern they would move"


# In a run ---------------------------------------------------------------------------------------------------------

IDS = torch.randint(2, 300, (4, 32), generator=torch.Generator().manual_seed(1))


def gptq_recipe(bits: int = 3, options: dict[str, Any] | None = None) -> Recipe:
    scheme = {"match": "*", "weights": {"bits": bits, "group_size": 16}}
    return Recipe.from_dict({"model": "tiny", "schemes": [scheme], "stages": [{"method": "gptq", "options": options or {}}]})


@pytest.mark.parametrize("true_sequential", [False, True])
def test_in_a_run_outputs_are_nearer_to_the_dense_model(in_memory: Callable[..., Any], true_sequential: bool) -> None:
    loaded, tokens = in_memory("llama"), CalibrationSet("made up", 0, "sha", IDS)
    rtn = Recipe.from_dict({**gptq_recipe().to_dict(), "stages": [{"method": "rtn"}]})
    made = compress(loaded, gptq_recipe(options={"true_sequential": true_sequential}), calibration=tokens)
    nearest = compress(loaded, rtn)
    dense, ours, theirs = (model(input_ids=IDS).logits.float() for model in (loaded.model, made.model, nearest.model))
    assert (ours - dense).square().mean() < (theirs - dense).square().mean()
    assert len(made.layers) == len(loaded.anatomy.linears)


def test_true_sequential_hears_the_rounded_layers_of_the_same_block(in_memory: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    grams: list[Tensor] = []
    real = gptq.Gptq.apply

    def listening(self: Any, weight_NK: Tensor, scheme: Scheme, stats: Any, options: Any) -> Any:
        grams.append(stats["gram"])
        return real(self, weight_NK, scheme, stats, options)

    monkeypatch.setattr(gptq.Gptq, "apply", listening)
    tokens = CalibrationSet("made up", 0, "sha", IDS)
    for apart in (False, True):
        compress(in_memory("llama"), gptq_recipe(2, {"true_sequential": apart}), calibration=tokens)
    together, apart_grams = grams[: len(grams) // 2], grams[len(grams) // 2 :]
    first_block = [torch.equal(one, other) for one, other in zip(together[:7], apart_grams[:7], strict=True)]
    assert first_block == [True, True, True, False, False, False, False], "q, k and v see the same; o, gate, up and down do not"


def test_remedies_are_told_in_the_events(in_memory: Callable[..., Any]) -> None:
    loaded, said = in_memory("llama"), []
    loaded.model.model.layers[0].input_layernorm.weight[5] = 0.0
    compress(loaded, gptq_recipe(), emit=lambda kind, data: said.append((kind, data)), calibration=CalibrationSet("made up", 0, "sha", IDS))
    notes = [data["text"] for kind, data in said if kind == "note"]
    assert notes[0].startswith("model.layers.0.self_attn.q_proj: 1 of its 64 inputs were 0 in all of the calibration text")


def test_a_text_shorter_than_the_matrix_is_wide_still_works(in_memory: Callable[..., Any]) -> None:
    made = compress(in_memory("llama"), gptq_recipe(), calibration=CalibrationSet("made up", 0, "sha", IDS[:1, :8]))
    assert made.model(input_ids=IDS).logits.isfinite().all()
