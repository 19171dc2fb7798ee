"""OWL: outlier shares by hand, ratios around the asked mean, and what it leaves alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.compress import compress
from bitpress.engine.errors import InputError
from bitpress.engine.methods.prune.owl import outlier_shares, ratio_shifts
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import Recipe
from bitpress.engine.scene import Scene
from bitpress.kernels.packed import PackedLinear

Build = Callable[..., Loaded]
IDS = torch.randint(2, 300, (3, 20), generator=torch.Generator().manual_seed(1))
TOKENS = CalibrationSet("made up", 0, "sha", IDS)


def weight_of(module: Any) -> torch.Tensor:
    """The matrix of a layer, whether a sparse format holds it or not."""
    return module.dequantize() if isinstance(module, PackedLinear) else module.weight


def test_shifts_have_mean_zero_and_favour_outliers() -> None:
    shift = ratio_shifts({0: 0.01, 1: 0.03, 2: 0.05}, spread=0.08)
    assert sum(shift.values()) == pytest.approx(0)
    assert [shift[block] for block in range(3)] == pytest.approx([0.08, 0, -0.08])
    assert ratio_shifts({0: 0.01, 1: 0.01}, spread=0.08) == {0: 0, 1: 0}


def test_outliers_are_counted_block_by_block(in_memory: Build) -> None:
    loaded = in_memory("llama")
    loaded.model.model.layers[1].mlp.up_proj.weight[:, :4] *= 40
    scene = Scene(loaded, Recipe(model="llama"), IDS)
    up = [f"model.layers.{block}.mlp.up_proj" for block in range(3)]
    found = outlier_shares(scene, up, 5.0)
    assert found[1] > 0.03 > found[0]
    assert found[1] > found[2]


def test_ratios_go_to_the_pruning_stage_and_keep_their_mean(in_memory: Build) -> None:
    lines = [{"match": "role:mlp", "sparsity": {"ratio": 0.6}}, {"match": "role:q", "sparsity": {"ratio": 0.5, "pattern": "2:4"}}]
    plan = Recipe.from_dict({"model": "llama", "schemes": lines, "stages": [{"method": "owl"}, {"method": "wanda"}]})
    made = compress(in_memory("llama"), plan, calibration=TOKENS)
    zeros = [float((weight_of(block.mlp.up_proj) == 0).float().mean()) for block in made.model.model.layers]
    assert sum(zeros) / 3 == pytest.approx(0.6, abs=0.01)
    assert max(zeros) - min(zeros) == pytest.approx(0.16, abs=0.02)
    assert all(int((weight_of(block.self_attn.q_proj) == 0).sum()) == 64 * 32 for block in made.model.model.layers)
    assert made.recipe.structure == plan.structure


def test_nothing_to_do_is_said(in_memory: Build) -> None:
    lines = [{"match": "*", "sparsity": {"ratio": 0.5, "pattern": "2:4"}}]
    plan = Recipe.from_dict({"model": "llama", "schemes": lines, "stages": [{"method": "owl"}, {"method": "wanda"}]})
    with pytest.raises(InputError, match="OWL has nothing to do"):
        compress(in_memory("llama"), plan, calibration=TOKENS)
