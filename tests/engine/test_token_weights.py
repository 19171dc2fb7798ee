"""How much a token counts: by the gradients of probes of the divergence, and so that weighted moments are those of weighted rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bitpress.engine.calibrate import walk
from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.compress import compress
from bitpress.engine.errors import Cancelled
from bitpress.engine.recipe import Recipe
from bitpress.engine.token_weights import MOST, levelled, token_weights

IDS = torch.randint(2, 300, (6, 24), generator=torch.Generator().manual_seed(1))
LAYER = "model.layers.0.mlp.down_proj"


def test_weights_have_a_mean_of_one_and_no_token_stands_for_many() -> None:
    squares = torch.rand(4, 16, generator=torch.Generator().manual_seed(0))
    assert float(levelled(squares).mean()) == pytest.approx(1.0)
    squares[0, 0] = 1e6
    assert float(levelled(squares).max()) == MOST
    assert torch.equal(levelled(torch.zeros(2, 3)), torch.ones(2, 3))


def test_a_token_whose_errors_move_no_prediction_counts_for_nothing(in_memory: Callable[..., Any]) -> None:
    """Nothing after the last block reads an earlier token's output there but its own logits; with those made flat, only the others count."""
    loaded = in_memory("llama")
    found = token_weights(loaded.model, loaded.anatomy, IDS, [LAYER, "model.layers.2.mlp.down_proj"])
    assert set(found) == {LAYER, "model.layers.2.mlp.down_proj"}
    for weights_SL in found.values():
        assert weights_SL.shape == IDS.shape and (weights_SL >= 0).all() and weights_SL.isfinite().all()
    with torch.no_grad():
        loaded.model.lm_head.weight.zero_()
    flat = token_weights(loaded.model, loaded.anatomy, IDS, [LAYER])
    assert torch.equal(flat[LAYER], torch.ones(IDS.shape)), "no error matters, so all tokens count alike"


def test_weighted_moments_are_those_of_weighted_rows(in_memory: Callable[..., Any]) -> None:
    loaded, rows = in_memory("llama"), []
    weights = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(3))
    names = ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]
    given, seen = {names[0]: weights, names[1]: weights.flip(0)}, {}
    loaded.model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda _, args: rows.append(args[0].detach().double()))
    asked = {name: {"gram", "loss_gram"} for name in names}
    walk(loaded.model, loaded.anatomy, IDS, asked, lambda _, stats: seen.update(stats), weights=given, dtype=torch.float32)
    x_MK = torch.cat(rows)[: len(IDS)].flatten(0, 1)
    for name in names:
        scaled = x_MK * given[name].flatten().double().sqrt()[:, None]
        torch.testing.assert_close(seen[name]["loss_gram"], scaled.t() @ scaled / len(scaled), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(seen[name]["gram"], x_MK.t() @ x_MK / len(x_MK), rtol=1e-4, atol=1e-6)


def test_gptq_by_loss_runs_in_a_recipe_and_says_what_it_looked_at(in_memory: Callable[..., Any]) -> None:
    loaded, said = in_memory("llama"), []
    line = {"match": "*", "weights": {"bits": 3, "group_size": 16}}
    stages = [{"method": "gptq", "options": {"by_loss": True, "rounds": 1}}]
    recipe = Recipe.from_dict({"model": "tiny", "schemes": [line], "stages": stages})
    made = compress(loaded, recipe, lambda kind, data: said.append((kind, data)), calibration=CalibrationSet("made up", 0, "sha", IDS))
    assert any("one backward" in data["text"] for kind, data in said if kind == "note")
    plain = compress(loaded, Recipe.from_dict({**recipe.to_dict(), "stages": [{"method": "gptq"}]}), calibration=CalibrationSet("made up", 0, "sha", IDS))
    assert made.model(input_ids=IDS).logits.isfinite().all()
    assert [layer.error for layer in made.layers] != [layer.error for layer in plain.layers]


def test_it_stops_when_told_to(in_memory: Callable[..., Any]) -> None:
    loaded = in_memory("llama")
    with pytest.raises(Cancelled):
        token_weights(loaded.model, loaded.anatomy, IDS, [LAYER], should_stop=lambda: True)
