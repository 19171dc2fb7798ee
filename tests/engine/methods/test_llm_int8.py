"""LLM.int8(): outlier columns escape the rounding, the plain rest is W8A8, outliers are counted, in a run and alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.compress import compress
from bitpress.engine.errors import InputError
from bitpress.engine.methods import registry
from bitpress.engine.methods.quantize.pipeline import quantize_groups
from bitpress.engine.recipe import ActivationScheme, Recipe, Scheme, WeightScheme
from bitpress.kernels.formats import pack
from bitpress.kernels.layout import UniformLayout
from bitpress.kernels.packed import PackedLinear, fuse
from bitpress.kernels.reference import matmul

ROWS = WeightScheme(bits=8, group_size=0, symmetric=True)
METHOD: Any = registry.get("llm-int8")


def layer(outliers: float | None, seed: int = 0) -> PackedLinear:
    weights = torch.randn(24, 64, generator=torch.Generator().manual_seed(seed))
    return PackedLinear(pack(*quantize_groups(weights, ROWS), UniformLayout(8, 0, True)), None, 8, outliers)


def rows_with_outlier() -> torch.Tensor:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    x[2, 7] = 60.0
    return x


def test_columns_with_outliers_are_not_rounded_and_the_rest_is() -> None:
    x, linear = rows_with_outlier(), layer(6.0)
    small, large = x.clone(), torch.zeros_like(x)
    large[:, 7], small[:, 7] = x[:, 7], 0.0
    expected = matmul(small, linear.packed, activation_bits=8) + matmul(large, linear.packed)
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-4, atol=1e-3)


def test_outliers_cost_less_than_when_they_are_rounded_with_the_others() -> None:
    x = rows_with_outlier()
    exact = matmul(x, layer(None).packed)
    mixed, plain = ((layer(outliers)(x).double() - exact)[2].norm() for outliers in (6.0, None))
    assert mixed < 0.3 * plain


def test_without_outliers_it_is_the_plain_rounded_product() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).clamp(-3, 3)
    assert torch.equal(layer(6.0)(x), layer(None)(x))


def test_layers_of_unlike_thresholds_are_not_joined() -> None:
    with pytest.raises(ValueError, match="unlike activations"):
        fuse([layer(6.0), layer(None)])
    assert fuse([layer(6.0), layer(6.0, 1)]).outliers == 6.0


def test_notes_count_outliers_and_tell_what_the_scheme_lacks() -> None:
    weights, stats = torch.randn(4, 8), {"peak": torch.tensor([1.0, 6.0, 7.0, 2.0, 0.0, 0.0, 0.0, 0.0]).double()}
    said = [METHOD.apply(weights, Scheme(weights=ROWS, activations=activations), stats, METHOD.parse({})).notes
            for activations in (ActivationScheme(bits=8, outliers=6.5), ActivationScheme(bits=8), None, ActivationScheme(bits=8, outliers=8.0))]  # fmt: skip
    assert said[0] == ("1 of its 8 inputs reach 6.5 in the calibration text and stay unrounded there",)
    assert said[1] == ("2 of its 8 inputs reach 6 in the calibration text and are rounded all the same: the scheme sets no `outliers`",)
    assert "not rounded" in said[2][0]
    assert said[3] == ()


def test_in_a_run_the_threshold_reaches_the_layers(in_memory: Callable[..., Any]) -> None:
    line = {"match": "*", "weights": {"bits": 8, "group_size": "row", "symmetric": True}, "activations": {"bits": 8, "outliers": 0.5}}
    plan = Recipe.from_dict({"model": "llama", "schemes": [line], "stages": [{"method": "llm-int8"}]})
    ids, said = torch.randint(2, 300, (2, 16), generator=torch.Generator().manual_seed(0)), []
    loaded = in_memory("llama")
    made = compress(loaded, plan, emit=lambda kind, data: said.append((kind, data)), calibration=CalibrationSet("made up", 0, "sha", ids))
    assert {module.outliers for module in made.model.modules() if isinstance(module, PackedLinear)} == {0.5}
    assert any("stay unrounded" in data["text"] for kind, data in said if kind == "note")
    gap = (made.model(input_ids=ids).logits - loaded.model(input_ids=ids).logits).norm() / loaded.model(input_ids=ids).logits.norm()
    assert gap < 0.05


@pytest.mark.parametrize("outliers", [0, -1.0, "6", True])
def test_a_threshold_that_is_none_is_refused(outliers: Any) -> None:
    with pytest.raises(InputError, match="outliers"):
        Recipe.from_dict({"model": "llama", "schemes": [{"match": "*", "activations": {"bits": 8, "outliers": outliers}}]})
