"""The record of a pruned matrix: shares by hand, written by a run, and absent where nothing was pruned."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.engine.compress import compress
from bitpress.engine.layer_store import LayerStore
from bitpress.engine.mask_stats import mask_record
from bitpress.engine.recipe import Recipe


def test_patches_and_corner_are_those_of_the_matrix() -> None:
    dense = torch.full((96, 128), -2.0)
    made = dense.clone()
    made[:48, ::2] = 0
    record = mask_record("layer", dense, made)
    assert record["zeros"] == pytest.approx(0.25)
    assert (len(record["share"]), len(record["share"][0])) == (48, 64)
    assert record["before"][0] == [2.0] * 64
    assert record["after"][0] == [1.0] * 64
    assert record["share"][0] == [0.5] * 64
    assert record["share"][-1] == [0.0] * 64
    assert record["corner"][0] == "01" * 24


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_run_writes_it_for_pruned_layers_only(in_memory: Callable[..., Any], tmp_path: Path, pattern: str) -> None:
    lines = [{"match": "role:up", "sparsity": {"ratio": 0.5, "pattern": pattern}}, {"match": "role:q", "weights": {"bits": 4}}]
    plan = Recipe.from_dict({"model": "llama", "schemes": lines, "stages": [{"method": "magnitude"}, {"method": "rtn"}]})
    compress(in_memory("llama"), plan, store=LayerStore(tmp_path))
    found = {path.name: json.loads(path.read_text()) for path in (tmp_path / "masks").iterdir()}
    assert sorted(found) == [f"model.layers.{block}.mlp.up_proj.json" for block in range(3)]
    for record in found.values():
        assert record["zeros"] == pytest.approx(0.5)
        assert max(map(max, record["before"])) > 0
        assert all("11" in row or pattern == "unstructured" or row.count("1") == 24 for row in record["corner"])
