"""Stages that choose what goes: chosen once, written down, found again by resume and loading; bytes and FLOPs by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.engine.accounting import cache_bytes, flops_per_token, size_of
from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.chosen import decided_recipe
from bitpress.engine.compress import compress, load_compressed
from bitpress.engine.errors import BitpressError, Cancelled, InputError
from bitpress.engine.layer_store import LayerStore
from bitpress.engine.methods import registry
from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import ShapeMethod
from bitpress.engine.methods.catalogue import check_stages
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.model.load import Loaded
from bitpress.engine.model.surgery import get, linear_weight
from bitpress.engine.recipe import Recipe
from bitpress.engine.scene import Scene

Build = Callable[..., Loaded]
IDS = torch.arange(24).view(2, 12) * 7 % 320
TOKENS = CalibrationSet("made up", 0, "sha", IDS)


class Chooser(ShapeMethod):
    """Drops a block, cuts units of others, sets a weight and a bias; counts how often it was asked."""

    name, title, family, summary, citation = "chooser", "Chooser", "prune", "Chooses. For tests.", "none"
    ability = Ability(part="structure", units=("blocks", "heads", "neurons"))

    def __init__(self) -> None:
        self.asked = 0

    def shape(self, scene: Scene, options: Any) -> None:
        self.asked += 1
        assert scene.ids_SL is IDS
        scene.cut(heads={2: [0, 3]}, neurons={0: list(range(60)), 2: [1]})
        down = "model.layers.2.mlp.down_proj"
        scene.set_weight(down, torch.ones(64, 127))
        scene.set_bias(down, torch.full((64,), 0.25))
        scene.cut(drop_blocks=[1])


@pytest.fixture
def chooser(monkeypatch: pytest.MonkeyPatch) -> Chooser:
    method = Chooser()
    monkeypatch.setitem(registry.all_methods(), "chooser", method)
    return method


def recipe(**fields: Any) -> Recipe:
    return Recipe.from_dict({"model": "llama", **fields})


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


PLAN = {"schemes": [{"match": "role:up", "weights": {"bits": 8, "group_size": 32}}], "stages": [{"method": "chooser"}, {"method": "rtn"}]}


def test_what_is_chosen_is_kept_and_never_chosen_again(in_memory: Build, chooser: Chooser, tmp_path: Path) -> None:
    loaded, plan = in_memory("llama"), recipe(**PLAN)
    before = logits(loaded.model)
    made = compress(loaded, plan, store=LayerStore(tmp_path), calibration=TOKENS)
    (tmp_path / "recipe.yaml").write_text(plan.to_yaml())
    assert torch.equal(logits(loaded.model), before)
    down = get(made.model, "model.layers.1.mlp.down_proj")
    assert torch.equal(linear_weight(down), torch.ones(64, 127))
    assert torch.equal(down.bias, torch.full((64,), 0.25))
    assert [layer.layer for layer in made.layers] == ["model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"]
    assert made.recipe.structure.drop_blocks == [1]
    again = compress(loaded, plan, store=LayerStore(tmp_path), calibration=TOKENS)
    assert chooser.asked == 1
    assert all(layer.reused for layer in again.layers)
    assert torch.equal(logits(again.model), logits(made.model))
    assert torch.equal(logits(load_compressed(tmp_path, loaded)), logits(made.model))
    assert chooser.asked == 1
    assert decided_recipe(tmp_path, plan) == made.recipe == again.recipe


def test_bytes_and_flops_equal_a_hand_count(in_memory: Build, chooser: Chooser) -> None:
    loaded = in_memory("llama")
    made = compress(loaded, recipe(**PLAN), calibration=TOKENS)
    # Block 0 keeps 4 heads (2 key-value heads) of 16 channels and 68 neurons; block 2 keeps heads 1 and 2, one of each group, and 127.
    attention = 64 * (64 + 32 + 32) + 64 * 64, 64 * (32 + 32 + 32) + 32 * 64
    linears = sum(attention) + 3 * 64 * (68 + 127)
    assert size_of(made.recipe, loaded.anatomy).linear_params == linears
    assert flops_per_token(made.recipe, loaded.anatomy) == 2 * linears + 2 * 320 * 64
    assert flops_per_token(made.recipe, loaded.anatomy, context=10) - flops_per_token(made.recipe, loaded.anatomy) == 4 * 10 * 16 * (4 + 2)
    assert cache_bytes(made.recipe, loaded.anatomy, 1) == 2 * 2 * 16 * (2 + 2)
    assert made.bytes == size_of(made.recipe, loaded.anatomy).bytes
    shapes = [tuple(weight.shape) for weight in made.model.parameters()]
    assert {(64, 127), (32, 64)} <= set(shapes)


def test_another_recipe_model_or_text_is_refused(in_memory: Build, chooser: Chooser, tmp_path: Path) -> None:
    loaded = in_memory("llama")
    compress(loaded, recipe(**PLAN), store=LayerStore(tmp_path), calibration=TOKENS)
    for plan, text in ((recipe(seed=1, **PLAN), TOKENS), (recipe(**PLAN), CalibrationSet("made up", 0, "other", IDS))):
        with pytest.raises(BitpressError, match="shape cannot be reused"):
            compress(loaded, plan, store=LayerStore(tmp_path), calibration=text)
    path = tmp_path / "shape.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (tmp_path / "recipe.yaml").write_text(recipe(**PLAN).to_yaml())
    with pytest.raises(BitpressError, match=r"shape.safetensors is damaged"):
        load_compressed(tmp_path, loaded)
    path.unlink()
    with pytest.raises(BitpressError, match=r"not finished.*Resume the run"):
        load_compressed(tmp_path, loaded)


def test_a_stopped_choice_leaves_nothing(in_memory: Build, tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        compress(in_memory("llama"), recipe(stages=[{"method": "shortgpt", "options": {"remove": 0.34}}]), store=LayerStore(tmp_path), calibration=TOKENS,
                 should_stop=lambda: True)  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_what_was_chosen_is_told_and_a_pattern_that_no_longer_fits_is_refused(in_memory: Build, chooser: Chooser) -> None:
    said: list[tuple[str, dict[str, Any]]] = []
    compress(in_memory("llama"), recipe(stages=[{"method": "chooser"}]), lambda kind, data: said.append((kind, data)), calibration=TOKENS)
    json.dumps(said)
    assert ("note", {"level": "info", "text": "2 of 3 blocks, 6 of 12 heads, 195 of 384 neurons stay; 47.6% of the block linears' weights are gone."}) in said
    lines = [{"match": "role:down", "sparsity": {"ratio": 0.5, "pattern": "2:4"}}]
    with pytest.raises(InputError, match=r"does not fit the recipe's schemes.*127"):
        compress(in_memory("llama"), recipe(schemes=lines, stages=[{"method": "chooser"}, {"method": "magnitude"}]), calibration=TOKENS)


def test_shares_need_a_stage_that_chooses(paper: Callable[..., Anatomy]) -> None:
    plan = Recipe.from_dict({"model": "paper", "structure": {"neurons": {"match": "blocks:1", "keep": 0.5}}})
    assert plan.structure.units(paper())[1].neurons == 80
    (problem,) = check_stages(plan, paper(), registry.catalogue())
    assert problem.field == "structure.neurons"
    assert "no stage chooses" in problem.wrong


def test_explicit_structure_needs_no_stage(in_memory: Build) -> None:
    made = compress(in_memory("llama"), recipe(structure={"drop_blocks": [0], "remove_heads": {1: [0]}, "remove_neurons": {2: [0, 1]}}))
    assert [block.mlp.down_proj.in_features for block in made.model.model.layers] == [128, 126]
    assert logits(made.model).isfinite().all()


def test_a_rotated_model_is_not_cut(in_memory: Build) -> None:
    lines = [{"match": "*", "weights": {"bits": 4, "group_size": 32}}]
    stages = [{"method": "rotation"}, {"method": "layerchop", "options": {"remove": 0.34}}, {"method": "rtn"}]
    with pytest.raises(InputError, match=r"rotation rotates the model and mixes.*Leave out rotation"):
        compress(in_memory("llama"), recipe(schemes=lines, stages=stages))
    with pytest.raises(InputError, match="Leave out rotation"):
        compress(in_memory("llama"), recipe(schemes=lines, stages=[stages[0], stages[2]], structure={"remove_neurons": {1: [0]}}))
