"""LQER: the error of rounding shrinks with the rank, to nothing at full rank; bytes, storage and the product are those of base and factors together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.engine.accounting import flops_per_token, size_of
from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.compress import compress, load_compressed
from bitpress.engine.errors import InputError
from bitpress.engine.layer_store import LayerStore
from bitpress.engine.methods import registry
from bitpress.engine.methods.catalogue import check_stages
from bitpress.engine.methods.lowrank.lqer import LQER, LQEROptions
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import Recipe, Scheme
from bitpress.kernels.formats import pack
from bitpress.kernels.layout import DenseLayout, PairLayout, UniformLayout
from bitpress.kernels.packed import PackedLinear
from bitpress.kernels.pairs import dense, pack_pair

Build = Callable[..., Loaded]
TOKENS = CalibrationSet("made up", 0, "sha", torch.arange(192).view(8, 24) * 7 % 320)


def scheme(rank: int, **more: Any) -> Scheme:
    return Scheme.model_validate({"weights": {"bits": 2, "group_size": 8}, "rank": {"rank": rank, "beside": True, **more}})


def recipe(rank: dict[str, Any], bits: int = 3, method: str = "lqer", **options: Any) -> Recipe:
    line = {"match": "*", "weights": {"bits": bits, "group_size": 16}, "rank": {"beside": True, **rank}}
    return Recipe.from_dict({"model": "llama", "schemes": [line], "stages": [{"method": method, "options": options}]})


@pytest.mark.parametrize("by_inputs", [True, False])
def test_more_rank_loses_less_and_full_rank_nothing(by_inputs: bool) -> None:
    made = torch.Generator().manual_seed(1)
    weight_NK, x_MK = torch.randn(12, 16, generator=made), torch.randn(64, 16, generator=made) * torch.linspace(3, 0.1, 16)
    stats = {"gram": (x_MK.t() @ x_MK / 64).double()}
    outcomes = [LQER().apply(weight_NK, scheme(rank), stats, LQEROptions(by_inputs=by_inputs)) for rank in (1, 3, 6, 12)]
    seen = x_MK if by_inputs else torch.eye(16)
    errors = [float((seen @ (outcome.weight_NK - weight_NK).t()).norm()) for outcome in outcomes]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4
    plain = registry.linear("rtn").apply(weight_NK, Scheme.model_validate({"weights": {"bits": 2, "group_size": 8}}), {}, registry.linear("rtn").parse({}))
    assert torch.equal(outcomes[0].codes.codes_NK, plain.codes.codes_NK), "the base is what rounding to nearest gives"  # type: ignore[union-attr]


def test_weighing_by_inputs_loses_less_on_them() -> None:
    made = torch.Generator().manual_seed(2)
    weight_NK, x_MK = torch.randn(24, 16, generator=made), torch.randn(64, 16, generator=made) * torch.linspace(5, 0.01, 16)
    stats = {"gram": (x_MK.t() @ x_MK / 64).double()}
    lost = [(x_MK @ (LQER().apply(weight_NK, scheme(2), stats, LQEROptions(by_inputs=on)).weight_NK - weight_NK).t()).norm() for on in (True, False)]
    assert lost[0] < lost[1]


@pytest.mark.parametrize("factors", [{}, {"factors": {"bits": 8, "group_size": 8}}])
def test_in_a_model_stored_and_loaded(in_memory: Build, tmp_path: Path, factors: dict[str, Any]) -> None:
    loaded, plan = in_memory("llama"), recipe({"rank": 8, **factors})
    result = compress(loaded, plan, store=LayerStore(tmp_path), calibration=TOKENS)
    (tmp_path / "recipe.yaml").write_text(plan.to_yaml())
    layer = result.model.model.layers[1].mlp.up_proj
    assert isinstance(layer.layout, PairLayout) and layer.layout.base == UniformLayout(3, 16) and "beside it rank 8" in repr(layer)
    assert result.bytes == size_of(plan, loaded.anatomy).bytes and {each.method for each in result.layers} == {"lqer"}
    factors_params = 8 * sum(part.out_features + part.in_features for part in loaded.anatomy.linears)
    assert flops_per_token(plan, loaded.anatomy) - flops_per_token(None, loaded.anatomy) == 2 * factors_params
    rounded = compress(loaded, Recipe.from_dict({**plan.to_dict(), "schemes": [{"match": "*", "weights": {"bits": 3, "group_size": 16}}],
                                                 "stages": [{"method": "rtn"}]}))  # fmt: skip
    for ours, theirs in zip(result.layers, rounded.layers, strict=True):
        assert ours.error < theirs.error
    with torch.no_grad():
        once, again = (model(input_ids=TOKENS.ids_SL).logits for model in (result.model, load_compressed(tmp_path, loaded)))
    assert torch.equal(once, again)


def test_the_layer_multiplies_what_it_stands_for() -> None:
    base = pack(torch.randint(0, 16, (32, 64), dtype=torch.uint8), torch.full((32, 2), 0.125), None, UniformLayout(4, 32, True))
    left, right = torch.randn(32, 5).bfloat16(), torch.randn(5, 64).bfloat16()
    layout = PairLayout(0.0, DenseLayout(), DenseLayout(), 5, base=base.layout)
    layer = PackedLinear(pack_pair(dense(left), dense(right), layout, base))
    x_MK = torch.randn(3, 64)
    wanted = x_MK @ layer.dequantize().t()
    assert float((layer(x_MK.bfloat16()).float() - wanted).norm() / wanted.norm()) < 0.03
    assert layer.stored_bytes == layout.nbytes(32, 64) and "and two products through rank 5" in layer.reason
    with pytest.raises(ValueError, match="added to does not fit"):
        pack_pair(dense(left), dense(right), layout)


def test_what_does_not_fit_is_named(paper: Callable[..., Anatomy]) -> None:
    bare = Recipe.from_dict({"model": "m", "schemes": [{"match": "role:up", "rank": {"rank": 4, "beside": True}}], "stages": [{"method": "lqer"}]})
    assert "not rounded to uniform codes" in bare.validate_for(paper())[0].wrong
    past = recipe({"rank": 200}).validate_for(paper())
    assert "Rank 200 is past" in past[0].wrong
    other = check_stages(recipe({"rank": 4}, method="svd"), paper(), registry.catalogue())
    assert any("lqer" in problem.right for problem in other)
    with pytest.raises(InputError, match="0 is no rank"):
        recipe({"rank": 0})
