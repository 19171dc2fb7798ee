"""What a run writes of a matrix before and after: counts of all weights, and one typical group on its levels."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.engine.after_stats import after_record, typical_group
from bitpress.engine.compress import compress
from bitpress.engine.layer_store import LayerStore
from bitpress.engine.methods.quantize.pipeline import dequantize_groups, quantize_groups
from bitpress.engine.recipe import Recipe, WeightScheme


@pytest.mark.parametrize("group_size", [0, 16, 24])
def test_the_record_counts_every_weight_and_shows_a_group_on_its_levels(group_size: int) -> None:
    weights = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    scheme = WeightScheme(bits=2, group_size=group_size)
    record = after_record("a", weights, dequantize_groups(quantize_groups(weights, scheme), scheme), group_size)
    assert sum(record["before"]) == sum(record["after"]) == weights.numel()
    assert len(record["edges"]) == len(record["before"]) + 1
    assert 2 <= len(record["levels"]) <= 4 and set(record["group_after"]) <= set(record["levels"])
    row, first = record["row"], record["first"]
    assert record["group_before"] == pytest.approx(weights[row, first : first + len(record["group_before"])].tolist(), rel=1e-4)


def test_the_typical_group_has_the_median_range() -> None:
    weights = torch.zeros(3, 4)
    weights[0, 0], weights[1, 2], weights[2, 3] = 1.0, 5.0, 9.0
    assert typical_group(weights, 0) == (1, 0, 4)
    assert typical_group(weights, 100) == (1, 0, 4), "a group longer than a row is the row"


def test_a_run_writes_one_for_every_block_linear(in_memory: Callable[..., Any], tmp_path: Path) -> None:
    loaded = in_memory("llama")
    plan = {"model": "llama", "schemes": [{"match": "*", "weights": {"bits": 3, "group_size": 16}}], "embedding": {"bits": 8}, "stages": [{"method": "rtn"}]}
    compress(loaded, Recipe.from_dict(plan), store=LayerStore(tmp_path))
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "weights").iterdir()}
    assert set(found) == {part.name for part in loaded.anatomy.linears}
    assert all(record["v"] == 1 and record["layer"] == name and len(record["levels"]) <= 8 for name, record in found.items())
