"""Codebook: Lloyd's turns against a plain search, values that are there already found again, zeros, bytes, the kernel, bad input."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitpress.engine.accounting import layout_of, size_of
from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.compress import compress, load_compressed
from bitpress.engine.layer_store import LayerStore
from bitpress.engine.methods import registry
from bitpress.engine.methods.catalogue import check_stages
from bitpress.engine.methods.share.codebook import Codebook, CodebookOptions, codebook, means, sort
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import Recipe, Scheme
from bitpress.kernels.layout import TableLayout
from bitpress.kernels.packed import PackedLinear
from bitpress.kernels.tables import levels

Build = Callable[..., Loaded]
TOKENS = CalibrationSet("made up", 0, "sha", torch.arange(192).view(8, 24) * 7 % 320)
PLAIN = CodebookOptions(by_inputs=False)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scheme(group: int = 0, double: bool = False) -> Scheme:
    return Scheme.model_validate({"weights": {"bits": 4, "group_size": group, "format": "codebook", "double_quant": double}})


def recipe(bits: int = 4, method: str = "codebook", **options: Any) -> Recipe:
    line = {"match": "*", "weights": {"bits": bits, "group_size": 16, "format": "codebook"}}
    return Recipe.from_dict({"model": "llama", "schemes": [line], "stages": [{"method": method, "options": options}]})


def lost(values: Tensor, weights: Tensor, found_L: Tensor) -> float:
    return float((weights * (values[..., None] - found_L).square().amin(-1)).sum())


def test_a_turn_is_that_of_a_plain_search() -> None:
    values, weights, start = random(300), random(300, seed=1).square(), levels("nf4", torch.float64)
    nearest = (values.double()[:, None] - start).abs().argmin(-1)
    plain = [float((weights[mine] * values[mine]).sum() / weights[mine].sum()) if bool((mine := nearest == place).any()) else float(start[place])
             for place in range(16)]  # fmt: skip
    assert means(sort(values, weights), start).tolist() == pytest.approx(plain, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 400), kind=st.sampled_from(["normal", "skewed", "two"]))
def test_no_turn_loses_more_and_values_ascend(seed: int, size: int, kind: str) -> None:
    values, weights = random(size, seed=seed), random(size, seed=seed + 1).square()
    values = {"normal": values, "skewed": values.exp(), "two": values.sign()}[kind]
    values = values / values.abs().max().clamp_min(1e-9)
    found = [codebook(values, weights, rounds) for rounds in (0, 1, 3, 100)]
    losses = [lost(values, weights, each) for each in found]
    slack = float(weights.sum()) * 2**-15  # values are rounded to bfloat16 at the end
    assert all(later <= before + slack for before, later in pairwise(losses))
    assert all(bool((each.diff() >= 0).all()) and 0.0 in each.tolist() for each in found)


def test_values_that_are_there_are_found() -> None:
    own = torch.tensor([-1.0, -0.75, -0.5, -0.25, 0.0, 0.125, 0.5, 1.0])
    weight_NK = own[torch.randint(0, 8, (12, 40), generator=torch.Generator().manual_seed(3))]
    weight_NK[:, 0] = 1.0  # every row's scale is 1
    made = Codebook().apply(weight_NK, scheme(), {}, PLAIN)
    assert torch.equal(made.weight_NK, weight_NK)


@pytest.mark.parametrize(("group", "double"), [(0, False), (16, False), (16, True)])
def test_it_fits_better_than_fixed_levels_and_zeros_stay(group: int, double: bool) -> None:
    weight_NK = random(24, 70)
    weight_NK[:, ::7] = 0.0
    made = Codebook().apply(weight_NK, scheme(group, double), {}, PLAIN)
    fixed = registry.linear("nf4").apply(weight_NK, Scheme.model_validate({"weights": {**scheme(group, double).weights.model_dump(), "format": "nf4"}}), {},
                                         registry.linear("nf4").parse({}))  # fmt: skip
    assert float((made.weight_NK - weight_NK).norm()) < float((fixed.weight_NK - weight_NK).norm())
    assert (made.weight_NK[weight_NK == 0] == 0).all()
    assert made.packed.layout == layout_of(scheme(group, double)) and made.packed.nbytes == made.packed.layout.nbytes(24, 70)  # type: ignore[union-attr]
    none = Codebook().apply(torch.zeros(3, 20), scheme(group, double), {}, PLAIN)
    assert not none.weight_NK.any()


def test_weighing_by_inputs_loses_less_on_them() -> None:
    weight_NK, x_MK = random(24, 16), random(64, 16, seed=1) * torch.linspace(5, 0.01, 16)
    stats = {"second_moment": x_MK.square().mean(0).double()}
    made = [Codebook().apply(weight_NK, scheme(), stats, CodebookOptions(by_inputs=on)).weight_NK for on in (True, False)]
    lost_on_inputs = [float((x_MK @ (each - weight_NK).t()).norm()) for each in made]
    assert lost_on_inputs[0] < lost_on_inputs[1]


def test_in_a_model_stored_loaded_and_multiplied(in_memory: Build, tmp_path: Path) -> None:
    loaded, plan = in_memory("llama"), recipe()
    result = compress(loaded, plan, store=LayerStore(tmp_path), calibration=TOKENS)
    (tmp_path / "recipe.yaml").write_text(plan.to_yaml())
    layer = result.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, PackedLinear) and layer.layout == TableLayout("codebook", 16) and layer.packed.tensors["levels"].shape == (16,)
    assert result.bytes == size_of(plan, loaded.anatomy).bytes
    x_MK = random(3, layer.in_features, seed=2)
    wanted = x_MK @ layer.dequantize().t()
    assert float((layer(x_MK.bfloat16()).float() - wanted).norm() / wanted.norm()) < 0.02
    with torch.no_grad():
        once, again = (model(input_ids=TOKENS.ids_SL).logits for model in (result.model, load_compressed(tmp_path, loaded)))
    assert torch.equal(once, again)


def test_what_does_not_fit_is_named(paper: Callable[..., Anatomy]) -> None:
    assert "no 3-bit codes" in recipe(bits=3).validate_for(paper())[0].wrong
    other = check_stages(recipe(method="nf4"), paper(), registry.catalogue())
    assert any("method: codebook" in problem.right for problem in other)
    with pytest.raises(ValueError, match="without its format"):
        Codebook().apply(random(2, 8), Scheme.model_validate({"weights": {"bits": 4}}), {}, PLAIN)
