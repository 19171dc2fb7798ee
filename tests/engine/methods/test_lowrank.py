"""Low rank: the optimum that each method claims, ROM as SVD-LLM, full rank as nothing, factors with widths, whole at break-even, bad input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitpress.engine.accounting import break_even, flops_per_token, kept_whole, removed_share, size_of
from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.compress import compress, load_compressed
from bitpress.engine.errors import InputError
from bitpress.engine.layer_store import LayerStore
from bitpress.engine.measure.memory import weights_of
from bitpress.engine.methods import registry
from bitpress.engine.methods.catalogue import check_stages
from bitpress.engine.methods.lowrank import pipeline
from bitpress.engine.methods.lowrank.pipeline import Factors, diagonal_root, lost, output_moment, root_of, truncate
from bitpress.engine.model import surgery
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import RankScheme, Recipe, Scheme, WeightScheme
from bitpress.kernels.packed import PackedLinear

METHODS = ("svd", "asvd", "svd-llm", "rom")
TOKENS = CalibrationSet("made up", 0, "sha", torch.arange(96).view(4, 24) * 7 % 320)
Build = Callable[..., Loaded]


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def statistics(columns: int, seed: int = 1) -> dict[str, Tensor]:
    x_MK = torch.randn(4 * columns, columns, generator=torch.Generator().manual_seed(seed)).double() @ matrix(columns, columns, seed + 1).double()
    return {"gram": x_MK.t() @ x_MK / len(x_MK), "mean_abs": x_MK.abs().mean(0), "second_moment": x_MK.square().mean(0)}


def made(name: str, weight: Tensor, stats: dict[str, Tensor], **rank: Any) -> Factors:
    method = registry.linear(name)
    factors = method.apply(weight, Scheme(rank=RankScheme(**rank)), stats, method.parse({})).factors
    assert factors
    return Factors(factors[0].weight_NK, factors[1].weight_NK)


def dense(factors: Factors) -> Tensor:
    return factors.left_NR @ factors.right_RK


@settings(max_examples=8, deadline=None)
@given(rows=st.integers(4, 24), columns=st.integers(4, 24), rank=st.integers(1, 24), seed=st.integers(0, 999))
def test_rom_is_svd_llm_and_loses_the_discarded_moments(rows: int, columns: int, rank: int, seed: int) -> None:
    rank = min(rank, rows, columns)
    weight, stats = matrix(rows, columns, seed), statistics(columns, seed)
    rom, whitened = made("rom", weight, stats, rank=rank), made("svd-llm", weight, stats, rank=rank)
    assert torch.allclose(dense(rom), dense(whitened), atol=1e-4 * float(weight.norm()))
    values = torch.linalg.eigvalsh(output_moment(weight, stats["gram"])).flip(0)
    assert lost(weight, rom, stats["gram"]) == pytest.approx(float(values[rank:].clamp_min(0).sum()), abs=1e-5 * float(values.sum()))


@settings(max_examples=8, deadline=None)
@given(rows=st.integers(4, 20), columns=st.integers(4, 20), rank=st.integers(1, 3), seed=st.integers(0, 999))
def test_each_method_is_the_best_for_what_it_weighs_by(rows: int, columns: int, rank: int, seed: int) -> None:
    weight, stats = matrix(rows, columns, seed), statistics(columns, seed)
    moments = {"svd": torch.eye(columns).double(), "asvd": stats["mean_abs"].diag(), "svd-llm": stats["gram"]}
    for name, moment in moments.items():
        losses = {other: lost(weight, made(other, weight, stats, rank=rank), moment) for other in moments}
        assert losses[name] <= min(losses.values()) * (1 + 1e-5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_full_rank_changes_nothing(name: str, shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    assert torch.allclose(dense(made(name, weight, statistics(shape[1]), rank=16)), weight, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_full_rank_factors_give_the_logits_of_the_dense_model(name: str, in_memory: Build) -> None:
    loaded = in_memory("llama")
    with torch.no_grad():
        before = loaded.model(input_ids=TOKENS.ids_SL).logits
        for part in loaded.anatomy.linears:
            module = surgery.get(loaded.model, part.name)
            weight = surgery.linear_weight(module).detach()
            surgery.set_linear_weight(module, dense(made(name, weight, statistics(part.in_features), rank=min(weight.shape))))
        assert torch.allclose(loaded.model(input_ids=TOKENS.ids_SL).logits, before, atol=1e-4 * float(before.abs().max()))


def test_golden_diagonal() -> None:
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    assert torch.allclose(dense(truncate(weight, None, 1)), torch.diag(torch.tensor([3.0, 0.0, 0.0])), atol=1e-6)
    scaled = truncate(weight, diagonal_root(torch.tensor([1.0, 2.0, 9.0])), 1)
    assert torch.allclose(dense(scaled), torch.diag(torch.tensor([0.0, 0.0, 1.0])), atol=1e-6), "3 * 1 and 2 * 2 are less than 1 * 9"


def test_a_singular_moment_is_no_obstacle() -> None:
    gram = torch.zeros(8, 8, dtype=torch.float64)
    gram[:3, :3] = torch.eye(3)
    weight = matrix(6, 8)
    assert lost(weight, truncate(weight, root_of(gram), 3), gram) < 1e-6
    with pytest.raises(InputError, match=r"inputs of this layer were zero.*other text"):
        root_of(torch.zeros(8, 8, dtype=torch.float64))


# In a model ------------------------------------------------------------------------------------------------------


def recipe(method: str = "svd-llm", rank: dict[str, Any] | None = None, stages: tuple[str, ...] = (), match: str = "*", **more: Any) -> Recipe:
    lines = [{"match": match, "rank": rank or {"keep": 0.5}}, *more.pop("lines", [])]
    first = {"method": method, "options": more.pop("options", {})}
    return Recipe.from_dict({"model": "llama", "schemes": lines, "stages": [first, *({"method": name} for name in stages)], **more})


@pytest.mark.parametrize("method", METHODS)
def test_a_factored_model_runs_as_two_packed_products_and_costs_what_is_said(method: str, in_memory: Build, tmp_path: Any) -> None:
    loaded, plan = in_memory("llama"), recipe(method)
    result = compress(loaded, plan, store=LayerStore(tmp_path), calibration=TOKENS)
    (tmp_path / "recipe.yaml").write_text(plan.to_yaml())
    layers = [module for module in result.model.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == 21 and {layer.kernel for layer in layers} == {"low-rank pair"}
    weights = weights_of(result.model, loaded.anatomy.block_prefix, loaded.anatomy.itemsize)
    assert weights.stored_bytes == result.bytes == size_of(plan, loaded.anatomy).bytes
    assert all(layer.error > 0 for layer in result.layers)
    with torch.no_grad():
        once, again = (model(input_ids=TOKENS.ids_SL).logits for model in (result.model, load_compressed(tmp_path, loaded)))
    assert torch.equal(once, again)


def test_flops_and_removed_parameters(paper: Callable[..., Anatomy]) -> None:
    anatomy, plan = paper(), recipe(rank={"rank": 8}, match="role:up")
    gone = 4 * (160 * 64 - 8 * (160 + 64))
    assert removed_share(plan, anatomy) == pytest.approx(gone / anatomy.linear_params)
    assert flops_per_token(None, anatomy) - flops_per_token(plan, anatomy) == 2 * gone


@pytest.mark.parametrize(("stages", "line"), [((), {"factors": {"bits": 8, "group_size": 16}}), (("gptq",), {"factors": {"bits": 8, "group_size": 16}})])
def test_factors_have_widths_of_their_own(in_memory: Build, stages: tuple[str, ...], line: dict[str, Any]) -> None:
    loaded = in_memory("llama")
    plan = recipe("svd-llm", {"keep": 0.5, **line}, stages)
    made = compress(loaded, plan, calibration=TOKENS)
    plain = compress(loaded, recipe("svd-llm"), calibration=TOKENS)
    layer = made.model.model.layers[1].mlp.up_proj
    assert layer.layout.left == layer.layout.right and layer.layout.left.bits == 8
    assert made.bytes < plain.bytes and made.bytes == size_of(plan, loaded.anatomy).bytes
    first, second = (model.model.layers[0].self_attn.q_proj.dequantize() for model in (made.model, plain.model))
    assert 0 < float((first - second).norm() / second.norm()) < 0.05


def test_rom_goes_layer_after_layer_unless_told_not_to(in_memory: Build) -> None:
    plans = [recipe("svd-llm"), recipe("rom", options={"sequential": False}), recipe("rom")]
    models = [compress(in_memory("llama"), plan, calibration=TOKENS).model.model.layers[0] for plan in plans]
    downs = [block.mlp.down_proj.dequantize() for block in models]
    firsts = [block.self_attn.q_proj.dequantize() for block in models]
    near = 0.02 * float(downs[0].norm())  # factors are stored in the model's type
    assert torch.allclose(firsts[0], firsts[2], atol=near) and torch.allclose(downs[0], downs[1], atol=near)
    assert float((downs[0] - downs[2]).norm()) > near


def test_a_later_stage_quantises_each_factor(in_memory: Build) -> None:
    four = [{"match": "*", "weights": {"bits": 4, "group_size": 16}}]
    alone = compress(in_memory("llama"), recipe("rom", lines=four), calibration=TOKENS)
    staged = compress(in_memory("llama"), recipe("rom", stages=("rtn",), lines=four), calibration=TOKENS)
    assert {layer.method for layer in staged.layers} == {"rom + rtn"}
    first, second = (made.model.model.layers[0].self_attn.q_proj for made in (alone, staged))
    assert torch.equal(first.dequantize(), second.dequantize()), "the low-rank stage rounds to nearest too"


def test_statistics_between_the_factors_are_those_of_the_right_ones_outputs() -> None:
    weight, stats = matrix(16, 16), statistics(16)
    seen: list[Any] = []
    outcome = registry.linear("rom").apply(weight, Scheme(rank=RankScheme(rank=4)), stats, registry.linear("rom").parse({}))
    method = registry.linear("wanda")
    method_apply = method.apply

    class Probe(type(method)):  # type: ignore[misc]
        def apply(self, weight_NK: Tensor, scheme: Scheme, stats: Any, options: Any) -> Any:
            seen.append(stats)
            return method_apply(weight_NK, scheme, stats, options)

    scheme = Scheme.model_validate({"sparsity": {"ratio": 0.25}})
    result = pipeline.act(Probe(), outcome, scheme, stats, method.parse({}))
    assert result.factors is not None
    right = result.factors[1].weight_NK
    assert seen[0] is stats and torch.allclose(seen[1]["second_moment"], output_moment(right, stats["gram"]).diagonal())

    class Needy(Probe):
        needs = frozenset({"mean_abs"})

    with pytest.raises(InputError, match=r"cannot quantise the factors.*mean_abs"):
        pipeline.act(Needy(), outcome, scheme, stats, method.parse({}))


def test_at_break_even_a_matrix_stays_whole_and_the_run_says_so(in_memory: Build) -> None:
    assert [break_even(*shape) for shape in ((576, 576), (1536, 576), (192, 576))] == [288, 418, 144]
    loaded, notes = in_memory("llama"), []
    plan = recipe("svd", {"keep": 1.0}, match="role:q", lines=[{"match": "role:up", "rank": {"keep": 0.5}}])
    assert kept_whole(plan, loaded.anatomy) == [f"model.layers.{block}.self_attn.q_proj" for block in range(3)]
    result = compress(loaded, plan, lambda kind, data: notes.append(data) if kind == "note" else None)
    assert {layer.layer.split(".")[-1] for layer in result.layers} == {"up_proj"}
    assert [note["text"] for note in notes] == [
        "model.layers.0.self_attn.q_proj and 2 more stay whole: at or past the break-even rank two factors are no smaller than the matrix."
    ]


@pytest.mark.parametrize(
    ("rank", "told"),
    [
        ({"rank": 0}, "0 is no rank"),
        ({"rank": -3}, "-3 is no rank"),
        ({"rank": 2.5}, "whole number"),
        ({"keep": 0}, "greater than 0"),
        ({"keep": 1.5}, "less than or equal to 1"),
        ({}, "either keep"),
        ({"keep": 0.5, "rank": 4}, "either keep"),
    ],
)
def test_ranks_that_are_none_are_refused(rank: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Recipe.from_dict({"model": "llama", "schemes": [{"match": "*", "rank": rank}]})


def test_what_does_not_fit_is_named(paper: Callable[..., Anatomy]) -> None:
    past = recipe(rank={"rank": 65}, match="role:up").validate_for(paper())
    assert len(past) == 4 and "Rank 65 is past the 64" in past[0].wrong and "at most 64" in past[0].right
    both = recipe(match="role:up", lines=[{"match": "*", "sparsity": {"ratio": 0.5}}]).validate_for(paper())
    assert "zeros and for low rank" in both[0].wrong
    blockwise = check_stages(recipe(stages=("flexround",), lines=[{"match": "*", "weights": {"bits": 4}}]), paper(), registry.catalogue())
    assert [problem.field for problem in blockwise] == ["stages[1]"], "what learns a block at a time knows whole matrices"
    late = check_stages(recipe("rtn", stages=("svd",), lines=[{"match": "*", "weights": {"bits": 4}}]), paper(), registry.catalogue())
    assert [problem.field for problem in late] == ["stages"] and "factor before" in late[0].right


def test_a_scheme_without_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="without rank"):
        registry.linear("svd").apply(matrix(4, 4), Scheme(weights=WeightScheme(bits=4)), {}, registry.linear("svd").parse({}))
